"""The sub-layers of blocks: where an attention or a feed-forward network begins and where its output leaves."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_peft.engine import Kind, Target, TargetedMethod, TargetError, select_modules, select_targets
from lightning_peft.engine.limits import Patterns
from lightning_peft.engine.slots import base_class, plain_name
from lightning_peft.engine.targets import as_patterns, candidates, is_below, keep_layers, matches, module_target
from lightning_peft.parts.attention import is_cross
from lightning_peft.parts.blocks import find_blocks

SublayerKind = Literal["attention", "feedforward"]

_WORDS = {"attention": "attention", "feedforward": "feed-forward network"}


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward network of a block.

    Args:
        kind: which.
        block: name of the block.
        entry: the layer that reads its input first; an ``nn.MultiheadAttention`` as a whole.
        projection: the linear layer, or 1x1 convolution, that computes its output.
        exit: what computes its output before that is added to the residual stream: the projection, or the layer that
            scales what it gives, or an ``nn.MultiheadAttention`` as a whole.
        readers: all layers that read the input.
        norms: names of the block's norm layers of full width.
        crosses: it is an attention that looks at another sequence.
    """

    kind: SublayerKind
    block: str
    entry: Target
    projection: Target
    exit: Target
    readers: tuple[Target, ...]
    norms: tuple[str, ...]
    crosses: bool = False

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.projection.d_out


def find_sublayers(
    model: nn.Module,
    kinds: Sequence[SublayerKind] = ("attention", "feedforward"),
    blocks: str | Sequence[str] | None = None,
    who: str = "blocks",
    each: bool = True,
) -> list[Sublayer]:
    """The sub-layers of all blocks, block by block; of ``kinds`` alone.

    Where blocks are not named, all modules of their class are blocks. Sub-layers are told from structure. The linear
    layers and 1x1 convolutions below something that is called an attention form one, which ends at the last of them
    that is as wide as the block. Of the others, the last that is as wide ends the feed-forward network, which begins
    at the first of the same child of the block. A block that convolves over more than one place, but for channels by
    themselves and each place in turn, has none.

    Args:
        model: where to look.
        kinds: which are wanted.
        blocks: see `find_blocks`.
        who: how errors name the caller.
        each: each of ``kinds`` has to occur in some block; otherwise one of them has to.

    Raises:
        TargetError: there are no blocks, or no block has a sub-layer of one of ``kinds``.

    >>> block = lambda: nn.ModuleDict({"attn": nn.Linear(2, 2), "up": nn.Linear(2, 3), "down": nn.Linear(3, 2)})
    >>> [(s.kind, s.entry.name, s.exit.name) for s in find_sublayers(nn.ModuleList([block(), block()]))][:2]
    [('attention', '0.attn', '0.attn'), ('feedforward', '0.up', '0.down')]
    """
    names = find_blocks(model, blocks, who)
    everything = candidates(model)
    if blocks is None:
        # some stand alone where others form a list, as in the middle of a UNet
        alike = {base_class(model.get_submodule(name)) for name in names if _in_block(model, name, everything)}
        alike -= {nn.Sequential, nn.ModuleDict}
        names = [name for name, m in model.named_modules() if name in names or base_class(m) in alike]
    found = [s for name in names for s in _in_block(model, name, everything) if s.kind in kinds]
    for kind in kinds:
        if not any(s.kind == kind for s in found) and (each or not found):
            raise TargetError(
                f"{who}: none of {len(names)} blocks of {base_class(model).__name__} ({names[0]} to {names[-1]}) has "
                f"{'an' if kind == 'attention' else 'a'} {_WORDS[kind]}. Name other blocks in blocks=, or layers in "
                "target_modules= where the method takes them."
            )
    return found


