"""LoRA+: let the factor that starts at zero learn faster than the other.

Paper:    Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv:2402.12354.
Formula:  as LoRA; learning rate of lora_B = lr_ratio * learning rate of lora_A
Shapes:   as LoRA
Init:     as LoRA; y starts as the base
Merge:    as LoRA
Schedule: the ratio holds at every step, under any scheduler of the user's
Deviates from the authors' code: in an embedding the factor that starts at zero is lora_A, so that one gets the higher
          rate; theirs gives both factors a rate of their own, 1e-6.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from lightning_peft.adapters.low_rank import LowRankEmbedding
from lightning_peft.engine import Adapter, register
from lightning_peft.engine.limits import OneOrMore
from lightning_peft.methods.lora.lora import LoRA


@register("loraplus")
@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA whose zero-initialised factor has a higher learning rate; takes the same arguments.

    Args:
        lr_ratio: that rate over the rate of the other factor (16 in the reference code; its authors advise to halve
            the common rate). 1 is LoRA.
        r: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``lr_ratio`` is below 1, or an argument of `LoRA` is out of range.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> method = LoRAPlus(r=2, lr_ratio=4.0)
    >>> adapter = inject(nn.Sequential(nn.Linear(3, 2)), method)[0].adapters["default"]
    >>> [method.learning_rate_ratio(adapter, name) for name in ("lora_A", "lora_B")]
    [1.0, 4.0]
    """

    paper: ClassVar[str] = "arXiv:2402.12354"

    lr_ratio: OneOrMore = 16.0

    def learning_rate_ratio(self, adapter: Adapter, parameter: str) -> float:
        """``lr_ratio`` for the factor that starts at zero."""
        zero = "lora_A" if isinstance(adapter, LowRankEmbedding) else "lora_B"
        return self.lr_ratio if parameter == zero else 1.0

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With the usual ratio, and with a gentle one."""
        return cls(r=2), cls(r=3, lr_ratio=2.0, target_modules="v_proj")
