"""Offsets of attention heads, at the input of the output projection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft import kernels
from lightning_peft.engine import Adapter, Layer, Target


@dataclass(frozen=True)
class HeadTarget(Target):
    """An output projection that ``n_heads`` heads write to."""

    n_heads: int = 1


class HeadOffset(Adapter):
    """Scales the input of an output projection before heads are chosen, and shifts it in those of them after.

    One tensor ``offset`` (n_heads, d_head) does both, first as ``(1 + offset) * z``, then as ``z + offset``.
    """

    kept: Tensor
    chosen: Tensor

    def __init__(self, target: HeadTarget, init_std: float) -> None:
        super().__init__()
        self.init_std = init_std
        self.offset = target.new_parameter(target.n_heads, target.d_in // target.n_heads)
        like = self.offset.detach()
        self.register_buffer("kept", like.new_ones(target.n_heads))  # 1 for the heads that are shifted, else 0
        self.register_buffer("chosen", like.new_zeros(()))  # 1 behind the choice

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """A, of all heads."""
        self.kept.fill_(1)
        self.chosen.zero_()
        self.draw(generator)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Small random numbers for the heads that are kept."""
        random = torch.randn(self.offset.shape, dtype=self.offset.dtype, generator=generator)
        self.offset.copy_(self.init_std * random.to(self.kept.device) * self.kept[:, None])

    def change(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (d_in,) of the input."""
        vector = self.offset.flatten()
        kept = (self.kept[:, None] * self.chosen).expand_as(self.offset).flatten()
        return 1 + (1 - self.chosen) * vector, kept * vector

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """layer(scale * x + shift)."""
        return layer(kernels.scale_shift(x, *self.change()))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns times scale; the shift through the weight goes to the bias."""
        scale, shift = (vector.to(weight.dtype) for vector in self.change())
        through = weight @ shift
        return weight * scale, through if bias is None else bias + through

    def unmergeable_because(self) -> str | None:
        """It needs a bias."""
        return None if self.site.bias else "its layer has no bias that could take the offset."
