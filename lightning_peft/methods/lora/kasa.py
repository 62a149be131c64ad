"""KaSA: take the noise out of a weight, and add a product whose singular values are trained.

Paper:    Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", 2024,
          arXiv:2412.06071.
Formula:  y = (W - U_r diag(sigma_r) V_r^T) x + b + s B diag(z) A dropout(x),  the r last singular triplets of W,
          loss + beta * mean of |z|^2 + gamma * mean of (||A A^T - I||_F + ||B^T B - I||_F), both over layers
Shapes:   lora_A, noise_A (r, d_in); lora_B, noise_B (d_out, r); lora_z (r,);
          a convolution is flattened to (c_out, c_in * kernel)
Init:     lora_A as LoRA, lora_B = 0, lora_z ~ N(0, 1); y starts as the base less its r smallest components
Merge:    W <- W - U_r diag(sigma_r) V_r^T + s B diag(z) A
Schedule: the gradients of the penalties are added once for each optimizer step, however many batches it has
Cost:     a second pair of thin products; two products (r, r) per layer for the penalty
Deviates from the authors' code: what is taken out is kept beside the weight, so that the base stays bit for bit as it
          is; the r smallest of min(d_in, d_out) triplets are taken out, as the paper says, not all beyond the first
          d_in - r; ||A A^T - I|| and ||B^T B - I|| in place of the large ||A^T A - I|| and ||B B^T - I||, which have
          the same minimum.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.diagonal import Diagonal
from lightning_peft.adapters.low_rank import LowRankConv, dense, difference
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetError, Training, register
from lightning_peft.engine.limits import NonNegative
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.spectrum import orthonormality, svd


class Denoised(Diagonal):
    """A product with a trained diagonal, on a weight that has lost its r smallest singular components."""

    noise_A: Tensor
    noise_B: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.register_buffer("noise_A", torch.zeros_like(self.lora_A))
        self.register_buffer("noise_B", torch.zeros_like(self.lora_B))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As LoRA, ``lora_z ~ N(0, 1)``; the noise is the smallest part of the weight below."""
        super().reset_parameters(layer, generator)
        self.lora_z.copy_(torch.randn(self.lora_z.shape, dtype=self.lora_z.dtype, generator=generator))
        r = len(self.lora_z)
        U, values, Vh = svd(layer.weight.detach().flatten(1).to(self.lora_A.dtype))
        self.noise_A.copy_((values[-r:, None] * Vh[-r:]).view_as(self.noise_A))
        self.noise_B.copy_(U[:, -r:])

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone; dropout does not bring the noise back."""
        noise = self.through(x.to(self.noise_A.dtype), layer, self.noise_A, self.noise_B)
        return super().product(x, layer) - noise

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """The product beside the noise, which is taken off."""
        return difference(self.factors(), (self.noise_A, self.noise_B))

    def delta(self) -> Tensor:
        """(d_out, d_in, ...)."""
        return super().delta() - dense(self.noise_A, self.noise_B)


class DenoisedConv(LowRankConv, Denoised):
    """The same for convolutions."""


@register("kasa")
@dataclass(frozen=True, kw_only=True)
class KaSA(LoRA):
    """LoRA with trained singular values, on weights whose smallest singular components are left out.

    The model does not start as the base. The base itself stays as it is, and comes back when the method is disabled.

    Args:
        beta: weight in the loss of the squared singular values lora_z; 0 switches it off.
        gamma: weight in the loss of the distance of A and B from orthonormal ones; 0 switches it off.
        r: rank of the update, and number of components that are left out.
        alpha: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``beta`` or ``gamma`` is negative, or an argument of `LoRA` is out of range.
        TargetError: the rank is not below min(d_in, d_out) of a layer, so that nothing of it would be left; see `LoRA`.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 3, bias=False))
    >>> U, values, Vh = torch.linalg.svd(base[0].weight)
    >>> _ = inject(base, KaSA(r=1))
    >>> allclose(base(ones(1, 4)), ones(1, 4) @ (U[:, :2] * values[:2] @ Vh[:2]).T, atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2412.06071"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Denoised, "conv": DenoisedConv}
    identity_at_init: ClassVar[bool] = False

    beta: NonNegative = 1e-4
    gamma: NonNegative = 1e-3

    def rank(self, target: Target) -> int:
        """The rank of the update; a lowered one leaves something of the weight."""
        r = super().rank(target)
        return max(1, min(r, min(target.d_in, target.d_out) - 1)) if self.clip_rank else r

    def adapter(self, target: Target) -> Adapter:
        """A product on a weight of which something is left."""
        if self.rank(target) == min(target.d_in, target.d_out):
            raise TargetError(
                f"KaSA: r={self.rank(target)} takes everything out of {target.name!r} ({target.d_out} x "
                f"{target.d_in}). Lower r, give the layer its own in rank_pattern, set clip_rank=True, or name it in "
                "exclude_modules."
            )
        return super().adapter(target)

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """beta * mean of |z|^2, and gamma * mean of the distances."""
        adapters = [adapter for _, _, adapter in training.adapters()]
        found = {}
        if self.beta and adapters:
            found["singular_values"] = self.beta * torch.stack([a.lora_z.square().sum() for a in adapters]).mean()
        return found | orthonormality(training, 2 * self.gamma)  # which is the mean over both factors of each layer

    def num_trainable(self, target: Target) -> int:
        """r * (d_in + d_out + 1)."""
        return super().num_trainable(target) + self.rank(target)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """As it comes, and without penalties."""
        return cls(r=2), cls(r=1, alpha=4.0, beta=0.0, gamma=0.0, modules_to_save="head")
