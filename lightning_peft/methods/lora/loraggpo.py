"""LoRA-GGPO: train under random noise on each weight, as strong row by row as the weight and its gradient are.

Paper:    Chang et al., "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation
          Optimization", 2025, arXiv:2502.14538.
Formula:  while training y = (W + s B A) x + b + diag(p / sqrt(d_out)) E x,  E ~ N(0, 1), and else as LoRA;
          p_i = sigma sqrt(omega^2 + |s (B A)_i|^2) + beta |s (B dA + dB A)_i|^2,  M_i row i of M,
          dA, dB the gradients of the factors, omega the mean norm of the rows of W
Shapes:   as LoRA; E (d_out, d_in), strength p (d_out,), base_norm omega ()
Init:     as LoRA, p = 0; y starts as the base
Merge:    as LoRA: the noise is no part of it
Schedule: p is measured anew behind each optimizer step; E is drawn anew for each, from its number
Cost:     a random matrix (d_out, d_in) per layer in each forward
Deviates from what others made of it, the authors' code being unknown: the noise is the same for all batches and on all
          devices of a step, as that of one weight that was moved; omega is the mean of all rows, not of a sample; the
          row of the product counts with its s. The second version of the paper is another method.
"""

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetError, Training, register
from lightning_peft.engine.limits import NonNegative
from lightning_peft.methods.lora.lora import LoRA


class Perturbed(LowRank):
    """A low-rank product beside noise, which there is from the beginning of a training step to its end."""

    strength: Tensor
    base_norm: Tensor
    seed: int | None = None  # of the noise of this step
    noisy, through_noise = True, False  # whether there ever is noise, and whether gradients pass through it

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.register_buffer("strength", self.lora_B.new_zeros(target.d_out))
        self.register_buffer("base_norm", self.lora_B.new_zeros(()))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As LoRA; no noise yet."""
        super().reset_parameters(layer, generator)
        self.strength.zero_()
        self.base_norm.copy_(layer.weight.to(self.base_norm.dtype).norm(dim=1).mean())

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone; (..., d_out) for x (..., d_in)."""
        change = super().product(x, layer)
        return self.perturbed(change, x) if self.training and self.noisy else change

    @torch.compiler.disable  # a seed that changes at each step would compile the layer anew
    def perturbed(self, change: Tensor, x: Tensor) -> Tensor:
        """``change`` + diag(p / sqrt(d_out)) E x; the same E in all forwards of a step, also in a recomputed one."""
        if self.seed is None:
            return change
        p = self.strength
        E = torch.empty(len(p), x.shape[-1], dtype=p.dtype, device=p.device)
        E.normal_(generator=torch.Generator(p.device).manual_seed(self.seed))
        return change + F.linear((x if self.through_noise else x.detach()).to(p.dtype), E) * (p / len(p) ** 0.5)

    @torch.no_grad()
    def measure(self, sigma: float, beta: float) -> None:
        """Take p from the factors and their gradients."""
        A, B, dA, dB = self.lora_A, self.lora_B, self.lora_A.grad, self.lora_B.grad
        if dA is not None and dB is not None:
            own, moving = (self.scaling**2 * rows for rows in (squared_rows(A, B), squared_rows(A, B, dA, dB)))
            self.strength.copy_(sigma * (self.base_norm**2 + own).sqrt() + beta * moving)


def squared_rows(A: Tensor, B: Tensor, dA: Tensor | None = None, dB: Tensor | None = None) -> Tensor:
    """Squared norms (d_out,) of the rows of B A; of B dA + dB A with the latter two. By r x r products."""
    if dA is None or dB is None:
        return ((B @ (A @ A.T)) * B).sum(1).clamp(min=0)
    rows = ((B @ (dA @ dA.T)) * B).sum(1) + 2 * ((B @ (dA @ A.T)) * dB).sum(1) + ((dB @ (A @ A.T)) * dB).sum(1)
    return rows.clamp(min=0)


@register("loraggpo")
@dataclass(frozen=True, kw_only=True)
class LoRAGGPO(LoRA):
    """LoRA under noise on the weights; each forward draws a matrix of the size of the weight, in training only.

    Args:
        sigma: strength of the noise in the norm of the weight.
        beta: strength of the noise in the squared norm of the gradient; clip gradients, or it can feed on itself.
        grad_through_noise: let the gradients of the layers below see the noise too.
        seed: of the noise.
        r: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``sigma`` or ``beta`` is negative, or an argument of `LoRA` is out of range.
        TargetError: a weight is used without a call of its layer, which noise cannot reach; or see `LoRA`.

    >>> from torch import tensor, allclose
    >>> A, B, dA, dB = tensor([[1.0, 2.0]]), tensor([[3.0]]), tensor([[5.0, 0.0]]), tensor([[7.0]])
    >>> allclose(squared_rows(A, B), (B @ A).square().sum(1))
    True
    >>> squared_rows(A, B, dA, dB)  # the row is 3 * (5, 0) + 7 * (1, 2)
    tensor([680.])
    """

    paper: ClassVar[str] = "arXiv:2502.14538"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Perturbed}

    sigma: NonNegative = 0.03
    beta: NonNegative = 0.01
    grad_through_noise: bool = False
    seed: int = 0

    def adapter(self, target: Target) -> Adapter:
        """A low-rank product that can be perturbed."""
        if target.site.read and (self.sigma or self.beta):
            raise TargetError(
                f"LoRAGGPO: {target.name!r} is used without a call of its layer, so noise cannot act on it. Leave it "
                "out with exclude_modules, or use LoRA."
            )
        made: Any = super().adapter(target)
        made.noisy, made.through_noise = bool(self.sigma or self.beta), self.grad_through_noise
        return made

    def on_train_batch_start(self, training: Training) -> None:
        """Let the noise of this step act."""
        for path, _, adapter in training.adapters():
            adapter.seed = zlib.crc32(f"{self.seed}/{training.step}/{path}".encode())

    def on_after_optimizer_step(self, training: Training) -> None:
        """Measure the strength of the next."""
        for _, _, adapter in training.adapters():
            adapter.seed = None
            adapter.measure(self.sigma, self.beta)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Those of LoRA, one with noise that gradients see."""
        plain, other = super().examples()
        return plain, cls(r=other.r, sigma=0.1, grad_through_noise=True, modules_to_save="head")
