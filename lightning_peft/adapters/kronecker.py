"""Kronecker products of two matrices, each of which may be a low-rank product."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, Layer, Target


class Kronecker(Adapter):
    """``delta = scaling * (w1 kron w2)``; the product is not built for linear layers.

    Args:
        target: what it changes.
        shapes: of ``lokr_w1`` (l, m) and ``lokr_w2`` (k, n, ...), or of two factors ``_a`` and ``_b`` in place of one.
        scaling: see above.
        dropout: probability of dropping an input feature of the update, in training only.
    """

    scaling: Tensor

    def __init__(
        self, target: Target, shapes: Mapping[str, tuple[int, ...]], scaling: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, target.new_parameter(*shape))
        self.register_buffer("scaling", next(self.parameters()).new_tensor(scaling), persistent=False)
        self.dropout = dropout

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The first matrix is zero, by its first factor if it has two; the others are uniform."""
        for name, parameter in self.named_parameters():
            random = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
            parameter.copy_(0 * random if name in ("lokr_w1", "lokr_w1_a") else random)

    def matrix(self, name: str) -> Tensor:
        """``lokr_w1`` (l, m) or ``lokr_w2`` (k, n, ...), put together if it has two factors."""
        if name in self._parameters:
            return self.get_parameter(name)
        right = self.get_parameter(f"{name}_b")
        return (self.get_parameter(f"{name}_a") @ right.flatten(1)).unflatten(1, right.shape[1:])

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + scaling * w1 X w2^T, with x folded to X (..., m, n)."""
        y, w1 = layer(x), self.scaling * self.matrix("lokr_w1")
        x = F.dropout(x.to(w1.dtype), self.dropout, self.training)
        change = w1 @ F.linear(x.unflatten(-1, (w1.shape[1], -1)), self.matrix("lokr_w2"))
        return y + change.flatten(-2).to(y.dtype)

    def delta(self) -> Tensor:
        """(d_out, d_in, ...)."""
        w1, w2 = self.scaling * self.matrix("lokr_w1"), self.matrix("lokr_w2")
        return torch.kron(w1[(..., *[None] * (w2.dim() - 2))].contiguous(), w2)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        return weight + self.delta(), bias


class KroneckerConv(Kronecker):
    """The same for convolutions, whose delta is built."""

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + the convolution of x with the delta."""
        y, delta = layer(x), self.delta()
        x = F.dropout(x.to(delta.dtype), self.dropout, self.training)
        return y + layer.module._conv_forward(x, delta, None).to(y.dtype)


def split(d: int, factor: int = -1) -> tuple[int, int]:
    """Two divisors of ``d``, the smaller first unless ``factor`` divides ``d``, which then comes first.

    >>> split(128), split(127), split(128, 4), split(12, 5), split(128, 32)
    ((8, 16), (1, 127), (4, 32), (3, 4), (32, 4))
    """
    if factor > 0 and d % factor == 0:
        return factor, d // factor
    first = max(i for i in range(1, math.isqrt(d) + 1) if d % i == 0 and (factor < 0 or i <= factor))
    return first, d // first
