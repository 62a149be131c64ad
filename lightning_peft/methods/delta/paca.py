"""PaCA: train some randomly drawn columns of each weight.

Paper:    Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", 2025, arXiv:2503.01905.
Formula:  y = W x + b + scaling * D x_I,  scaling = alpha / r,  I the r input features that were drawn
Shapes:   x (..., d_in), x_I (..., r), W (d_out, d_in), columns D (d_out, r), indices I (r,)
Init:     D = 0, I drawn without replacement; y starts as the base
Merge:    W[:, I] <- W[:, I] + scaling * D
Deviates from the authors' code: the change D of the columns is trained beside them, which stay as they are. It has the
          same gradients; weight decay pulls the columns to where they started, not to zero; and a second, thin product
          runs beside that of the layer, which the paper saves.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, TargetError, register
from lightning_peft.engine.limits import Count, Positive


class Columns(Adapter):
    """``delta`` is zero but for the columns ``indices``; of the input, the backward pass keeps these features alone."""

    indices: Tensor
    scaling: Tensor

    def __init__(self, target: Target, method: "PaCA") -> None:
        super().__init__()
        self.columns = target.new_parameter(target.d_out, method.r)
        self.register_buffer("indices", torch.zeros(method.r, dtype=torch.long, device=self.columns.device))
        self.register_buffer("scaling", self.columns.new_tensor(method.alpha / method.r), persistent=False)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Other columns for each layer, and no change of them."""
        drawn = torch.randperm(layer.weight.shape[1], generator=generator)[: len(self.indices)]
        self.indices.copy_(drawn.sort().values)
        self.columns.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + scaling * D x_I."""
        y = layer(x)
        chosen = x.index_select(-1, self.indices).to(self.columns.dtype)
        return y + F.linear(chosen, self.scaling * self.columns).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W with the change added to its columns."""
        change = self.scaling * self.columns
        return weight.to(torch.promote_types(weight.dtype, change.dtype)).index_add(1, self.indices, change), bias


@register("paca")
@dataclass(frozen=True, kw_only=True)
class PaCA(TargetedMethod):
    """Training of ``r`` columns of each weight, drawn once.

    Args:
        r: number of columns.
        alpha: numerator of ``scaling``, which changes how fast the columns learn and nothing else.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``r`` or ``alpha`` is out of range.
        TargetError: a layer has fewer than ``r`` columns.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject, merge
    >>> base = nn.Sequential(nn.Linear(5, 3))
    >>> w = base[0].weight.detach().clone()
    >>> paca = inject(base, PaCA(r=2, alpha=8.0))[0].adapters["default"]
    >>> _ = nn.init.ones_(paca.columns)
    >>> w[:, paca.indices] += 8 / 2
    >>> allclose(merge(base)[0].weight, w)
    True
    """

    paper: ClassVar[str] = "arXiv:2503.01905"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Columns}

    r: Count = 8
    alpha: Positive = 16.0

    def adapter(self, target: Target) -> Adapter:
        """Columns of ``target``."""
        if self.r > target.d_in:
            raise TargetError(
                f"PaCA: r={self.r}, but {target.name!r} has {target.d_in} columns. Lower r, or leave the layer out "
                "with exclude_modules."
            )
        return super().adapter(target)

    def num_trainable(self, target: Target) -> int:
        """r * d_out."""
        return self.r * target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Plain, and with a trained head."""
        return cls(r=2), cls(r=3, alpha=3.0, target_modules="v_proj", modules_to_save="head")
