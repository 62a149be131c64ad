"""PEGO: a group of low-rank products, kept orthogonal to the weight and to one another.

Paper:    Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for
          Domain Generalization", 2024, arXiv:2407.15085.
Formula:  y = W x + b + s sum_i B_i A_i dropout(x);
          loss += weight * (sum_i |W D_i^T| + sum_{i<j} |D_i D_j^T|) for each layer; D_i = s B_i A_i, and |M| is the
          sum of the absolute values of the entries
Shapes:   lora_A (n * r, d_in) and lora_B (d_out, n * r): A_i is a block of r rows, B_i of r columns
Init:     as LoRA; y starts as the base
Merge:    W <- W + s B A, the sum over the group
Cost:     products (d_out, d_out) per layer for the penalty: n of W with each group, n (n - 1) / 2 among groups
"""

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, Kind, Layer, Target, Training, register
from lightning_peft.engine.limits import Count, NonNegative, Positive
from lightning_peft.methods.lora.lora import LoRA


@register("pego")
@dataclass(frozen=True, kw_only=True)
class PEGO(LoRA):
    """A group of ``n`` low-rank products in each layer, with a penalty on what they share.

    Args:
        n: products in the group.
        weight: of the penalty; 0 switches it off.
        r: rank of each of them; trainable numbers per layer: n * r * (d_in + d_out).
        alpha: numerator of s = alpha / (n * r), which is 1 by default.
        dropout: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``n`` or ``weight`` is out of range, or an argument of `LoRA` is.
        TargetError: see `LoRA`; the rank of the whole group, n * r, counts.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> method, base = PEGO(n=2, r=1), nn.Sequential(nn.Linear(2, 2))
    >>> base[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> adapter = inject(base, method)[0].adapters["default"]
    >>> adapter.lora_A.data, adapter.lora_B.data = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> method.overlap_with(base[0].weight, adapter).tolist(), method.overlap_within(adapter).tolist()
    (7.0, 0.0)
    """

    paper: ClassVar[str] = "arXiv:2407.15085"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": LowRank, "conv": LowRankConv}

    n: Count = 4
    weight: NonNegative = 1e-3
    r: Count = 4
    alpha: Positive | None = None

    def rank(self, target: Target) -> int:
        """The rank of the whole group: n * r."""
        r = super().rank(target)
        if self.clip_rank:
            r = max(1, min(r, min(target.d_in, target.d_out) // self.n))
        return self.n * r

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """Both overlaps, over all layers."""
        found = [(Layer(module, a.site).weight, a) for _, module, a in training.adapters()]
        if not self.weight or not found:
            return {}
        return {
            "preserve": self.weight * torch.stack([self.overlap_with(weight, a) for weight, a in found]).sum(),
            "diversify": self.weight * torch.stack([self.overlap_within(a) for _, a in found]).sum(),
        }

    def overlap_with(self, weight: Tensor, adapter: LowRank) -> Tensor:
        """sum_i |W D_i^T|; by thin products, no D_i is built."""
        w = weight.detach().flatten(1).to(adapter.lora_A.dtype)
        return torch.stack([((w @ A.T) @ B.T).abs().sum() for A, B in self._group(adapter)]).sum()

    def overlap_within(self, adapter: LowRank) -> Tensor:
        """sum_{i<j} |D_i D_j^T|, in the same way."""
        total = adapter.lora_A.new_zeros(())
        for (A, B), (other_A, other_B) in combinations(self._group(adapter), 2):
            total = total + (B @ (A @ other_A.T) @ other_B.T).abs().sum()
        return total

    def _group(self, adapter: LowRank) -> list[tuple[Tensor, Tensor]]:
        down, up = adapter.factors()
        return list(zip(down.flatten(1).chunk(self.n), up.chunk(self.n, dim=1), strict=True))

    def num_trainable(self, target: Target) -> int:
        """n * r * (d_in + d_out)."""
        return super().num_trainable(target)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Two products, and three with a strong penalty."""
        return cls(n=2, r=2), cls(n=3, r=1, weight=0.01, alpha=6.0, target_modules="v_proj", modules_to_save="head")