@dataclass(frozen=True, kw_only=True)
class SublayerMethod(TargetedMethod):
    """A method that acts on the sub-layers of blocks.

    Args:
        target_modules: patterns of the layers to adapt; none by default, and the sub-layers are found by themselves.
        blocks: path of the list of blocks, or patterns of several, where they are not found by themselves.
        train_norms: train every normalisation layer beside the adapters.
        exclude_modules: patterns of sub-layers that are left out, each named by the layer where its output leaves.
        layers_to_transform: see `TargetedMethod`; so for ``modules_to_save``.

    Attributes:
        sublayers: the kinds of them that are adapted.
        each_sublayer: each of these kinds has to occur in the model; otherwise one of them has to.
        layers: the kinds of layers that can be named in ``target_modules``.
    """

    acts_on: ClassVar = "blocks"
    sublayers: ClassVar[tuple[SublayerKind, ...]] = ("feedforward",)
    each_sublayer: ClassVar[bool] = True
    layers: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    target_modules: Patterns = ()
    blocks: Patterns | None = None
    train_norms: bool = False

    def named(self, model: nn.Module) -> list[Target]:
        """The layers that ``target_modules`` names, less those that are trained whole."""
        who = type(self).__name__
        whole = select_modules(model, self.modules_to_save, who=who, parameters=True)
        chosen = select_targets(
            model,
            self.layers,
            self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            who=who,
        )
        return [t for t in chosen if not any(is_below(t.name, name) for name in whole)]

    def found(self, model: nn.Module) -> list[Sublayer]:
        """The sub-layers of ``model`` to adapt.

        Raises:
            TargetError: there are none, or a pattern matches none of them.
        """
        who = type(self).__name__
        everything = find_sublayers(model, self.sublayers, self.blocks, who, self.each_sublayer)
        chosen = {s.exit.name for s in everything}
        for pattern in as_patterns(self.exclude_modules):
            left_out = {s.exit.name for s in everything for t in (s.exit, s.projection) if _named(model, pattern, t)}
            if not left_out:
                raise TargetError(
                    f"{who}: exclude_modules {pattern!r} matched no sub-layer of {base_class(model).__name__}. They "
                    f"are named by their last layers: {', '.join(s.exit.name for s in everything[:2])}, ..."
                )
            chosen -= left_out
        if self.layers_to_transform is not None:
            chosen = keep_layers(chosen, self.layers_to_transform, who)
        whole = select_modules(model, self.modules_to_save, who=who, parameters=True)
        chosen -= {name for name in chosen if any(is_below(name, other) for other in whole)}
        if not chosen:
            raise TargetError(
                f"{who}: exclude_modules and modules_to_save leave no sub-layer of {len(everything)} to adapt. "
                "Leave fewer of them out."
            )
        return [s for s in everything if s.exit.name in chosen]

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """``modules_to_save``, and the norm layers if they train."""
        names = super().trained_in_place(model)
        if self.train_norms:
            norms = [(name, m) for name, m in model.named_modules() if _size_of_norm(m) is not None]
            names += [f"{name}.{key}" for name, m in norms for key, p in m._parameters.items() if p is not None]
        return list(dict.fromkeys(names))


def n_heads(model: nn.Module, attention: Target) -> int | None:
    """How many heads write to the input of the output projection ``attention``; None if no module around it tells."""
    path = attention.owner.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) - 1, 0, -1)]
    for module in around:
        inside = [child for child in module.children() if _is_attention(child, "")]
        for holder in (module, *inside, getattr(module, "config", None)):
            for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead"):
                value = getattr(holder, name, None)
                if type(value) is int and value > 0 and attention.d_in % value == 0:
                    return value
    return None


def keys_and_values(reader: Target, attention: Sublayer) -> tuple[int, tuple[int, ...]]:
    """How many equal parts the output of ``reader`` has, and which of them are keys or values of ``attention``.

    A layer that is three times as wide as the block makes queries, keys and values, in this order; others go by their
    names.
    """
    if attention.kind == "attention":
        if len(attention.readers) == 1 and reader.d_out == 3 * attention.width:
            return 3, (1, 2)
        if re.search(r"(^|_)(k|key|v|value)(_|$)", reader.name.split(".")[-1]):
            return 1, (0,)
    return 1, ()


def _in_block(model: nn.Module, block: str, everything: list[Target]) -> list[Sublayer]:
    module = model.get_submodule(block)
    inside = [t for t in everything if not block or t.owner == block or t.owner.startswith(block + ".")]
    # an nn.MultiheadAttention counts once, as its output projection
    layers = [t for t in inside if _mixes_channels(t) and t.site.weight in ("weight", "")]
    # of a block with two streams, that of the samples counts
    layers = [t for t in layers if not re.search(r"(\b|_)(context|add)(\b|_)", _inner(t.owner, block))] or layers
    norms = _norms(module)
    width = _width(layers, norms, lambda name: "." in name)
    groups: dict[str | None, list[Target]] = {}
    for layer in layers:
        groups.setdefault(_attention_around(module, _inner(layer.owner, block)), []).append(layer)
    rest = groups.pop(None, [])
    if rest and not groups and _is_attention(module, block.rpartition(".")[2]):
        groups, rest = {"": rest}, []  # the block is one
    own = tuple(_outer(block, name) for name, size in norms.items() if size == width)
    found = [
        _attention(model, block, group, width, path, own, inside) for path, group in groups.items() if path is not None
    ]
    if not any(_convolves(m) for m in module.modules()):
        found.append(_feedforward(model, block, rest, width, own))
    return [sublayer for sublayer in found if sublayer is not None]


