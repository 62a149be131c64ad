"""Full fine-tuning: train every parameter, as the baseline that all comparisons need.

Paper:    none; this is ordinary training.
Formula:  y = f(x) with all parameters of f trained
Shapes:   those of the model
Init:     the model as it is; y starts as the base
Merge:    nothing to do: the parameters are the base's own, and no copy of the base is kept
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.engine import Method, register, select_parameters


@register("fullfinetuning")
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Training of all parameters.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> model = inject(nn.Linear(3, 2), FullFineTuning())
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    8
    """

    paper: ClassVar[str] = ""
    keeps_base: ClassVar[bool] = False

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """Every parameter of the base."""
        return select_parameters(model, "all-layers", who="FullFineTuning")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """There is one way to do it."""
        return (cls(),)
