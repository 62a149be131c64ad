"""SoMA: train the minor part of a weight, so that what it knows best stays as it is.

Paper:    Yun et al., "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable
          Representation Learning", 2024, arXiv:2412.04077; the same start as MiLoRA (Wang et al., 2024,
          arXiv:2406.09044).
Formula:  as PiSSA, with the r last singular triplets of W in place of the leading ones
Shapes:   as PiSSA
Init:     A_0 = diag(sqrt(sigma / s)) V^T, B_0 = U diag(sqrt(sigma / s)) of the last r; y starts as the base
Merge:    as PiSSA
Cost:     a second pair of thin products
Deviates from the paper: which blocks are adapted is said with ``layers_to_transform``, and an annealed weight decay is
          a matter of the scheduler.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.engine import check_range, register
from lightning_peft.methods.lora.pissa import PiSSA
from lightning_peft.parts.spectrum import svd


@register("soma")
@dataclass(frozen=True, kw_only=True)
class SoMA(PiSSA):
    """LoRA that starts at the smallest singular triplets of each weight.

    Args:
        niter: must be None: a randomised decomposition finds the leading triplets, so it would be PiSSA.
        r: see `PiSSA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``niter`` is given, or an argument is out of range.

    >>> from torch import nn, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> adapter = inject(base, SoMA(r=1))[0].adapters["default"]
    >>> product = adapter.lora_B @ adapter.lora_A
    >>> allclose(torch.linalg.svdvals(product)[0], torch.linalg.svdvals(base[0].weight)[-1], atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2412.04077"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("SoMA", "niter", self.niter, self.niter is None, "None: only an exact decomposition finds the last")

    def start(self, weight: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A_0 (r, d_in) and B_0 (d_out, r) of the smallest part."""
        U, values, Vh = svd(weight)
        root = values[-r:].sqrt()
        return root[:, None] * Vh[-r:], U[:, -r:] * root

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With a scaling, and with a head."""
        return cls(r=2, alpha=4.0), cls(r=1, modules_to_save="head")