def _attention(
    model: nn.Module, block: str, group: list[Target], width: int, path: str, norms: tuple[str, ...], inside: list[Any]
) -> Sublayer | None:
    ends = [t for t in group if t.d_out == width]
    if not ends:
        return None
    end, whole = ends[-1], _outer(block, path)
    parent = end.owner.rpartition(".")[0]
    crosses = is_cross(_inner(parent, block), model.get_submodule(whole))
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        attention = module_target(model, parent, width)
        readers = tuple(t for t in inside if t.owner == parent)
        return Sublayer("attention", block, attention, end, attention, readers, norms, crosses)
    readers = tuple(t for t in group if t is not end and t.d_in == width) or (end,)
    return Sublayer("attention", block, readers[0], end, _exit(model, block, end, whole), readers, norms, crosses)


def _feedforward(
    model: nn.Module, block: str, rest: list[Target], width: int, norms: tuple[str, ...]
) -> Sublayer | None:
    ends = [t for t in rest if t.d_out == width]
    if not ends:
        return None
    end = ends[-1]
    child = _inner(end.owner, block).partition(".")[0]
    before = rest[: rest.index(end) + 1]
    together = [t for t in before if _inner(t.owner, block).partition(".")[0] == child]
    members = together if len(together) > 1 else before
    readers = tuple(t for t in members if t is not end and t.d_in == width) or (end,)
    return Sublayer(
        "feedforward", block, readers[0], end, _exit(model, block, end, _outer(block, child)), readers, norms
    )


def _exit(model: nn.Module, block: str, end: Target, sublayer: str) -> Target:
    """``end``, or the layer of the block behind ``sublayer`` that scales its features one by one."""
    if end.site.kind == "linear" and sublayer != block:
        children = list(model.get_submodule(block).named_children())
        child = _inner(sublayer, block).partition(".")[0]
        behind = [name for name, _ in children].index(child) + 1
        for name, module in children[behind : behind + 1]:
            sizes = [tuple(p.shape) for p in module._parameters.values() if p is not None]
            if "scale" in base_class(module).__name__.lower() and sizes == [(end.d_out,)]:
                return module_target(model, _outer(block, name), end.d_out)
    return _called(model, end)


def _called(model: nn.Module, target: Target) -> Target:
    # a layer that does more to its weight than is known is changed as a whole
    return module_target(model, target.owner, target.d_out) if target.site.read else target


def _mixes_channels(target: Target) -> bool:
    module: Any = target.module
    one_place = target.site.kind == "conv" and set(target.shape[2:]) == {1} and module.groups == 1
    return target.site.kind == "linear" or one_place


def _convolves(module: Any) -> bool:
    """Whether it mixes channels of more than one place, or leaves places out."""
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(module.kernel_size) != {1}
    return convolution and (module.groups != module.in_channels or set(module.stride) != {1})


def _attention_around(block: nn.Module, path: str) -> str | None:
    """Path of the outermost attention in ``block`` that holds the layer at ``path``, or is it."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        module = block.get_submodule(".".join(parts[:depth]))
        # of a list of attentions, each is one
        if not isinstance(module, nn.ModuleList) and _is_attention(module, " ".join(parts[:depth])):
            return ".".join(parts[:depth])
    return None


def _is_attention(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    words = f"{name} {base_class(module).__name__}".lower()
    return _size_of_norm(module) is None and re.search(r"attn|attention|\bmha|(\b|_)att(\b|_)", words) is not None


def _norms(block: nn.Module) -> dict[str, int]:
    """Path of each norm layer in ``block`` -> how many features it normalises."""
    sizes = {name: _size_of_norm(module) for name, module in block.named_modules() if name}
    return {name: size for name, size in sizes.items() if size is not None}


def _size_of_norm(module: nn.Module) -> int | None:
    known = "norm" in base_class(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    if not known or dict(module.named_children()).keys() - {"adapters"}:
        return None
    weight = module._parameters.get("weight")
    if weight is not None:
        return weight.numel() if weight.dim() == 1 else None
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if shape is not None and len(shape) == 1 else getattr(module, "num_features", None)


def _width(layers: list[Target], norms: dict[str, int], nested: Callable[[str], bool]) -> int:
    """What most norm layers of the block itself say; else those within its children, else most of its layers."""
    own = [size for name, size in norms.items() if not nested(name)]
    votes = own or list(norms.values()) or [n for t in layers for n in (t.d_in, t.d_out)]
    return Counter(votes).most_common(1)[0][0] if votes else 0


def _named(model: nn.Module, pattern: str, target: Target) -> bool:
    """Whether ``pattern`` selects ``target`` or something around it."""
    parts = target.owner.split(".")
    around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(matches(pattern, plain_name(name), model.get_submodule(name)) for name in around)


def _inner(name: str, block: str) -> str:
    return name[len(block) :].lstrip(".") if block else name


def _outer(block: str, name: str) -> str:
    return f"{block}.{name}".strip(".")
