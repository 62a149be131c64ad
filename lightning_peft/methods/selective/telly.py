"""Telly-K: freeze the embeddings and the K lowest blocks, train the rest.

Paper:    Shi et al., "Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental Study and Beyond",
          2023, arXiv:2304.05216.
Formula:  the backward pass ends at block K; what lies below has no gradients
Shapes:   those of the model
Init:     the model as it is; y starts as the base
Merge:    nothing to do: the parameters are the base's own, and no copy of the base is kept
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.engine import Method, check_range, register, select_parameters
from lightning_peft.engine.limits import Patterns
from lightning_peft.engine.targets import is_below
from lightning_peft.parts.blocks import find_blocks


@register("telly")
@dataclass(frozen=True, kw_only=True)
class Telly(Method):
    """Training of the upper blocks, and of all that stands behind them in the model.

    Args:
        n_frozen: blocks at the bottom that are frozen, with all that stands before the first block (embeddings); all
            but two by default, the cheap setting that the paper finds.
        blocks: path of the list of blocks, where it is not found by itself.

    Raises:
        AdapterError: ``n_frozen`` is not below the number of blocks.
        TargetError: no blocks are found.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])
    >>> model = inject(nn.Sequential(nn.Linear(2, 2), blocks, nn.Linear(2, 1)), Telly(n_frozen=2))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.2.0.weight', '1.2.0.bias', '2.weight', '2.bias']
    """

    paper: ClassVar[str] = "arXiv:2304.05216"
    keeps_base: ClassVar[bool] = False

    n_frozen: int | None = None
    blocks: Patterns | None = None

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """What stands behind the frozen blocks."""
        blocks = find_blocks(model, self.blocks, who="Telly")
        n = max(0, len(blocks) - 2) if self.n_frozen is None else self.n_frozen
        check_range("Telly", "n_frozen", n, 0 <= n < len(blocks), f"from 0 to {len(blocks) - 1}, blocks there are")
        names = select_parameters(model, "all-layers", who="Telly")
        first = next((i for i, name in enumerate(names) if is_below(name, blocks[0])), len(names))
        frozen = {*names[:first], *(name for name in names for block in blocks[:n] if is_below(name, block))}
        held = {id(model.get_parameter(name)) for name in frozen}  # a head that is tied to an embedding is frozen too
        return [name for name in names if id(model.get_parameter(name)) not in held]

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """The upper of two, and both."""
        return cls(n_frozen=1, blocks=("q_proj", "v_proj")), cls(n_frozen=0, blocks=("q_proj", "v_proj"))
