"""EVA: start A at the principal components of the inputs, and give each layer the rank that its inputs need.

Paper:    Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024,
          arXiv:2410.07170.
Formula:  as LoRA; lora_A holds the first r_l principal components of the inputs of layer l
Shapes:   lora_A (r_l, d_in), lora_B (d_out, r_l); the sum of all r_l is that of LoRA, none is above rho * r
Init:     lora_B = 0; y starts as the base
Merge:    as LoRA
Schedule: components are measured before training; those of all layers that explain the largest share of the variance
          of their layer are kept
Deviates from HF PEFT: each layer keeps one component at least, where HF takes the adapter off a layer that wins none;
          each batch is seen once, and layers with one input are measured one by one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import Adapter, Calibration, Kind, register
from lightning_peft.engine.limits import OneOrMore
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.spectrum import PrincipalComponents


class Redistributed(LowRank):
    """A low-rank product whose rank is chosen on data."""

    rank_axes: ClassVar[dict[str, tuple[int, ...]]] = {"lora_A": (0,), "lora_B": (1,)}


@register("eva")
@dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
    """LoRA that looks where the inputs of each layer vary, measured on training data.

    Args:
        rho: the highest rank of a layer is ``rho * r``; 1 gives all layers the same.
        whiten: divide each component by the root of its singular value, as the authors do for vision.
        r: mean rank; see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range; there is no data, or what is measured is not finite.
        TargetError: see `LoRA`.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import calibrate
    >>> model = inject(nn.Sequential(nn.Linear(3, 2)), EVA(r=1))
    >>> x = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    >>> calibrate(model, [lambda: model(x).sum()])
    >>> model[0].adapters["default"].lora_A.abs().round(decimals=4).tolist()  # the inputs vary along the first axis
    [[1.0, 0.0, 0.0]]
    """

    paper: ClassVar[str] = "arXiv:2410.07170"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Redistributed}
    calibrated: ClassVar[bool] = True

    rho: OneOrMore = 2.0
    whiten: bool = False

    @torch.no_grad()
    def calibrate(self, calibration: Calibration) -> None:
        """Measure the components of all inputs, and share the ranks out."""
        found: dict[nn.Module, PrincipalComponents] = {}
        layers: list[Any] = calibration.adapters()
        for _, module, adapter in layers:
            (r, d_in), d_out = adapter.lora_A.shape, len(adapter.lora_B)
            found[module] = PrincipalComponents(min(int(self.rho * r), d_in, d_out))
        calibration.observe_inputs(lambda module, x: found[module].add(x))
        shares = [calibration.measured("variance of the input", path, found[m].shares) for path, m, _ in layers]
        budget = sum(len(adapter.lora_A) for _, _, adapter in layers)
        for (_, module, adapter), r in zip(layers, allocated(shares, budget), strict=True):
            components = found[module].components[:r]
            if self.whiten:
                values = found[module].values[:r, None]
                components = components / values.clamp_min(1e-6 * values[0]).sqrt()
            adapter.resize(r)
            adapter.lora_A.copy_(components)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With ranks shared out, and without."""
        return cls(r=2), cls(r=1, rho=1.0, whiten=True, modules_to_save="head")


def allocated(shares: list[Tensor], budget: int) -> list[int]:
    """How many of its descending ``shares`` each list keeps: the first of each, and the largest of the rest."""
    ranks = [1] * len(shares)
    rest = sorted(((-float(share), i) for i, own in enumerate(shares) for share in own[1:]))
    for _, i in rest[: budget - len(shares)]:
        ranks[i] += 1
    return ranks
