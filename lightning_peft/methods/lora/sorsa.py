"""SORSA: train singular values and singular vectors of a weight, and hold the vectors orthonormal.

Paper:    Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
          Models", 2024, arXiv:2409.00055.
Formula:  y = (W - s B_0 diag(z_0) A_0) x + b + s B diag(z) A dropout(x),
          loss + gamma * R,  R = mean of ||A A^T - I||_F and ||B^T B - I||_F over all factors of all layers
Shapes:   lora_A, start_A (r, d_in); lora_B, start_B (d_out, r), z_0 in start_B; lora_z (r,);
          a convolution is flattened to (c_out, c_in * kernel)
Init:     A_0 = V_r^T, B_0 = U_r, z_0 = sigma_r, the r leading singular triplets of W; y starts as the base, R = 0
Merge:    W <- W + s (B diag(z) A - B_0 diag(z_0) A_0)
Schedule: the gradient of gamma * R is added once for each optimizer step, however many batches it has
Example:  {"r": 8}
Cost:     a second pair of thin products; two products (r, r) per layer for the penalty
Deviates from the authors' code: the first product is kept beside the weight, not taken out of it, and dropout falls on
          both products; gamma is the weight in the loss, where theirs is that weight times the highest learning rate;
          R is added before gradients are clipped.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.diagonal import Diagonal
from lightning_peft.adapters.low_rank import LowRankConv, Recentred
from lightning_peft.engine import Adapter, Kind, Layer, Target, Training, register
from lightning_peft.engine.limits import Count, NonNegative, Positive
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.spectrum import leading_svd, orthonormality


class SingularTriplets(Diagonal, Recentred):
    """Singular triplets of the weight below, all of them trained, that act as if they started at zero."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The r leading triplets."""
        weight = layer.weight.detach().flatten(1).to(self.lora_A.dtype)
        U, values, Vh = leading_svd(weight, len(self.lora_A), None, generator)
        self.lora_A.copy_(Vh.view_as(self.lora_A))
        self.lora_B.copy_(U)
        self.lora_z.copy_(values)
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B * self.lora_z)


class SingularTripletsConv(LowRankConv, SingularTriplets):
    """The same for convolutions."""


@register("sorsa")
@dataclass(frozen=True, kw_only=True)
class SORSA(LoRA):
    """LoRA from the leading singular triplets, their values in a vector of their own and their vectors regularised.

    Args:
        gamma: weight of R in the loss; 0 switches it off. The default is the authors' 4e-4 over their learning rate
            of 3e-5.
        alpha: numerator of ``scaling``, which is 1 by default.
        r: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``gamma`` is negative, or an argument of `LoRA` is out of range.
        TargetError: see `LoRA`.

    >>> from torch import nn, diag, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> U, values, Vh = torch.linalg.svd(base[0].weight)
    >>> adapter = inject(base, SORSA(r=2))[0].adapters["default"]
    >>> adapter.lora_z.data += 0.5
    >>> allclose(adapter.delta(), 0.5 * U[:, :2] @ Vh[:2], atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2409.00055"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": SingularTriplets, "conv": SingularTripletsConv}

    r: Count = 128
    alpha: Positive | None = None
    gamma: NonNegative = 13.3

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """gamma * R."""
        return orthonormality(training, self.gamma)

    def num_trainable(self, target: Target) -> int:
        """r * (d_in + d_out + 1)."""
        return super().num_trainable(target) + self.rank(target)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With a gentle penalty, and with a scaling and none."""
        return cls(r=2, gamma=0.1), cls(r=2, alpha=4.0, gamma=0.0, modules_to_save="head")
