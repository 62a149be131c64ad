"""Vectors that rescale the features of a layer."""

import torch
from torch import Tensor

from lightning_peft import kernels
from lightning_peft.engine import Adapter, Layer, Target


class Rescaling(Adapter):
    """Multiplies the output features or channels of a layer by a trained vector; or, of a linear one, its inputs.

    Args:
        target: which layer.
        on_input: rescale the input features in place of the output.
    """

    def __init__(self, target: Target, on_input: bool = False) -> None:
        super().__init__()
        self.on_input = on_input
        self.scale = target.new_parameter(target.d_in if on_input else target.d_out)
        self.axes_after = max(len(target.shape) - 2, 0)  # spatial axes behind the channels of an output

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """All ones."""
        self.scale.fill_(1)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """layer(x * scale) on the input, layer(x) * scale on the output."""
        if self.on_input:
            return layer(kernels.scale_shift(x, self.scale))
        y = layer(x)
        if not self.axes_after:
            return kernels.scale_shift(y, self.scale)
        return (y * self.scale[(..., *[None] * self.axes_after)]).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns times scale, or rows and bias times scale."""
        if self.on_input:
            return weight * self.scale, bias
        rows = self.scale[(..., *[None] * (weight.dim() - 1))]
        return weight * rows, None if bias is None else bias * self.scale
