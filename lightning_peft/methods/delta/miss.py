"""MiSS: add up groups of input features, and send the sums to the output through one trained matrix.

Paper:    Kang and Yin, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language
          Models", 2024, arXiv:2409.15371, which its later versions call MiSS.
Formula:  y = W x + b + D^T fold(dropout(x)),  fold(x)_j = x_j + x_(j + r) + x_(j + 2 r) + ... up to d_in
Shapes:   x (..., d_in), fold(x) (..., r), block D (r, d_out)
Init:     D = 0; y starts as the base
Merge:    W <- W + [D^T D^T ...], cut to d_in columns
Deviates from the authors' code: the variant that mixes the weight into its update ("bat") is another method, `Bone`.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, TargetError, register
from lightning_peft.engine.limits import Count, Probability


class Folded(Adapter):
    """``delta = [D^T D^T ...]``: columns whose numbers agree modulo r share a column of D^T."""

    def __init__(self, target: Target, method: "MiSS") -> None:
        super().__init__()
        self.block = target.new_parameter(method.r, target.d_out)
        self.dropout = method.dropout

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Zero: there is one factor, so it learns from there."""
        self.block.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + fold(x) D."""
        y, r = layer(x), len(self.block)
        x = F.dropout(x.to(self.block.dtype), self.dropout, self.training)
        sums = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
        return y + (sums @ self.block).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + the repeated block."""
        d_in = weight.shape[1]
        return weight + self.block.T.repeat(1, -(-d_in // len(self.block)))[:, :d_in], bias


@register("miss")
@dataclass(frozen=True, kw_only=True)
class MiSS(TargetedMethod):
    """One trained matrix of r rows that all groups of r input features share; also known as DiSHA.

    Args:
        r: number of sums, and rank of the update. There is no ``alpha``: the learning rate is the only scale.
        dropout: probability of dropping an input feature of the update, in training only.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``r`` or ``dropout`` is out of range.
        TargetError: ``r`` exceeds the input features of a layer.

    >>> from torch import nn, tensor, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 1))
    >>> x, y = tensor([[1.0, 10.0, 100.0]]), base(tensor([[1.0, 10.0, 100.0]]))
    >>> inject(base, MiSS(r=2))[0].adapters["default"].block.data = tensor([[2.0], [5.0]])
    >>> allclose(base(x), y + 2 * (1 + 100) + 5 * 10)
    True
    """

    paper: ClassVar[str] = "arXiv:2409.15371"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Folded}

    r: Count = 64
    dropout: Probability = 0.0

    def adapter(self, target: Target) -> Adapter:
        """A block of the width of ``target``."""
        if self.r > target.d_in:
            raise TargetError(
                f"MiSS: r={self.r} is more than the {target.d_in} input features of {target.name!r}. Lower r, or leave "
                "the layer out with exclude_modules."
            )
        return super().adapter(target)

    def num_trainable(self, target: Target) -> int:
        """r * d_out."""
        return self.r * target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Widths that r does not divide, and a head."""
        return cls(r=2), cls(r=3, target_modules="v_proj", modules_to_save="head")
