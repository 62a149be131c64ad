"""Low-rank products: a weight change B A of rank r, for linear, convolution and embedding layers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, Layer, Target


class LowRank(Adapter):
    """``delta = scaling * B A``: lora_A (r, d_in, ...) as the weight of the layer below, lora_B (d_out, r).

    Args:
        target: the layer to adapt.
        r: rank.
        scaling: factor of the product.
        dropout: probability of dropping a feature of the adapter's input, in training only.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = target.new_parameter(r, *target.shape[1:])
        self.lora_B = target.new_parameter(target.d_out, r)
        # a tensor: changing it does not recompile a compiled model
        self.register_buffer("scaling", self.lora_B.new_tensor(scaling), persistent=False)
        self.dropout = dropout

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """``lora_A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))``, ``lora_B = 0``."""
        random = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype)
        self.lora_A.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
        self.lora_B.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + scaling * B (A dropout(x)); two thin products, the delta is never built."""
        y = layer(x)
        return y + _cast(self.product(x, layer), y.dtype)

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone, scaled; (..., d_out) for x (..., d_in)."""
        down = self.lora_A
        h = F.linear(self.drop(_cast(x, down.dtype)), down)  # (..., r)
        return F.linear(h, self.scaling * self.lora_B)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, in training only."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def delta(self) -> Tensor:
        """(d_out, d_in, ...)."""
        return (self.scaling * self.lora_B @ self.lora_A.flatten(1)).unflatten(1, self.lora_A.shape[1:])

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + scaling * B A."""
        return weight + self.delta(), bias


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # asking first is cheaper: this runs for every layer


class LowRankConv(LowRank):
    """The same for convolutions: A is a convolution to r channels, B one of kernel size 1.

    With groups, all of them share A (r, c_in / groups, ...), which any r allows and depthwise layers need.
    """

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone, scaled; (N, c_out, ...) for x (N, c_in, ...)."""
        conv = layer.module
        down = self.lora_A.repeat(conv.groups, *[1] * (self.lora_A.dim() - 1))
        h = conv._conv_forward(self.drop(x.to(down.dtype)), down, None)
        up = (self.scaling * self.lora_B)[(..., *[None] * (self.lora_A.dim() - 2))]
        one_by_one = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.lora_A.dim()]
        return one_by_one(h, up, groups=conv.groups)


class LowRankEmbedding(LowRank):
    """The same for embeddings: lora_A (r, vocabulary) is the factor that starts at zero, lora_B (d, r) ~ N(0, 1)."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """``lora_A = 0``, ``lora_B ~ N(0, 1)``."""
        self.lora_A.zero_()
        self.lora_B.copy_(torch.randn(self.lora_B.shape, dtype=self.lora_B.dtype, generator=generator))

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone, scaled; (..., d) for indices x (...)."""
        h = F.embedding(x, self.lora_A.T, padding_idx=layer.module.padding_idx)
        return F.linear(self.drop(h), self.scaling * self.lora_B)
