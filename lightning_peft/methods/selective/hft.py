"""HFT: train a random half of the matrices, and leave the other half at what it knows.

Paper:    Hui et al., "HFT: Half Fine-Tuning for Large Language Models", 2024, arXiv:2404.18466.
Formula:  of each category (attention, feed-forward, norms) of each block a random half trains; what lies outside of
          the blocks trains; where a category has an odd number, one more in every other block
Shapes:   those of the model
Init:     the model as it is; y starts as the base
Merge:    nothing to do: the parameters are the base's own, and no copy of the base is kept
Deviates from the paper: a unit is a layer with its bias; categories are told by names.
"""

import random
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import nn

from lightning_peft.engine import Method, register, select_parameters
from lightning_peft.engine.limits import Patterns, Share
from lightning_peft.engine.targets import is_below
from lightning_peft.parts.blocks import find_blocks

Level = Literal["category", "layer", "model"]
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"att|query|key|value|[qkvo]_proj", re.IGNORECASE)


@register("hft")
@dataclass(frozen=True, kw_only=True)
class HFT(Method):
    """Full fine-tuning of a random half of each block.

    Args:
        fraction: how much of each category trains.
        level: draw in each category of each block, among whole blocks (``"layer"``), or among all layers of all
            blocks (``"model"``).
        stage: counts the tasks of continual learning; each stage draws another half.
        seed: of the draws; they depend on it and on ``stage`` alone.
        blocks: path of the list of blocks, where it is not found by itself.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: no blocks are found.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)])
    >>> model = inject(nn.Sequential(nn.Linear(2, 2), blocks), HFT())
    >>> [sum(layer.weight.requires_grad for layer in block) for block in model[1]]
    [1, 1, 1]
    """

    paper: ClassVar[str] = "arXiv:2404.18466"
    keeps_base: ClassVar[bool] = False

    fraction: Share = 0.5
    level: Level = "category"
    stage: int = 0
    seed: int = 0
    blocks: Patterns | None = None

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """The drawn half, and what lies outside of the blocks."""
        blocks = find_blocks(model, self.blocks, who="HFT")
        names = select_parameters(model, "all-layers", who="HFT")
        block_of = {name: block for name in names for block in blocks if is_below(name, block)}
        categories: dict[str, dict[str, dict[str, None]]] = {}  # category -> group -> units, in the order of the model
        for name, block in block_of.items():
            layer = name.rpartition(".")[0]
            category, group, unit = {
                "category": (_category(layer.removeprefix(block)), block, layer),
                "layer": ("all", "all", block),
                "model": ("all", "all", layer),
            }[self.level]
            categories.setdefault(category, {}).setdefault(group, {})[unit] = None
        drawn, generator = set(), random.Random(f"{self.seed}/{self.stage}")
        for groups in categories.values():
            share = generator.random()  # rounding up or down in turn, so that the whole category has its fraction
            for units in groups.values():
                before, share = int(share), share + self.fraction * len(units)
                drawn |= set(generator.sample(list(units), int(share) - before))
        held = {
            id(model.get_parameter(name))
            for name, block in block_of.items()
            if not {block, name.rpartition(".")[0]} & drawn
        }
        return [name for name in names if id(model.get_parameter(name)) not in held]

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """One of two layers, drawn in two ways."""
        two = ("q_proj", "v_proj")
        return cls(level="model", blocks=two), cls(level="layer", blocks=two, seed=3)


def _category(layer: str) -> str:
    if _NORM.search(layer.rpartition(".")[2]):  # first: "post_attention_layernorm"
        return "norm"
    return "attention" if _ATTENTION.search(layer) else "feed-forward"
