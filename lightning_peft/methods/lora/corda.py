"""CorDA: start at the part of a weight that matters most, or least, for the inputs that a layer sees.

Paper:    Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024,
          arXiv:2406.05223.
Formula:  W C = U diag(sigma) V^T, so W = U diag(sigma) V^T C^-1; the product starts at r of these triplets
Shapes:   C (d_in, d_in), x^T x over the inputs of the layer, its mean diagonal 1; lora_A (r, d_in), lora_B (d_out, r)
Init:     A_0 = diag(sqrt(sigma / s)) V^T C^-1, B_0 = U diag(sqrt(sigma / s)); y starts as the base
Merge:    as PiSSA
Schedule: C is measured before training; each batch is divided by its largest absolute entry, as the authors' code
          means to do (it takes the largest entry)
Cost:     a second pair of thin products; while it is measured, C of all layers
Deviates from the authors' code: that leaves C its size, which says how large B_0 is beside A_0, and nothing else.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import MeasuredStart
from lightning_peft.engine import Adapter, Calibration, Kind, check_range, register
from lightning_peft.engine.limits import Positive
from lightning_peft.methods.lora.pissa import PiSSA
from lightning_peft.parts.spectrum import svd

Mode = Literal["ipm", "kpm"]


@register("corda")
@dataclass(frozen=True, kw_only=True)
class CorDA(PiSSA):
    """PiSSA in the metric of the inputs, measured on training data.

    Args:
        mode: ``"ipm"`` (instruction-previewed) starts at the leading triplets and is calibrated on data of the new
            task; ``"kpm"`` (knowledge-preserved) at the last ones, on data of what is to be kept.
        damping: share of the mean diagonal that is added to C; doubled until C can be inverted.
        niter: must be None, as the decomposition is exact.
        r: see `PiSSA`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range; there is no data, or what is measured is not finite.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import calibrate
    >>> model, x = inject(nn.Sequential(nn.Linear(3, 2)), CorDA(r=1)), torch.eye(3)
    >>> calibrate(model, [lambda: model(x).sum()])  # these inputs prefer no direction: it is PiSSA
    >>> product = model[0].adapters["default"].lora_B @ model[0].adapters["default"].lora_A
    >>> torch.allclose(torch.linalg.svdvals(product)[0], torch.linalg.svdvals(model[0].weight)[0])
    True
    """

    paper: ClassVar[str] = "arXiv:2406.05223"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": MeasuredStart}
    calibrated: ClassVar[bool] = True

    mode: Mode = "ipm"
    damping: Positive = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("CorDA", "niter", self.niter, self.niter is None, "None: the decomposition is exact")

    def calibrate(self, calibration: Calibration) -> None:
        """Measure C for each layer, and decompose W C."""
        sums: dict[nn.Module, Tensor] = {}

        def observe(module: nn.Module, x: Tensor) -> None:
            x = x / x.abs().max().clamp_min(1e-12)
            sums[module] = sums.get(module, 0) + x.T @ x

        calibration.observe_inputs(observe)
        starts: list[Any] = []
        for path, module, adapter in calibration.each():
            C = calibration.measured("input", path, sums.get(module)).double()
            weight = calibration.weight(module, adapter).double()
            starts.append((adapter, *self._decomposed(weight, C, len(adapter.lora_A))))
        for adapter, A, B in starts:
            adapter.restart(A, B)

    def _decomposed(self, weight: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
        C, eye, damping = C / C.diagonal().mean(), torch.eye(len(C)).to(C), self.damping
        while True:
            damped = C + damping * eye
            inverse = torch.linalg.pinv(damped)
            if (damped @ inverse - eye).norm() < 0.05:
                break
            damping *= 2
        U, values, Vh = svd(weight @ damped)
        chosen = slice(r) if self.mode == "ipm" else slice(len(values) - r, None)
        root = values[chosen].sqrt()
        return root[:, None] * (Vh[chosen] @ inverse), U[:, chosen] * root

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Both modes."""
        return cls(r=2), cls(r=2, mode="kpm", alpha=4.0)
