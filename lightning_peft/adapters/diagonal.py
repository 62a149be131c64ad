"""Products with a diagonal between their factors, B diag(z) A."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Layer, Target


class Diagonal(LowRank):
    """``delta = scaling * B diag(z) A``: lora_z (r,) beside the factors of `LowRank`."""

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.lora_z = target.new_parameter(r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r, d_in, ...) and (d_out, r), the diagonal and the scaling in the second."""
        return self.lora_A, self.scaling * self.lora_B * self.lora_z


class GivenFactors(LowRank):
    """Products whose factors are buffers, lora_A (r, d_in, ...) and lora_B (d_out, r): what trains lies between."""

    lora_A: Tensor  # type: ignore[assignment]
    lora_B: Tensor  # type: ignore[assignment]

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.fix("lora_A")
        self.fix("lora_B")


class GivenDiagonal(GivenFactors):
    """``delta = scaling * B diag(z - z_0) A``: z, lora_z (r,), is all that trains.

    ``start(weight, r)`` gives A (r, d_in), z_0 (r,) and B (d_out, r) for a weight (d_out, d_in).
    """

    start: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
    start_z: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.lora_z = target.new_parameter(r)
        self.register_buffer("start_z", torch.zeros_like(self.lora_z))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """What ``start`` says."""
        A, z, B = self.start(layer.weight.detach().flatten(1).to(self.lora_A.dtype), len(self.lora_z))
        self.lora_A.copy_(A.view_as(self.lora_A))
        self.lora_B.copy_(B)
        self.lora_z.copy_(z)
        self.start_z.copy_(z)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r, d_in, ...) and (d_out, r), the change of the diagonal and the scaling in the second."""
        return self.lora_A, self.scaling * self.lora_B * (self.lora_z - self.start_z)


class GivenDiagonalConv(LowRankConv, GivenDiagonal):
    """The same for convolutions; the weight is flattened to (c_out, c_in / groups * kernel) for the start."""
