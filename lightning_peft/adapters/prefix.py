"""A prefix: trained keys and values before those that an attention makes of its tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, AdapterError, Layer, Target
from lightning_peft.parts.attention import Prepend, seen_by, widths_of


class Trunk(nn.Module):
    """What the prefixes of all layers are made of: ``tanh(table W^T + b)``, (p, hidden)."""

    def __init__(self, target: Target, p: int, hidden: int) -> None:
        super().__init__()
        self.table = target.new_parameter(p, target.d_out)
        self.weight, self.bias = target.new_parameter(hidden, target.d_out), target.new_parameter(hidden)

    def reset(self, generator: torch.Generator) -> None:
        """table ~ N(0, 1); weight and bias as in ``nn.Linear``."""
        normal(self.table, 1.0, generator)
        uniform(self.weight, self.weight.shape[1] ** -0.5, generator)
        uniform(self.bias, self.weight.shape[1] ** -0.5, generator)

    def forward(self) -> Tensor:
        """(p, hidden)."""
        return torch.tanh(F.linear(self.table, self.weight, self.bias))


class Prefix(Adapter):
    """``attention(q, [keys; K], [values; V])``: keys (p, all features of K), values (p, all features of V).

    With a trunk, keys and values are a linear map of what it answers. The first adapter owns the trunk, and the others
    know it.

    Args:
        target: the attention.
        p: tokens of the prefix.
        who: how errors name the method.
        init_std: standard deviation of the start, without a trunk.
        trunk: what the prefix is made of.
        owns: whether the trunk is this adapter's.
    """

    def __init__(
        self, target: Target, p: int, init_std: float, who: str, trunk: Trunk | None = None, owns: bool = False
    ) -> None:
        super().__init__()
        widths = widths_of(target.module)
        if widths is None:
            raise AdapterError(f"{target.name!r} is no attention. Choose one that has projections to keys and values.")
        self.init_std, self.who, self.d_keys = init_std, who, widths.keys
        self.known: tuple[Trunk, ...] = () if trunk is None else (trunk,)  # in a tuple it is no child
        if trunk is None:
            self.keys, self.values = target.new_parameter(p, widths.keys), target.new_parameter(p, widths.values)
        else:
            hidden = len(trunk.bias)
            self.weight = target.new_parameter(widths.keys + widths.values, hidden)
            self.bias = target.new_parameter(widths.keys + widths.values)
        if owns:
            self.trunk = trunk

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """keys, values ~ N(0, init_std^2); with a trunk, as its layers are."""
        if self.known:
            if "trunk" in self._modules:
                self.known[0].reset(generator)
            uniform(self.weight, self.weight.shape[1] ** -0.5, generator)
            uniform(self.bias, self.weight.shape[1] ** -0.5, generator)
        else:
            normal(self.keys, self.init_std, generator)
            normal(self.values, self.init_std, generator)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (p, all their features) each."""
        if not self.known:
            return self.keys, self.values
        both = F.linear(self.known[0](), self.weight, self.bias)
        return both[:, : self.d_keys], both[:, self.d_keys :]

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the attention answers with the longer keys and values."""
        return seen_by(Prepend(*self.prefix()), layer.module, lambda: layer(x), self.who)

    def unmergeable_because(self) -> str:
        """Keys and values are no weights."""
        return "a prefix is keys and values beside those of the tokens, not a change of weights."


def prefixes(targets: Sequence[Target], p: int, init_std: float, hidden: int | None, who: str) -> list[Adapter]:
    """A prefix for each attention of ``targets``; with ``hidden``, all on one trunk, which the first of them owns."""
    trunk = Trunk(targets[0], p, hidden) if targets and hidden else None
    return [Prefix(t, p, init_std, who, trunk, owns=trunk is not None and i == 0) for i, t in enumerate(targets)]


def num_prefix(target: Target, p: int, hidden: int | None) -> int:
    """p features of all keys and values; with a trunk, its last layer: (hidden + 1) times those features."""
    widths = widths_of(target.module)
    return 0 if widths is None else (p if hidden is None else hidden + 1) * (widths.keys + widths.values)


def num_trunk(targets: Sequence[Target], p: int, hidden: int | None) -> int:
    """p D + hidden (D + 1), the table and the first layer; nothing without a trunk."""
    return p * targets[0].d_out + hidden * (targets[0].d_out + 1) if targets and hidden else 0


def normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std^2)."""
    parameter.copy_(std * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))


def uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with U(-bound, bound)."""
    parameter.copy_(bound * (2 * torch.rand(parameter.shape, dtype=parameter.dtype, generator=generator) - 1))
