"""DoRA: train the direction of a weight by a low-rank product, and its magnitude by a vector.

Paper:    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353.
Formula:  y = b + m / c * (W x + scaling * B A dropout(x)),  c = norm of each row of W + scaling * B A, no gradient
Shapes:   as LoRA, and magnitude m (d_out,); convolution: the norm runs over all axes but the first
Init:     as LoRA, m = c; y starts as the base
Merge:    W <- m / c * (W + scaling * B A), the bias stays
Cost:     the norms of all rows of W + s B A
Deviates from the authors' code: dropout falls on the input of B A alone, where theirs, and HF PEFT's, drops the same
          features of (m / c - 1) W x too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft import kernels
from lightning_peft.adapters.low_rank import LowRank, LowRankConv, LowRankEmbedding
from lightning_peft.engine import Adapter, Kind, Layer, Target, register
from lightning_peft.methods.lora.lora import LoRA


class Decomposed(LowRank):
    """A low-rank product whose result is rescaled row by row to a trained norm."""

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.magnitude = target.new_parameter(target.d_out)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As LoRA; the magnitude is the norm of each row of the weight below."""
        super().reset_parameters(layer, generator)
        self.magnitude.copy_(self.norm(layer.weight))

    def norm(self, weight: Tensor) -> Tensor:
        """(d_out,): norm of each row of W + scaling * B A, without building the sum."""
        norm = kernels.dora_norm(weight.flatten(1), self.lora_A.flatten(1), self.lora_B, self.scaling)
        return norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The base output is rescaled in place of computing it again from a new weight."""
        y, bias = layer(x), layer.bias
        last = -1 if layer.site.kind != "conv" else 1 - self.lora_A.dim()
        ratio = _along(self.magnitude / self.norm(layer.weight), last)
        plain = y if bias is None else y - _along(bias, last)
        return y + ((ratio - 1) * plain + ratio * self.product(x, layer)).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m / c * (W + scaling * B A)."""
        ratio = self.magnitude / self.norm(weight)
        return _along(ratio, -weight.dim()) * (weight + self.delta()), bias


class DecomposedConv(LowRankConv, Decomposed):
    """The same for convolutions."""


class DecomposedEmbedding(LowRankEmbedding, Decomposed):
    """The same for embeddings: one magnitude for each of the d output features."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As LoRA for embeddings, the magnitude as above."""
        LowRankEmbedding.reset_parameters(self, layer, generator)
        self.magnitude.copy_(self.norm(layer.weight))


def _along(vector: Tensor, axis: int) -> Tensor:
    """``vector`` shaped so that it broadcasts along ``axis``, counted from the end."""
    return vector[(..., *[None] * (-axis - 1))]


@register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA with a trained magnitude for each output; takes the same arguments.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> w = base[0].weight.detach().clone()
    >>> dora = inject(base, DoRA(r=2, alpha=4.0))[0].adapters["default"]
    >>> _ = nn.init.ones_(dora.lora_B), nn.init.constant_(dora.magnitude, 5.0)
    >>> moved = w + 4.0 / 2 * dora.lora_B @ dora.lora_A
    >>> allclose(base(ones(1, 3)), ones(1, 3) @ (5 * moved / moved.norm(dim=1, keepdim=True)).T)
    True
    """

    paper: ClassVar[str] = "arXiv:2402.09353"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {
        "linear": Decomposed,
        "conv": DecomposedConv,
        "embedding": DecomposedEmbedding,
    }

    def num_trainable(self, target: Target) -> int:
        """r * (d_in + d_out) + d_out."""
        return super().num_trainable(target) + target.d_out
