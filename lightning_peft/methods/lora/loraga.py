"""LoRA-GA: start where the first steps go along the gradient of full fine-tuning.

Paper:    Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000.
Formula:  G = U diag(sigma) V^T, the mean gradient of W; A_0 = c V_[1..r]^T, B_0 = c U_[r+1..2r],
          c = d_out^(1/4) / sqrt(gamma)
Shapes:   G (d_out, d_in); lora_A (r, d_in), lora_B (d_out, r)
Init:     as above, acting as if the product started at zero; y starts as the base
Merge:    as PiSSA
Schedule: G is measured before training
Cost:     a second pair of thin products
Deviates from HF PEFT: it gives B the singular values of the gradient; here both factors have the size of the paper.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from lightning_peft.adapters.low_rank import MeasuredStart
from lightning_peft.engine import Adapter, Calibration, Kind, Target, TargetError, register
from lightning_peft.engine.limits import Count, Positive
from lightning_peft.methods.lora.pissa import PiSSA
from lightning_peft.parts.spectrum import leading_svd


@register("loraga")
@dataclass(frozen=True, kw_only=True)
class LoRAGA(PiSSA):
    """LoRA that starts along the gradient, measured on training data.

    Args:
        gamma: the larger, the smaller the start (``"stable"`` scaling of the paper).
        alpha: numerator of ``scaling``.
        niter: see `PiSSA`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range; there is no data, or a gradient is missing or not finite.
        TargetError: 2 r is more than a layer can use.

    >>> from torch import nn, ones
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import calibrate
    >>> model = inject(nn.Sequential(nn.Linear(3, 2)), LoRAGA(r=1))
    >>> calibrate(model, [lambda: model(ones(4, 3)).square().mean()])
    >>> adapter = model[0].adapters["default"]  # the gradient is along the input
    >>> torch.allclose(adapter.lora_A.abs(), adapter.lora_A.abs().mean().expand(1, 3))
    True
    """

    paper: ClassVar[str] = "arXiv:2407.05000"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": MeasuredStart}
    calibrated: ClassVar[bool] = True

    r: Count = 8
    alpha: Positive | None = 16.0
    gamma: Positive = 16.0

    def rank(self, target: Target) -> int:
        """The rank of the update; each factor needs as many directions of its own."""
        r = super().rank(target)
        return max(1, min(r, min(target.d_in, target.d_out) // 2)) if self.clip_rank else r

    def adapter(self, target: Target) -> Adapter:
        """The product, if there are as many directions as it needs."""
        needed = 2 * self.rank(target)
        if needed > min(target.d_in, target.d_out):
            raise TargetError(
                f"LoRAGA: {target.name!r} ({target.d_out} x {target.d_in}) has fewer than 2 r = {needed} "
                "directions. Lower r, give it its own in rank_pattern, or set clip_rank=True."
            )
        return super().adapter(target)

    def calibrate(self, calibration: Calibration) -> None:
        """Measure G for each layer, and decompose it."""
        gradients = calibration.gradients()
        starts: list[Any] = []
        for path, _, adapter in calibration.each():
            gradient = calibration.measured("gradient", path, gradients.get(path))
            r = len(adapter.lora_A)
            U, _, Vh = leading_svd(gradient, 2 * r, self.niter, torch.Generator())
            c = float(adapter.scaling) ** 0.5 * len(gradient) ** 0.25 / self.gamma**0.5
            starts.append((adapter, c * Vh[:r], c * U[:, r:]))
        for adapter, A, B in starts:
            adapter.restart(A, B)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With the usual size, and larger."""
        return cls(r=2), cls(r=1, gamma=4.0, modules_to_save="head")
