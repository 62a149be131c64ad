"""Low-rank products with a trained core: a weight change B N A."""

import math

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Layer, Target


class Core(LowRank):
    """``delta = scaling * B N A``: lora_N (r, r) between the factors of `LowRank`."""

    lora_N: nn.Parameter

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.lora_N = target.new_parameter(r, r)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """A and B as in `LowRank`; ``lora_N ~ U(-1/sqrt(r), 1/sqrt(r))``."""
        super().reset_parameters(layer, generator)
        random = torch.empty(self.lora_N.shape, dtype=self.lora_N.dtype)
        self.lora_N.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and scaling * B N."""
        return self.lora_A, self.scaling * self.lora_B @ self.lora_N


class CoreConv(Core, LowRankConv):
    """The same for convolutions."""
