"""StructuredLoRA (SLoRA): put a trained r x r matrix between the factors of a low-rank product.

Paper:    Guo et al., "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", 2025, arXiv:2502.14482.
Formula:  y = W x + b + s B N A dropout(x)
Shapes:   lora_A (r, d_in), lora_N (r, r), lora_B (d_out, r); convolution: lora_A (r, c_in / groups, *kernel)
Init:     lora_A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), lora_N ~ U(-1/sqrt(r), 1/sqrt(r)), lora_B = 0; y starts as the base
Merge:    W <- W + s B N A
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from lightning_peft.adapters.core import Core, CoreConv
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count, Positive
from lightning_peft.methods.lora.lora import LoRA


@register("structuredlora")
@dataclass(frozen=True, kw_only=True)
class StructuredLoRA(LoRA):
    """LoRA with a trained matrix between its factors; takes the same arguments.

    Args:
        r: rank of the update (128 in the paper); trainable numbers per layer: r * (d_in + d_out + r).
        alpha: numerator of the scaling s, which is 1 by default.
        dropout: see `LoRA`; so for the arguments that follow it.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> x, y = ones(1, 3), base(ones(1, 3))
    >>> adapter = inject(base, StructuredLoRA(r=2, alpha=8.0))[0].adapters["default"]
    >>> _ = nn.init.ones_(adapter.lora_B)
    >>> delta = (8 / 2) * adapter.lora_B @ adapter.lora_N @ adapter.lora_A
    >>> allclose(base(x), y + x @ delta.T)
    True
    """

    paper: ClassVar[str] = "arXiv:2502.14482"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Core, "conv": CoreConv}

    r: Count = 16
    alpha: Positive | None = None

    def num_trainable(self, target: Target) -> int:
        """r * (d_in + d_out + r)."""
        return super().num_trainable(target) + self.rank(target) ** 2

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Plain, and with a scaling and a head."""
        return cls(r=2), cls(r=3, alpha=6.0, target_modules="v_proj", modules_to_save="head")
