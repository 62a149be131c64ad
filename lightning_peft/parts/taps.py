"""Taps: where a network beside a model reads it, and where it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_peft.engine import Target, TargetError, select_modules
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import candidates, is_below, module_target
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.layout import CONVOLUTIONS, channels_first, convolves, width_in, width_of
from lightning_peft.parts.tokens import keeps_cache

Role = Literal["entry", "tap", "exit"]


@dataclass(frozen=True)
class Tap(Target):
    """A module that is tapped.

    Args:
        role: the entry keeps what the model was given; the exit holds the side network; a tap does neither.
        index: its place among the taps and exits; -2 for an entry that is none of them.
        first: whether its channels are on axis 1.
        enters: the model begins with it: it clears what an earlier forward has left, and keeps its input.
        width_in: features of its input.
        count: targets that belong together.
    """

    role: Role = "tap"
    index: int = 0
    first: bool = False
    enters: bool = False
    width_in: int = 0
    count: int = 0


def blocks_to_tap(model: nn.Module, taps: str | Sequence[str] | None, who: str, argument: str = "taps") -> list[str]:
    """Names of the blocks, in the order in which they are called.

    Args:
        model: where to look.
        taps: as ``blocks`` in `find_blocks`.
        who: how errors name the caller.
        argument: and what they call ``taps``.

    Raises:
        TargetError: there are no blocks, or blocks of several kinds, of which it cannot be told who is called when.
    """
    names = list(dict.fromkeys(find_blocks(model, taps, who)))
    lists = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if taps is None and len({_kind(name) for name in names}) > 1:
        raise TargetError(
            f"{who}: {base_class(model).__name__} holds several kinds of blocks, {', '.join(map(repr, lists[:4]))}, "
            "and it cannot be told which are called last. Name those to take, in the order of their calls: "
            f"{argument}={lists[-1]!r}, say."
        )
    return names


def taps_of(
    model: nn.Module, names: Sequence[str], who: str, *, exits: Sequence[str] = (), entry: str | None = ""
) -> list[Tap]:
    """The modules ``names`` as taps, in this order; before them the entry, if it is wanted.

    Args:
        model: where they are.
        names: their full names.
        who: how errors name the caller.
        exits: which of them are exits; the last one by default.
        entry: name of the first layer; None to find it, empty if the input of the model is not wanted.

    Raises:
        TargetError: a module has no known width, or takes its tokens before its samples.
    """
    exits = exits or names[-1:]
    found = []
    for index, name in enumerate(names):
        module = model.get_submodule(name)
        _check_batch_first(module, name, who)
        width, first = width_of(module, name, who), channels_first(module)
        found.append((name, width, "exit" if name in exits else "tap", index, first, width_in(module, name, who)))
    enters = names[0]
    if entry != "":
        enters = _entry(model, entry, names, who)
        if enters not in names:
            module = model.get_submodule(enters)
            given = _widths(module)
            found.insert(0, (enters, given[1], "entry", -2, isinstance(module, CONVOLUTIONS), given[0]))
    return [
        _tap(model, name, width, role, index, first, name == enters, w_in, len(found))
        for name, width, role, index, first, w_in in found
    ]


def _tap(model: nn.Module, name: str, width: int, *rest: Any) -> Tap:
    target = module_target(model, name, width)
    return Tap(target.name, target.module, target.site, target.owner, *rest)


def _widths(module: nn.Module) -> tuple[int, int]:
    """(features in, features out) of a layer that a model begins with."""
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding):  # its input are numbers: what it answers is what there is to see
        return module.embedding_dim, module.embedding_dim
    d_out, d_in = candidates(module)[0].shape[:2]
    return d_in, d_out


def axes_of(entry: Tap) -> int:
    """Along how many axes the input of a model lies: those of its first convolution; 1 where it is a sequence."""
    return len(entry.module.kernel_size) if isinstance(entry.module, CONVOLUTIONS) else 1


def _entry(model: nn.Module, entry: str | None, names: Sequence[str], who: str) -> str:
    """Name of the first layer of the model; of its first block, if nothing comes before it.

    Of the layers of a model of several towers, those count that lie in no tower beside the one that is tapped.
    """
    if entry is not None:
        return select_modules(model, entry, who)[0]
    aside = _towers_beside(model, names)
    layers = [t for t in candidates(model) if t.site.kind in ("linear", "conv", "embedding")]
    layers = [t for t in layers if not any(is_below(t.owner, tower) for tower in aside)]
    first = layers[0]
    if isinstance(first.module, nn.Embedding):  # an encoder-decoder may hold one that its towers call copies of
        weight = first.module.weight
        first = [t for t in layers if isinstance(t.module, nn.Embedding) and t.module.weight is weight][-1]
    return next((name for name in names if is_below(first.owner, name)), first.owner)


def _towers_beside(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The outermost modules that hold blocks of another kind than those in ``names``, and none of ``names``."""
    try:
        blocks = find_blocks(model)
    except TargetError:
        return set()
    tapped = {_kind(b) for b in blocks if any(is_below(b, name) or is_below(name, b) for name in names)}
    beside = set()
    for block in blocks:
        if _kind(block) not in tapped:
            path = block.split(".")
            outer = (".".join(path[:depth]) for depth in range(1, len(path) + 1))
            beside.add(next(o for o in outer if not any(is_below(name, o) for name in names)))
    return beside


def _kind(block: str) -> str:
    """Where blocks of the kind of ``block`` are held, in whatever stage."""
    return "".join(c for c in block.rpartition(".")[0] if not c.isdigit())


def _check_batch_first(module: nn.Module, name: str, who: str) -> None:
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention) and not part.batch_first:
            raise TargetError(
                f"{who}: {name!r} takes its tokens before its samples. Build the model with batch_first=True."
            )


def is_causal(module: nn.Module) -> bool:
    """Whether tokens look back alone, as a part of ``module`` says; if none does, whether it keeps a cache."""
    flags = (getattr(part, flag, None) for part in module.modules() for flag in ("is_causal", "is_decoder"))
    said = [flag for flag in flags if isinstance(flag, bool)]
    return any(said) if said else keeps_cache(module)


def looks_at_all(module: nn.Module) -> bool:
    """Whether ``module`` is a block of tokens with an attention that looks at all of them, not at windows or a map."""
    parts = dict(module.named_modules())
    attends = any("attn" in name or "attention" in name for name in parts)
    return attends and not channels_first(module) and not any(hasattr(part, "window_size") for part in parts.values())


def takes_any_number(module: nn.Module) -> bool:
    """Whether `looks_at_all` is true of ``module``, and nothing in it wants its tokens in a grid."""
    return looks_at_all(module) and not convolves(module)
