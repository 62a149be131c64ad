"""Bottlenecks without an activation, before or behind a linear layer: merging folds them away."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, AdapterError, Layer, Target


@dataclass(frozen=True)
class Place(Target):
    """Where a linear map sits.

    Args:
        first: name of the target whose adapter holds the matrices.
        before: whether it changes the input of the layer, not the output.
        shifted: how many equal parts the output has, and which of them are keys or values.
    """

    first: str = ""
    before: bool = False
    shifted: tuple[int, tuple[int, ...]] = (1, ())

    @property
    def width(self) -> int:
        """Features of what is changed."""
        return self.d_in if self.before else self.d_out


class LinearBottleneck(Adapter):
    """``a(x) = x + s (U dropout(D x + c) + e)`` before or behind a linear layer, which it can be folded into.

    Of keys and values, channels are taken from the frames before and behind: the first d / shift_div of them, and as
    many that follow.

    Args:
        target: where.
        r: width of the bottleneck.
        first: holds D (r, d), c (r,), U (d, r) and e (d,); None if that is this one.
        scaling: s.
        dropout: probability of dropping a feature of the bottleneck, in training only.
        frames: images of a clip, which follow one another in the batch; None for images by themselves.
        shift_div: the share of channels that look back, and of those that look ahead, is one over this.
    """

    def __init__(
        self,
        target: Place,
        r: int,
        first: "LinearBottleneck | None" = None,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        frames: int | None = None,
        shift_div: int = 1,
    ) -> None:
        super().__init__()
        self.before, self.dropout, self.scaling = target.before, dropout, scaling
        self.frames, self.shift_div = frames or 1, shift_div
        self.parts, self.shifted = target.shifted
        # in a tuple, or it would be a child, with its parameters
        self.first = () if first is None else (first,)
        if first is None:
            d = target.width
            self.down, self.down_bias = target.new_parameter(r, d), target.new_parameter(r)
            self.up, self.up_bias = target.new_parameter(d, r), target.new_parameter(d)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """D by Kaiming's rule, the rest zero."""
        if not self.first:
            random = torch.empty(self.down.shape, dtype=self.down.dtype)
            self.down.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
            for parameter in (self.up, self.down_bias, self.up_bias):
                parameter.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """layer(a(x)) or a(layer(x)), shifted over frames."""
        y = layer(self.changed(x)) if self.before else self.changed(layer(x))
        return self.shift(y) if self.frames > 1 and self.shifted else y

    def changed(self, x: Tensor) -> Tensor:
        """a(x)."""
        holder = self.first[0] if self.first else self
        down, c, up, e = (p.to(x.dtype) for p in (holder.down, holder.down_bias, holder.up, holder.up_bias))
        h = F.dropout(F.linear(x, down, c), self.dropout, self.training)
        return x + (self.scaling * F.linear(h, up, e)).to(x.dtype)

    def shift(self, y: Tensor) -> Tensor:
        """``y`` (B * frames, ..., d_out) with channels of keys and values from the frames around."""
        if len(y) % self.frames:
            raise AdapterError(
                f"{type(self).__name__}: a batch of {len(y)} is no whole number of clips of {self.frames} frames. Give "
                "the frames of each clip one after the other, or set frames= to their number."
            )
        clips = y.unflatten(0, (-1, self.frames))  # (B, T, ..., d_out)
        out, width = clips.clone(), y.shape[-1] // self.parts
        for part in self.shifted:
            here, n = part * width, width // self.shift_div
            out[:, 1:, ..., here : here + n] = clips[:, :-1, ..., here : here + n]
            out[:, :-1, ..., here + n : here + 2 * n] = clips[:, 1:, ..., here + n : here + 2 * n]
        return out.flatten(0, 1)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The map is folded into the layer, on the side where it is."""
        holder = self.first[0] if self.first else self
        down, c, up, e = (p.to(weight.dtype) for p in (holder.down, holder.down_bias, holder.up, holder.up_bias))
        if self.before:
            shift = self.scaling * weight @ (up @ c + e)
            return weight + self.scaling * (weight @ up) @ down, shift if bias is None else bias + shift
        h = c if bias is None else down @ bias + c
        shift = self.scaling * (up @ h + e)
        return weight + self.scaling * up @ (down @ weight), shift if bias is None else bias + shift

    def unmergeable_because(self) -> str | None:
        """The shift is no change of weights; and a bias is needed."""
        if self.frames > 1 and self.shifted:
            return "its shift of keys and values over frames is no change of weights."
        return None if self.site.bias else "its layer has no bias that could take its constant part."
