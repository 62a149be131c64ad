"""NLoRA: start three factors at the Nyström blocks of a weight: its first rows, its first columns, where they meet.

Paper:    Guo et al., "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", 2025, arXiv:2502.14482.
Formula:  y = W x + b + s (B N A - B_0 N_0 A_0) dropout(x)
Shapes:   lora_A, start_A (r, d_in); lora_N, start_N (r, r); lora_B, start_B (d_out, r);
          a convolution is flattened to (c_out, c_in * kernel)
Init:     A_0 = W[:r, :], B_0 = W[:, :r], N_0 = W[:r, :r] or its pseudo-inverse; y starts as the base
Merge:    W <- W + s (B N A - B_0 N_0 A_0)
Cost:     a second pair of thin products
Deviates from the authors' code: that adds B N A to W and takes nothing out, so that y starts as something else.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lightning_peft.adapters.core import RecentredCore, RecentredCoreConv
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.methods.lora.structuredlora import StructuredLoRA


@register("nlora")
@dataclass(frozen=True, kw_only=True)
class NLoRA(StructuredLoRA):
    """StructuredLoRA that starts at blocks of each weight, and acts as if it started at zero.

    Args:
        core: where N starts: ``"block"``, at W[:r, :r], as in the authors' code; or ``"pinv"``, at its pseudo-inverse,
            as in Nyström's approximation: s B_0 N_0 A_0 is then W itself in the first r rows and columns, times s.
        r: see `StructuredLoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``core`` is neither, or an argument of `LoRA` is out of range.
        TargetError: see `LoRA`.

    >>> from torch import nn, allclose
    >>> from lightning_peft import inject
    >>> W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> base[0].weight.data = W
    >>> adapter = inject(base, NLoRA(r=1, core="pinv"))[0].adapters["default"]
    >>> adapter.lora_A.tolist(), adapter.lora_N.tolist(), adapter.lora_B.tolist()
    ([[1.0, 2.0, 3.0]], [[1.0]], [[1.0], [4.0]])
    >>> _ = nn.init.constant_(adapter.lora_N, 3.0)
    >>> x = torch.eye(3)
    >>> allclose(base(x), x @ (W + (3 - 1) * W[:, :1] @ W[:1]).T + base[0].bias)
    True
    """

    paper: ClassVar[str] = "arXiv:2502.14482"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": RecentredCore, "conv": RecentredCoreConv}

    core: Literal["block", "pinv"] = "block"

    def adapter(self, target: Target) -> Adapter:
        """Three factors that start where `start` says."""
        adapter: Any = super().adapter(target)
        adapter.start = self.start
        return adapter

    def start(self, weight: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, d_in), N (r, r) and B (d_out, r) for a weight (d_out, d_in)."""
        block = weight[:r, :r]
        return weight[:r], torch.linalg.pinv(block) if self.core == "pinv" else block, weight[:, :r]

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Both cores."""
        return cls(r=2, alpha=4.0), cls(r=1, core="pinv", target_modules="v_proj", modules_to_save="head")
