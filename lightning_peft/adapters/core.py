"""Low-rank products with a trained core: a weight change B N A."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank, LowRankConv, Recentred
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


class StartedCore(Core):
    """A core product whose three factors start where ``start`` says.

    ``start(weight, r, generator)`` gives A (r, d_in), N (r, r) and B (d_out, r) for a weight (d_out, d_in).
    """

    start: Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    start_N: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.register_buffer("start_N", torch.zeros_like(self.lora_N))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The three factors, and the first core."""
        weight = layer.weight.detach().flatten(1).to(self.lora_A.dtype)
        A, N, B = self.start(weight, len(self.lora_A), generator)
        self.lora_A.copy_(A.view_as(self.lora_A))
        self.lora_N.copy_(N)
        self.lora_B.copy_(B)
        self.start_N.copy_(N)


class RecentredCore(StartedCore, Recentred):
    """``delta = scaling * (B N A - B_0 N_0 A_0)``: `Recentred` with a core."""

    start: Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]  # type: ignore[assignment]

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Both triples at the start."""
        super().reset_parameters(layer, generator)
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)

    def first_factors(self) -> tuple[Tensor, Tensor]:
        """A_0, and scaling * B_0 N_0."""
        return self.start_A, self.scaling * self.start_B @ self.start_N


class RecentredCoreConv(RecentredCore, CoreConv):
    """The same for convolutions."""


class CoreOnFixed(StartedCore):
    """A recentred core product on a fixed ``lora_A``; the first columns of ``lora_B`` can be held where they are."""

    start_B: Tensor
    held: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.fix("lora_A")
        self.register_buffer("start_B", torch.zeros_like(self.lora_B))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The three factors, the core over the scaling, and the first two of them again."""
        super().reset_parameters(layer, generator)
        self.lora_N.div_(self.scaling)
        self.start_N.copy_(self.lora_N)
        self.start_B.copy_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and scaling * (B N - B_0 N_0)."""
        return self.lora_A, self.scaling * (self.lora_B @ self.lora_N - self.start_B @ self.start_N)

    @torch.no_grad()
    def hold(self, n: int) -> None:
        """The coming step is not to move the first ``n`` columns of B."""
        self.held = self.lora_B[:, :n].clone()
        if self.lora_B.grad is not None:
            self.lora_B.grad[:, :n] = 0

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what weight decay and momentum did to them all the same."""
        held = self.__dict__.pop("held", None)
        if held is not None:
            self.lora_B[:, : held.shape[1]] = held


class CoreOnFixedConv(CoreOnFixed, CoreConv):
    """The same for convolutions."""
