"""Bone: an affine change of each square block of a weight, one map for each row of blocks, guided by the weight.

Paper:    Kang and Yin, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language
          Models", 2024, arXiv:2409.15371, its form with weight guide ("bat"); the plain one is `MiSS`.
Formula:  y = W x + b + D x,  D_ij = W_ij B_i + B_i for the block in row i and column j
Shapes:   x (..., d_in), W, D (d_out, d_in), W_ij, D_ij (r, r), block B (d_out / r, r, r)
Init:     B = 0; y starts as the base
Merge:    W <- W + D
Cost:     the delta (d_out, d_in) is built
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, TargetError, register
from lightning_peft.engine.limits import Count


class BlockAffine(Adapter):
    """``delta_ij = W_ij B_i + B_i``: of full rank in general, and built for each forward, as it needs the weight."""

    def __init__(self, target: Target, method: "Bone") -> None:
        super().__init__()
        self.block = target.new_parameter(target.d_out // method.r, method.r, method.r)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Zero: there is one factor, so it learns from there."""
        self.delta(layer.weight)  # which is an error now, not in training, if the weight cannot be read
        self.block.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + D x."""
        y = layer(x)
        return y + F.linear(x.to(self.block.dtype), self.delta(layer.weight)).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        """D (d_out, d_in) for a weight of this shape."""
        n, r, _ = self.block.shape
        blocks = weight.to(self.block.dtype).reshape(n, r, -1, r)  # row of blocks, row in it, column of blocks, column
        return (blocks @ self.block[:, None] + self.block[:, :, None]).view_as(weight)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + D."""
        return weight + self.delta(weight), bias


@register("bone")
@dataclass(frozen=True, kw_only=True)
class Bone(TargetedMethod):
    """A trained map for each r rows of a weight, which acts on all r x r blocks in them.

    Each forward makes a change of the size of the weight, in time and in memory.

    Args:
        r: size of the blocks; trainable numbers per layer: r * d_out. There is no ``alpha``: the learning rate is the
            only scale.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``r`` is out of range.
        TargetError: ``r`` does not divide both widths of a layer.

    >>> from torch import nn, tensor, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> base[0].weight.data = tensor([[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]])
    >>> B = tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> inject(base, Bone(r=2))[0].adapters["default"].block.data = B[None]
    >>> D = torch.cat([base[0].weight[:, :2] @ B + B, base[0].weight[:, 2:] @ B + B], 1)
    >>> allclose(base(ones(1, 4)), ones(1, 4) @ (base[0].weight + D).T)
    True
    """

    paper: ClassVar[str] = "arXiv:2409.15371"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": BlockAffine}

    r: Count = 64

    def adapter(self, target: Target) -> Adapter:
        """Blocks that tile the weight of ``target``."""
        common = math.gcd(target.d_in, target.d_out)
        if common % self.r:
            fitting = ", ".join(str(r) for r in range(1, common + 1) if common % r == 0)
            raise TargetError(
                f"Bone: r={self.r} does not divide both widths of {target.name!r} ({target.d_out} x {target.d_in}). "
                f"Take one that does ({fitting}), or leave the layer out with exclude_modules."
            )
        return super().adapter(target)

    def num_trainable(self, target: Target) -> int:
        """r * d_out."""
        return self.r * target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Blocks of one number, which fit into any width, and a head."""
        return cls(r=1), cls(r=1, target_modules="v_proj", modules_to_save="head")
