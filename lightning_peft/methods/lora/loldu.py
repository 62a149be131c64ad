"""LoLDU: decompose a weight into a lower, a diagonal and an upper factor, and train the diagonal.

Paper:    Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
          Fine-Tuning", 2024, arXiv:2410.13618.
Formula:  y = W x + b + s P L_r diag(z - z_0) U_r dropout(x),  W = P L diag(d) U with partial pivoting,  s = alpha / r
Shapes:   lora_z, start_z (r,), lora_A (r, d_in), lora_B (d_out, r), of which lora_z alone is trained;
          a convolution is flattened to (c_out, c_in * kernel)
Init:     lora_A = U_r, unit upper triangular; lora_B = P L_r, L unit lower triangular; lora_z = start_z = d_r: the
          first r rows, columns and pivots; y starts as the base
Merge:    W <- W + s P L_r diag(z - z_0) U_r
Deviates from the authors' code: that takes s P L_r diag(z_0) U_r out of W and adds the trained product, which is the
          same function; of its starts for z there is d alone; where a pivot is zero, and U would not be finite, the
          row of U stays as elimination leaves it, with z_0 = 1.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.engine import register
from lightning_peft.engine.limits import Count, Positive
from lightning_peft.methods.lora.svfit import SVFit


@register("loldu")
@dataclass(frozen=True, kw_only=True)
class LoLDU(SVFit):
    """Trained pivots between the frozen triangular factors of each weight; SVFit with another decomposition.

    Pivots are not sorted: the first r of them belong to the first columns of the weight, not to its largest part.

    Args:
        r: how many pivots; trainable numbers per layer: r. Memory is that of a frozen LoRA of the same rank.
        alpha: numerator of ``scaling``; None makes it 1.
        clip_rank: see `SVFit`; so for the arguments that follow it.

    Raises:
        AdapterError: see `LoRA`.
        TargetError: see `LoRA`.

    >>> from torch import nn, tensor
    >>> from lightning_peft import inject, merge
    >>> base = nn.Sequential(nn.Linear(2, 2))
    >>> base[0].weight.data = tensor([[4.0, 2.0], [2.0, 6.0]])  # [[1, 0], [.5, 1]] diag(4, 5) [[1, .5], [0, 1]]
    >>> adapter = inject(base, LoLDU(r=1, alpha=3.0))[0].adapters["default"]
    >>> adapter.lora_z.data += 1  # adds 3 / 1 * [1, .5] outer [1, .5]
    >>> merge(base)[0].weight.tolist()
    [[7.0, 3.5], [3.5, 6.75]]
    """

    paper: ClassVar[str] = "arXiv:2410.13618"

    r: Count = 768
    alpha: Positive | None = 8.0

    def start(self, weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """U_r (r, d_in), d_r (r,) and P L_r (d_out, r) of a weight (d_out, d_in)."""
        P, L, U = torch.linalg.lu(weight)
        pivots = U.diagonal()
        d = pivots.where(pivots.abs() > 1e-8 * weight.abs().max(), torch.ones_like(pivots))
        return (U / d[:, None])[:r], d[:r], P @ L[:, :r]

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Some of the pivots, and all of them."""
        return cls(r=2), cls(alpha=None, modules_to_save="head")
