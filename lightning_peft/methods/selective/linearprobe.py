"""Linear probe: train the output head on frozen features.

Paper:    Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2016, arXiv:1610.01644.
Formula:  y = W_head f(x) + b_head, f frozen
Shapes:   those of the head
Init:     the head as it is; y starts as the base
Merge:    nothing to do: the head is the base's own
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.engine import Method, register, select_parameters
from lightning_peft.engine.limits import Patterns


@register("linearprobe")
@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Training of the output head alone.

    Args:
        modules_to_save: patterns of the modules to train; ``"output-head"`` finds the head by itself.

    Raises:
        TargetError: a pattern matches nothing, or no output head is known: give its name.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> model = inject(nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)}), LinearProbe())
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['head.weight', 'head.bias']
    """

    paper: ClassVar[str] = "arXiv:1610.01644"

    modules_to_save: Patterns = "output-head"

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """All parameters of the head."""
        return select_parameters(model, self.modules_to_save, who="LinearProbe")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """The head by its role."""
        return (cls(),)
