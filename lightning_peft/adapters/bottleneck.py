"""Bottlenecks: two thin matrices with an activation between them, behind a layer or beside a sub-layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, AdapterError, Layer, Site, Target
from lightning_peft.engine.limits import Limit

Activation = Literal["relu", "gelu", "gelu_new", "swish", "tanh"]
Start = Literal["bert", "identity"]
Scaling = Annotated[
    float | Literal["learned"],
    Limit("not 0, or 'learned'", lambda v: v == "learned" or (isinstance(v, int | float) and v != 0)),
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda h: F.gelu(h, approximate="tanh"),
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Linked(Target):
    """A target whose adapter has no parameters: it works with that of another target.

    Args:
        to: name of the other target.
        role: what it does there.
    """

    to: str = ""
    role: str = ""


def linked(target: Target, to: str, role: str, width: int = 0) -> Linked:
    """``target`` linked to that of name ``to``; as a whole module of this ``width``, if one is given."""
    site = Site("module", "", None, width=width) if width else target.site
    return Linked(target.owner if width else target.name, target.module, site, target.owner, to, role)


@dataclass
class Stash:
    """What taps saw in this forward, until the branch takes it out.

    Args:
        of: name of the layer whose input is looked for; for errors.
        around: whether the block and its norm layers are tapped, to find what that input was normalised from.
        block: input of the block.
        normed: name of the norm layer of the block that ran last, its input and its output.
        prenorm: whether some norm layer was given what the block was given; kept, as an activation checkpoint inside
            of the block computes again without a call of the block. None before the first forward.
        norm: name of the one that ran last before the sub-layer, kept for the same reason; what others behind it see
            is left alone, or it would outlive the forward.
        value: input of the branch.
    """

    of: str
    around: bool = False
    block: Tensor | None = None
    normed: tuple[str, Tensor, Tensor] | None = None
    prenorm: bool | None = None
    norm: str = ""
    value: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """The block is given ``x``."""
        self.block, self.normed, self.prenorm, self.norm = x, None, False, ""

    def normalise(self, name: str, x: Tensor, y: Tensor) -> None:
        """The norm layer ``name`` of the block answers ``y`` for ``x``."""
        if x is self.block:
            self.prenorm = True
        if self.prenorm is not False and self.norm in ("", name):
            self.normed = (name, x, y)

    def enter(self, x: Tensor) -> None:
        """The sub-layer is given ``x``: keep the residual stream that ``x`` was normalised from, or ``x`` itself."""
        self.value = x
        if self.around and self.prenorm is not False:
            if self.normed is None:
                raise AdapterError(
                    f"the branch beside {self.of!r} reads what its block normalises, and no norm layer of the block "
                    "was called before it. Call the whole block, and let activation checkpoints hold whole blocks; or "
                    "use ParallelAdapter, whose branches read the input of the layer."
                )
            self.norm, before, normed = self.normed
            if normed is x:
                self.value = before
        self.block, self.normed = None, None

    def take(self) -> Tensor:
        """The input of the branch, which is forgotten here."""
        value, self.value = self.value, None
        if value is None:
            raise AdapterError(
                f"the branch beside {self.of!r} waits for the input of its sub-layer, and {self.of!r} was not called "
                "before. Name layers in target_modules=, so that each branch takes the input of its own layer."
            )
        return value


class Tap(Adapter):
    """Puts what a module is given, or answers, into a stash; changes nothing."""

    def __init__(self, target: Linked, stash: Stash) -> None:
        super().__init__()
        self.name, self.role, self.stash = target.name, target.role, stash

    def forward(self, x: Any, layer: Layer) -> Any:
        """layer(x)."""
        if self.role == "block":
            self.stash.begin(x)
        elif self.role == "entry":
            self.stash.enter(x)
        y = layer(x)
        if self.role == "norm":
            self.stash.normalise(self.name, x, y)
        return y

    def unmergeable_because(self) -> str | None:
        """It serves a branch that is not linear."""
        return "it hands an input to a branch with an activation, which is no change of weights."


class Bottleneck(Adapter):
    """``y + s * (U f(D x + c) + e)``: D (r, d_in), U (d_out, r), and their biases c, e.

    x is the output y of the layer itself (in series), or its input, or what ``stash`` holds (in parallel). On a
    convolution the channels are on axis 1; of a module that answers with a tuple the first element is changed.

    Args:
        target: behind which, or beside which.
        r: width of the bottleneck.
        activation: f.
        scaling: s, or ``"learned"`` for a trained number that starts at 1.
        dropout: probability of dropping a feature of the bottleneck, in training only.
        start: ``"bert"`` draws both matrices from N(0, 0.02^2); ``"identity"`` draws D as ``nn.Linear`` does, and lets
            U be zero. Only one of the two may be zero: no gradient would reach either.
        source: where x comes from; ``"input"`` on linear layers alone.
        stash: for ``source="stash"``.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        target: Target,
        r: int,
        *,
        activation: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        start: str = "bert",
        source: Literal["output", "input", "stash"] = "output",
        stash: Stash | None = None,
    ) -> None:
        super().__init__()
        d_in = target.d_in if source == "input" else target.d_out
        self.activation, self.start, self.source, self.stash = activation, start, source, stash
        self.bottleneck_dropout = dropout
        self.axes_after = max(len(target.shape) - 2, 0)  # spatial axes behind the channels
        self.down, self.up = target.new_parameter(r, d_in), target.new_parameter(target.d_out, r)
        self.down_bias, self.up_bias = target.new_parameter(r), target.new_parameter(target.d_out)
        if scaling == "learned":
            self.scaling: Tensor = target.new_parameter(1)
        else:
            # a tensor: changing it does not recompile a compiled model
            self.register_buffer("scaling", self.up_bias.detach().new_tensor(scaling), persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """D (r, d_in) and U (d_out, r)."""
        return self.down, self.up

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As ``start`` says; biases zero."""
        if isinstance(self.scaling, nn.Parameter):
            self.scaling.fill_(1)
        self.down_bias.zero_()
        self.up_bias.zero_()
        self.reset_matrices(generator)

    def reset_matrices(self, generator: torch.Generator) -> None:
        """Fill what the matrices are made of."""
        if self.start == "bert":
            for matrix in (self.down, self.up):
                matrix.copy_(0.02 * torch.randn(matrix.shape, dtype=matrix.dtype, generator=generator))
            return
        random = torch.empty(self.down.shape, dtype=self.down.dtype)
        self.down.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
        self.up.zero_()

    def forward(self, x: Any, layer: Layer) -> Any:
        """layer(x) + the branch."""
        y = layer(x)
        first = y[0] if isinstance(y, tuple) else y
        if self.source == "stash":
            x = self.stash.take()  # type: ignore[union-attr]
        out = first + self.branch(first if self.source == "output" else x).to(first.dtype)
        return (out, *y[1:]) if isinstance(y, tuple) else out

    def branch(self, x: Tensor) -> Tensor:
        """s * (U f(D x + c) + e), along the channels of ``x``; computed in the precision of ``x``."""
        down, up = self.matrices()
        h = ACTIVATIONS[self.activation](self._through(x, down, self.down_bias))
        if self.bottleneck_dropout:
            h = F.dropout(h, self.bottleneck_dropout, self.training)
        return self._through(h, up, self.up_bias) * self.scaling.to(h.dtype)

    def _through(self, x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        matrix, bias = matrix.to(x.dtype), bias.to(x.dtype)
        if not self.axes_after:
            return F.linear(x, matrix, bias)
        one_by_one = (F.conv1d, F.conv2d, F.conv3d)[self.axes_after - 1]
        return one_by_one(x, matrix[(..., *[None] * self.axes_after)], bias)

    def unmergeable_because(self) -> str | None:
        """It is not linear."""
        return "its activation makes it no change of weights."


def with_taps(targets: Sequence[Target], make: Callable[[Target, Stash | None], Adapter]) -> list[Adapter]:
    """An adapter for each of ``targets``: `Tap` for those that are linked to another, ``make(target, stash)`` else."""
    taps = [t for t in targets if isinstance(t, Linked)]
    around = {t.to for t in taps if t.role == "block"}
    stashes = {t.to: Stash(t.name, t.to in around) for t in taps if t.role == "entry"}
    return [Tap(t, stashes[t.to]) if isinstance(t, Linked) else make(t, stashes.get(t.name)) for t in targets]
