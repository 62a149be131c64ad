"""BitFit: train the biases and nothing else.

Paper:    Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
          Language-models", 2021, arXiv:2106.10199.
Formula:  y = W x + b with b trained; where a layer has none, ``create_missing`` gives it b = 0
Shapes:   b (d_out,)
Init:     the biases of the checkpoint; y starts as the base
Merge:    the biases are the base's own; created ones become biases
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, TargetError, register, select_parameters
from lightning_peft.engine.limits import Patterns


class CreatedBias(Adapter):
    """A bias for a linear layer that has none."""

    def __init__(self, target: Target, method: "BitFit") -> None:
        super().__init__()
        self.bias = target.new_parameter(target.d_out)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Zero."""
        self.bias.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """layer(x) + bias."""
        y = layer(x)
        return y + self.bias.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The bias that the layer gets."""
        return weight, self.bias if bias is None else bias + self.bias


@register("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(TargetedMethod):
    """Training of the biases, and of the output head.

    Args:
        target_modules: patterns of the modules whose biases are trained; by default all modules.
        modules_to_save: modules trained whole, by default the output head as in the paper.
        create_missing: give a bias to each chosen linear layer that has none.
        exclude_modules: see `LoRA`; so for ``layers_to_transform``.

    Raises:
        TargetError: there is no bias to train (Llama has none: use ``create_missing``), or a pattern matches nothing.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> model = inject(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), BitFit(modules_to_save=()))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.bias', '1.bias']
    """

    paper: ClassVar[str] = "arXiv:2106.10199"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": CreatedBias}

    target_modules: Patterns = "all-layers"
    modules_to_save: Patterns = "output-head"
    create_missing: bool = False

    def targets(self, model: nn.Module) -> list[Target]:
        """The chosen linear layers without a bias, if those are to be created."""
        if not self.create_missing:
            return []
        return [t for t in super().targets(model) if t.site.bias and t.site.get(t.module)[1] is None]

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """The biases of the chosen modules, and ``modules_to_save``."""
        chosen = select_parameters(
            model,
            self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            who="BitFit",
        )
        biases = [name for name in chosen if name.endswith("bias")]
        if not biases and not self.create_missing:
            raise TargetError(
                f"BitFit: {type(model).__name__} has no bias to train. BitFit(create_missing=True) gives every chosen "
                "linear layer one."
            )
        return list(dict.fromkeys([*biases, *super().trained_in_place(model)]))

    def num_trainable(self, target: Target) -> int:
        """d_out for a created bias."""
        return target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """As in the paper, and with created biases."""
        return cls(modules_to_save="head"), cls(create_missing=True, modules_to_save=())
