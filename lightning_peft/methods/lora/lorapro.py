"""LoRA-Pro: replace the gradients of the two factors by those whose step comes closest to that of the whole weight.

Paper:    Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", 2024, arXiv:2407.18242.
Formula:  with g_A, g_B the gradients, P = (B^T B)^-1, Q = (A A^T)^-1:
          g_A <- P g_A / s^2 + X A,   g_B <- (I - B P B^T) g_B Q / s^2 - B X,
          X from  B^T B X + X A A^T = -P g_A A^T / s^2,  so that they stay close to the gradients that they replace;
          mode "full": these stand for a gradient G = s (B g_A + g_B A) of the weight; Adam's direction for it is
          N = m / (sqrt(v) + eps), from its moments without their bias; the step is the above for s B^T N and s N A^T
Shapes:   as LoRA; X (r, r); G, m, v, N (d_out, d_in)
Init:     as LoRA; y starts as the base
Merge:    as LoRA
Schedule: "plain": behind accumulation and averaging, before clipping; any optimizer steps with the result.
          "full": behind each step of the optimizer, whose change of the factors is taken back; from the gradients that
          it saw, with lr, weight_decay, betas and eps of its parameter group
Cost:     two eigendecompositions (r, r) per layer; "full": Adam's step for a gradient (d_out, d_in) of each
Deviates from the authors' code: that has "full" alone, as an optimizer of its own.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, Kind, Training, register
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.optimizers import group_of, state_of

_DAMPING = 1e-8  # added to both Gram matrices: B starts at zero


@register("lorapro")
@dataclass(frozen=True, kw_only=True)
class LoRAPro(LoRA):
    """LoRA whose step is the projection of that of full fine-tuning.

    Args:
        mode: ``"plain"`` projects the gradients, with no more memory than LoRA. ``"full"`` projects the step that Adam
            would make with the whole weight: it keeps two moments of the size of each weight in the state of the
            optimizer, and in checkpoints, as full fine-tuning does.
        r: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``mode`` is neither, or an argument of `LoRA` is out of range.
        TargetError: see `LoRA`.

    >>> from torch import nn, tensor
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import notify
    >>> model = inject(nn.Sequential(nn.Linear(2, 1, bias=False)), LoRAPro(r=1, alpha=2.0))
    >>> adapter = model[0].adapters["default"]
    >>> adapter.lora_A.data, adapter.lora_B.data = tensor([[1.0, 0.0]]), tensor([[0.0]])
    >>> model(tensor([[3.0, 5.0]])).backward()  # the gradient of the weight is (3, 5), that of B 2 * 3
    >>> _ = notify(model, "on_before_optimizer_step", torch.optim.SGD(model.parameters(), lr=1.0))
    >>> round(adapter.lora_B.grad.item(), 5)  # s^2 times this moves the weight by its gradient along A: 3 = 2 * 1.5
    1.5
    """

    paper: ClassVar[str] = "arXiv:2407.18242"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": LowRank, "conv": LowRankConv}

    mode: Literal["plain", "full"] = "plain"

    @torch.no_grad()
    def on_before_optimizer_step(self, training: Training) -> None:
        """Replace the gradients of both factors of each layer, or remember the factors."""
        for _, _, adapter in training.adapters():
            A, B, scaling = _of(adapter)
            if A.grad is None or B.grad is None:
                continue
            if self.mode == "full":
                adapter.before = A.clone(), B.clone()
            elif A.grad.isfinite().all() and B.grad.isfinite().all():  # else the loss scaler passes over this step
                for factor, gradient in zip((A, B), adjusted(A, B, A.grad, B.grad, scaling), strict=True):
                    factor.grad.copy_(gradient.view_as(factor))

    @torch.no_grad()
    def on_after_optimizer_step(self, training: Training) -> None:
        """Take the change of the factors back, and step with Adam's direction for the weight, projected."""
        for _, _, adapter in training.adapters():
            before = adapter.__dict__.pop("before", None)
            if before is None:
                continue
            A, B, scaling = _of(adapter)
            for factor, value in zip((A, B), before, strict=True):
                factor.copy_(value)
            down, up = adjusted(A, B, A.grad, B.grad, scaling)
            G = scaling * torch.cat([B, up.to(B)], 1) @ torch.cat([down.to(A), A.flatten(1)])
            N = adam_direction(G, state_of(training, B), **group_of(training, B))
            projected = adjusted(A, B, scaling * B.T @ N, scaling * N @ A.flatten(1).T, scaling)
            for factor, gradient in zip((A, B), projected, strict=True):
                group = group_of(training, factor)
                lr = float(group["lr"])
                factor.mul_(1 - lr * group.get("weight_decay", 0)).sub_(lr * gradient.view_as(factor).to(factor))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Those of LoRA, and the mode with moments of whole weights."""
        return *super().examples(), cls(r=2, mode="full")


def _of(adapter: Any) -> tuple[Any, Any, Tensor]:
    return adapter.lora_A, adapter.lora_B, adapter.scaling


def adam_direction(
    G: Tensor,
    state: MutableMapping[str, Any],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **_: Any,
) -> Tensor:
    """What Adam would step with for the gradient ``G``; its moments are in ``state``."""
    step = state["full_step"] = state.get("full_step", 0) + 1
    for key, value, beta in (("full_exp_avg", G, betas[0]), ("full_exp_avg_sq", G.square(), betas[1])):
        state[key] = state.get(key, torch.zeros_like(G)).lerp_(value, 1 - beta)
    m, v = state["full_exp_avg"] / (1 - betas[0] ** step), state["full_exp_avg_sq"] / (1 - betas[1] ** step)
    return m / (v.sqrt() + eps)


def adjusted(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients (r, d_in) and (d_out, r) to step with, for factors and their own gradients; in double precision."""
    # the Gram matrix of a small B has no digits to lose
    A, B, grad_A, grad_B = (t.flatten(1).double() for t in (A, B, grad_A, grad_B))
    scaling = scaling.double()
    left, U = torch.linalg.eigh(B.T @ B)
    right, V = torch.linalg.eigh(A @ A.T)
    left, right = (values.clamp(min=0) + _DAMPING for values in (left, right))
    P, Q = (U / left) @ U.T, (V / right) @ V.T
    full_A, full_B = P @ grad_A / scaling**2, grad_B @ Q / scaling**2
    # the Sylvester equation, in the bases in which both Gram matrices are diagonal
    X = U @ (-(U.T @ full_A @ A.T @ V) / (left[:, None] + right)) @ V.T
    return full_A + X @ A, full_B - B @ (P @ (B.T @ full_B)) - B @ X
