"""Layouts of features: tokens (B, N, C), maps with the channels last (B, h, w, C) or first (B, C, h, w).

Which axis holds the channels is known from the layers of a block, never from comparing sizes; how tokens lie in a grid,
from what the first layer of the model answered with.
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import AdapterError, Site, Target, TargetError
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import base_modules, sites

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FIRST = (*CONVOLUTIONS, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class Entered(NamedTuple):
    """What a model was given: the input ``x`` of its first layer, and how many places it has along each axis.

    ``x`` is (B, C, ...) where ``is_map``, else (B, ..., C).
    """

    x: Tensor
    size: tuple[int, ...]
    is_map: bool


def entered(x: Tensor, y: Tensor, module: nn.Module) -> Entered:
    """What the model was given, seen at its first layer ``module``, which was given ``x`` and answered ``y``."""
    if isinstance(module, CONVOLUTIONS):
        return Entered(x, tuple(y.shape[2:]), True)
    x = y if isinstance(module, nn.Embedding) else x
    return Entered(x, tuple(x.shape[1:-1]), False)


def own_place(module: nn.Module) -> int:
    """Where, in what a block answers, the stream of its first input is; 0 where it answers one, or cannot be told.

    Blocks of two streams, image and text, answer both, in either order. Which is which is read off the names that their
    forward returns.
    """
    forward = inspect.unwrap(base_class(module).forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # typed in, or compiled
        return 0
    own = next(iter([*inspect.signature(forward).parameters][1:]), None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            names = [part.id if isinstance(part, ast.Name) else None for part in node.value.elts]
            if own in names:
                return names.index(own)
    return 0


def own_of(answer: Any, place: int) -> Any:
    """What a block answers, or the part of it at ``place`` if it answers several."""
    return answer[place] if isinstance(answer, tuple | list) else answer


def with_own(answer: Any, place: int, new: Tensor) -> Any:
    """``answer`` with ``new`` in the place of its own stream."""
    return (*answer[:place], new, *answer[place + 1 :]) if isinstance(answer, tuple) else new


def layers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, Site]]:
    """(name, layer, site) of the layers below ``module`` whose kind is known, in the order in which they are stored."""
    for name, layer in base_modules(module):
        yield from ((name, layer, site) for site in sites(layer))


def channels_first(module: nn.Module) -> bool:
    """Whether ``module`` answers with its channels on axis 1: its first layer is a convolution, or a norm of such maps.

    A convolution of each channel of a sequence by itself does not tell: blocks of tokens have such inside (Mamba).

    >>> channels_first(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4))), channels_first(nn.LayerNorm(4))
    (True, False)
    """
    for _, layer, _ in layers_of(module):
        if not (isinstance(layer, nn.Conv1d) and layer.groups == layer.in_channels > 1):
            return isinstance(layer, _FIRST) or "2d" in base_class(layer).__name__.lower()
    return False


def convolves(module: nn.Module) -> bool:
    """Whether a convolution in ``module`` looks at more than one place, so that its tokens have to lie in a grid.

    >>> convolves(nn.Sequential(nn.Conv2d(3, 4, 1))), convolves(nn.Conv1d(3, 4, 3))
    (False, True)
    """
    return any(isinstance(part, CONVOLUTIONS) and max(part.kernel_size) > 1 for part in module.modules())


def width_of(module: nn.Module, name: str, who: str) -> int:
    """Features that ``module`` answers with: those of its last layer.

    Raises:
        TargetError: none of its layers is known.
    """
    own = [Target(key, layer, site, key) for key, layer, site in layers_of(module) if site.weight in ("weight", "")]
    widths = [target.d_out for target in own]
    if not widths:
        raise TargetError(
            f"{who}: the width of {name!r}, a {base_class(module).__name__}, cannot be told: it holds no linear layer, "
            "convolution or norm. Name modules with such layers in taps."
        )
    return int(widths[-1])


def width_in(module: nn.Module, name: str, who: str) -> int:
    """Features that ``module`` is given: as many as it answers with, unless it begins with a convolution."""
    if channels_first(module):
        first = next(layer for _, layer, _ in layers_of(module))
        if isinstance(first, CONVOLUTIONS):
            return int(first.in_channels)
    return width_of(module, name, who)


def to_last(x: Tensor, first: bool) -> Tensor:
    """(..., C) of features whose channels are on axis 1 if ``first``; a view."""
    return x.movedim(1, -1) if first else x


def from_last(x: Tensor, first: bool) -> Tensor:
    """The inverse of `to_last`."""
    return x.movedim(-1, 1) if first else x


def grid_of(h: Tensor, first: bool, entered: tuple[int, ...], who: str) -> tuple[tuple[int, ...], int]:
    """(places along each axis, tokens in front of them) of ``h`` (B, ..., C), in a model entered with ``entered``.

    Tokens lie as the first layer left them, each axis divided by the same number where stages merged them; what is
    more in number stands in front: class, distillation, register tokens.

    Args:
        h: channels last.
        first: whether the model keeps its channels first, so that there are no tokens.
        entered: places along each axis, behind the first layer.
        who: how errors name the caller.

    Raises:
        AdapterError: the number of tokens fits in no such way.

    >>> [grid_of(torch.empty(1, n, 8), False, (4, 6), "taps") for n in (24, 25, 6)]
    [((4, 6), 0), ((4, 6), 1), ((2, 3), 0)]
    """
    places = tuple(h.shape[1:-1])
    if first or len(places) > 1:
        return places, 0
    n, all_places = places[0], math.prod(entered)
    if n >= all_places:
        return entered, n - all_places
    factor = round((all_places / n) ** (1 / len(entered)))
    merged = tuple(size // factor for size in entered)
    if math.prod(merged) != n or any(size % factor for size in entered):
        raise AdapterError(
            f"{who}: {n} tokens cannot lie in the grid {' x '.join(map(str, entered))} that the first layer of the "
            "model made. Name another first layer (entry=), or blocks that keep the tokens (taps=)."
        )
    return merged, 0


def as_map(h: Tensor, size: tuple[int, ...], prefix: int) -> tuple[Tensor, Tensor | None]:
    """Tokens or a map (B, ..., C) as a map (B, C, *size) and the ``prefix`` tokens in front of it."""
    if h.dim() == 3:
        return h[:, prefix:].unflatten(1, size).movedim(-1, 1), h[:, :prefix] if prefix else None
    return h.movedim(-1, 1), None


def from_map(x: Tensor, tokens: bool, prefix: Tensor | None = None) -> Tensor:
    """The inverse of `as_map`: a map (B, C, *size) as (B, ..., C), or as ``tokens`` behind those of ``prefix``."""
    x = x.movedim(1, -1)
    if tokens:
        x = x.flatten(1, -2)
    return x if prefix is None else torch.cat([prefix.to(x.dtype), x], dim=1)


def resample(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map (B, C, ...) at another ``size``: averaged where it shrinks, interpolated linearly where it grows."""
    now = tuple(x.shape[2:])
    if now == size:
        return x
    if all(new <= old for new, old in zip(size, now, strict=True)):
        return F.interpolate(x, size, mode="area")
    return F.interpolate(x, size, mode={1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)], align_corners=False)
