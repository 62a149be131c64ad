"""PiSSA: train the principal part of a weight, the rest stays frozen.

Paper:    Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
          2024, arXiv:2404.02948.
Formula:  y = (W - s B_0 A_0) x + b + s B A x,  with s B_0 A_0 = U_r diag(sigma_r) V_r^T, the r leading triplets of W
Shapes:   lora_A, start_A (r, d_in); lora_B, start_B (d_out, r); a convolution is flattened to (c_out, c_in * kernel)
Init:     A_0 = diag(sqrt(sigma_r / s)) V_r^T, B_0 = U_r diag(sqrt(sigma_r / s)); y starts as the base
Merge:    W <- W + s (B A - B_0 A_0)
Cost:     a second pair of thin products
Deviates from the authors' code: the first product is kept beside the weight, not taken out of it, so that the base
          stays bit for bit as it is.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank import Recentred, RecentredConv
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count, Positive, WholeNumber
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.spectrum import leading_svd


@register("pissa")
@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    """LoRA that starts at the leading singular triplets of each weight, and acts as if it started at zero.

    Args:
        niter: refinements of a randomised decomposition, which is faster (4 is usual); exact by default.
        alpha: numerator of ``scaling``, which is 1 by default.
        r: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``niter`` is negative, or an argument of `LoRA` is out of range.
        TargetError: see `LoRA`.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> U, values, Vh = torch.linalg.svd(base[0].weight)
    >>> adapter = inject(base, PiSSA(r=2))[0].adapters["default"]
    >>> allclose(adapter.lora_B @ adapter.lora_A, U[:, :2] * values[:2] @ Vh[:2], atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2404.02948"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Recentred, "conv": RecentredConv}

    r: Count = 16
    alpha: Positive | None = None
    niter: WholeNumber | None = None

    def adapter(self, target: Target) -> Adapter:
        """A product that starts where `start` says."""
        adapter: Any = super().adapter(target)
        adapter.start = self.start
        return adapter

    def start(self, weight: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A_0 (r, d_in) and B_0 (d_out, r) for a weight (d_out, d_in)."""
        U, values, Vh = leading_svd(weight, r, self.niter, generator)
        root = values.sqrt()
        return root[:, None] * Vh, U * root

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Exact with a scaling, and randomised."""
        return cls(r=2, alpha=8.0), cls(r=2, niter=4, modules_to_save="head")
