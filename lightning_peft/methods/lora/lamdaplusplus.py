"""LaMDA++: LaMDA whose ranks follow the spectra of the weights, under a budget for all layers together.

Paper:    Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", 2024,
          arXiv:2406.12832.
Formula:  as LaMDA with a rank r_l for each layer l, sum of r_l = L r over the L layers; rank by rank goes to the layer
          with the lowest e_l = sum of the first r_l sigma_i^2 over the sum of all of them
Shapes:   as LaMDA; 1 <= r_l <= min(d_in, d_out)
Init:     as LaMDA; y starts as the base
Merge:    as LaMDA
Schedule: as LaMDA; in all layers the last column of B is frozen at the same step. The ranks never change
Deviates from the paper: it gives no code and no exact rule for the ranks; this rule is ours. s is the same in all
          layers, that of the mean rank r.
"""

import heapq
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.core import CoreOnFixed, CoreOnFixedConv
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetError, check_range, register
from lightning_peft.methods.lora.lamda import LaMDA


class CoreOfItsRank(CoreOnFixed):
    """As in LaMDA, of a rank that the weights decide."""

    rank_axes: ClassVar[dict[str, tuple[int, ...]]] = {
        "lora_A": (0,),
        "lora_N": (0, 1),
        "start_N": (0, 1),
        "lora_B": (1,),
        "start_B": (1,),
    }


class CoreOfItsRankConv(CoreOfItsRank, CoreOnFixedConv):
    """The same for convolutions."""


@register("lamdaplusplus")
@dataclass(frozen=True, kw_only=True)
class LaMDAPlusPlus(LaMDA):
    """LaMDA that gives more rank to the weights whose spectra fall slowly.

    Layers that are injected later, under the same name, share a budget of their own.

    Args:
        r: mean rank of all layers.
        rank_pattern: must be empty.
        clip_rank: lower the budget to what all layers together can use, in place of raising.
        freeze_until: see `LaMDA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``rank_pattern`` is given, or an argument is out of range.
        TargetError: weights have no values yet (meta device), layers cannot use a mean rank of r, or see `LoRA`.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    >>> base[0].weight.data = torch.diag(torch.tensor([9.0, 1.0, 1.0]))
    >>> base[1].weight.data = torch.diag(torch.tensor([5.0, 5.0, 5.0]))
    >>> model = inject(base, LaMDAPlusPlus(r=2))  # one keeps 81 / 83 with its first triplet, the other 25 / 75
    >>> [len(layer.adapters["default"].lora_A) for layer in model]
    [1, 3]
    """

    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": CoreOfItsRank, "conv": CoreOfItsRankConv}

    def __post_init__(self) -> None:
        super().__post_init__()
        none = "empty: the spectra decide; LaMDA takes ranks that are given"
        check_range("LaMDAPlusPlus", "rank_pattern", self.rank_pattern, not self.rank_pattern, none)

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """One for each of ``targets``, of the rank that it has among them."""
        made: list[Any] = [
            self.adapter_types[target.site.kind](target, r, self.scaling(target), self.dropout)
            for target, r in zip(targets, self.ranks(targets), strict=True)
        ]
        for adapter in made:
            adapter.start = self.start
        return made

    def ranks(self, targets: list[Target]) -> list[int]:
        """The rank of each of ``targets``."""
        spectra = []
        for target in targets:
            weight = Layer(target.module, target.site).weight.detach().flatten(1)
            if weight.is_meta:
                raise TargetError(
                    f"LaMDAPlusPlus: ranks follow from the weights, and {target.name!r} has no values yet (meta "
                    "device). Load the base first, or give the ranks to LaMDA(rank_pattern=...)."
                )
            spectra.append(torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32))))
        budget, most = self.r * len(targets), sum(map(len, spectra))
        if budget > most and not self.clip_rank:
            raise TargetError(
                f"LaMDAPlusPlus: a mean rank of r={self.r} is more than these {len(targets)} layers can use, "
                f"{most / len(targets):.1f}. Lower r, or set clip_rank=True."
            )
        return allocated(spectra, min(budget, most))

    def rank(self, target: Target) -> int:
        """The mean rank, which the scaling is for."""
        return self.r

    def num_trainable(self, target: Target) -> int:
        """r_l * (d_out + r_l)."""
        return super().num_trainable(target)

    def total_trainable(self, targets: list[Target]) -> int:
        """The sum of it."""
        return sum(r * (target.d_out + r) for target, r in zip(targets, self.ranks(targets), strict=True))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Of a shared budget, and of one that one layer has for itself."""
        return cls(r=2, freeze_until=0.5), cls(r=2, alpha=6.0, target_modules="v_proj", modules_to_save="head")


def allocated(spectra: list[Tensor], budget: int) -> list[int]:
    """Ranks from 1 on: the layer that keeps the lowest share of its energy gets the next, up to ``budget`` in all."""
    energy = [values.double().square().cumsum(0) for values in spectra]
    kept = [(own / own[-1] if own[-1] > 0 else torch.ones_like(own)).tolist() for own in energy]
    ranks = [1] * len(spectra)
    waiting = [(shares[0], i) for i, shares in enumerate(kept) if len(shares) > 1]
    heapq.heapify(waiting)
    for _ in range(budget - len(spectra)):
        _, i = heapq.heappop(waiting)
        ranks[i] += 1
        if ranks[i] < len(kept[i]):
            heapq.heappush(waiting, (kept[i][ranks[i] - 1], i))
    return ranks
