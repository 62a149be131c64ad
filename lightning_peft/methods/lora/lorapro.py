"""LoRA-Pro: replace the gradients of the two factors by those whose step comes closest to that of the whole weight.

Paper:    Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", 2024, arXiv:2407.18242.
Formula:  with g_A, g_B the gradients, P = (B^T B)^-1, Q = (A A^T)^-1:
          g_A <- P g_A / s^2 + X A,   g_B <- (I - B P B^T) g_B Q / s^2 - B X,
          X from  B^T B X + X A A^T = -P g_A A^T / s^2,  so that they stay close to the gradients that they replace
Shapes:   as LoRA; X (r, r)
Init:     as LoRA; y starts as the base
Merge:    as LoRA
Schedule: behind accumulation and averaging, before clipping; any optimizer steps with the result
Cost:     two eigendecompositions (r, r) per layer
Deviates from the authors' code: that keeps moments of the whole weight, (d_out, d_in), and steps by itself; this is the
          paper's form for gradients, with no more memory than LoRA.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, Kind, Training, register
from lightning_peft.methods.lora.lora import LoRA

_DAMPING = 1e-8  # added to both Gram matrices: B starts at zero


@register("lorapro")
@dataclass(frozen=True, kw_only=True)
class LoRAPro(LoRA):
    """LoRA whose step is the projection of that of full fine-tuning; takes the same arguments.

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

    @torch.no_grad()
    def on_before_optimizer_step(self, training: Training) -> None:
        """Replace the gradients of both factors of each layer."""
        for _, _, adapter in training.adapters():
            factors: Any = adapter.lora_A, adapter.lora_B
            if any(factor.grad is None for factor in factors):
                continue
            # in double precision: the Gram matrix of a small B has none to lose
            A, B, g_A, g_B = (t.flatten(1).double() for t in (*factors, *(factor.grad for factor in factors)))
            if g_A.isfinite().all() and g_B.isfinite().all():  # else the loss scaler passes over this step
                scaling: Any = adapter.scaling
                for factor, gradient in zip(factors, adjusted(A, B, g_A, g_B, scaling.double()), strict=True):
                    factor.grad.copy_(gradient.view_as(factor))


def adjusted(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients (r, d_in) and (d_out, r) to step with, for factors of these shapes and their own gradients."""
    left, U = torch.linalg.eigh(B.T @ B)
    right, V = torch.linalg.eigh(A @ A.T)
    left, right = (values.clamp(min=0) + _DAMPING for values in (left, right))
    P, Q = (U / left) @ U.T, (V / right) @ V.T
    full_A, full_B = P @ grad_A / scaling**2, grad_B @ Q / scaling**2
    # the Sylvester equation, in the bases in which both Gram matrices are diagonal
    X = U @ (-(U.T @ full_A @ A.T @ V) / (left[:, None] + right)) @ V.T
    return full_A + X @ A, full_B - B @ (P @ (B.T @ full_B)) - B @ X
