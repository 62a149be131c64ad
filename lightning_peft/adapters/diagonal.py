"""Products with a diagonal between their factors, B diag(z) A."""

from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import Target


class Diagonal(LowRank):
    """``delta = scaling * B diag(z) A``: lora_z (r,) beside the factors of `LowRank`."""

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.lora_z = target.new_parameter(r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r, d_in, ...) and (d_out, r), the diagonal and the scaling in the second."""
        return self.lora_A, self.scaling * self.lora_B * self.lora_z
