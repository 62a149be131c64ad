"""Soft tokens of a text: trained tokens that each of the first blocks of a denoiser sees beside those of the text.

The module that is called makes them, of a table and the time step, and hands them through to its blocks; each block
puts its own beside the text and leaves those of the block before behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prefix import normal
from lightning_peft.engine import Adapter, AdapterError, Layer, Target, TargetError
from lightning_peft.engine.errors import joined, nearest
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import base_modules, candidates, module_target
from lightning_peft.parts.attention import find_attentions, widths_of
from lightning_peft.parts.condition import (
    TEXT,
    call_with,
    cross_attentions,
    entries,
    given_to,
    handed_through,
    takes,
)
from lightning_peft.parts.tokens import ROTARY, parameters_of

_TIME = "timestep"
_TOKENS = "soft_tokens"
_MASK = "encoder_attention_mask"
_STEPS = 1000  # those that a table of time is for
_STD = 0.02

Stage = Literal["down", "mid", "up"]
STAGES: dict[Stage, str] = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}

# what makes a text as wide as the blocks, by its customary names
_PROJECTIONS = ("context_embedder", "caption_projection")


@dataclass(frozen=True)
class SoftTarget(Target):
    """The denoiser, which makes the tokens, or a block that sees some of them.

    Args:
        index: place among the blocks that look at the text; None for the denoiser.
        start: tokens of the text that stay in front of them.
        context: C, features of the text in the blocks.
        given: features of the text as the denoiser is given it, and of a token in the table.
        rows: for each block the row of the table that it sees, or None.
        projection: name of the part of the denoiser that makes C features of those; empty if they are C.
    """

    index: int | None
    start: int
    context: int
    given: int
    rows: tuple[int | None, ...]
    projection: str

    @property
    def n_tables(self) -> int:
        """K, how many blocks have tokens of their own."""
        return len({row for row in self.rows if row is not None})


def soft_targets(
    model: nn.Module, n_layers: int, stages: Sequence[Stage], module: str | None, who: str
) -> list[SoftTarget]:
    """The denoiser in ``model`` and all its blocks that look at the text.

    Args:
        model: where to look.
        n_layers: how many of the first blocks get tokens, in a list of blocks.
        stages: which blocks share some, where a denoiser goes down and up again.
        module: path of the denoiser, where there are several.
        who: how errors name the caller.

    Raises:
        TargetError: there is none, or several; or its blocks are of a form that is not known.
    """
    found = {name: places for name in entries(model, TEXT, _TIME) if (places := _places(model.get_submodule(name)))}
    if module is not None and module not in found:
        raise TargetError(
            f"{who}: module {module!r} is no denoiser that looks at a text.{nearest(module, found)} Those that do: "
            f"{joined([*found]) or 'none'}."
        )
    if not found:
        raise TargetError(
            f"{who}: {base_class(model).__name__} holds no module that is given a text ({TEXT}) and a {_TIME}, with "
            "blocks that look at the text and hand arguments through to their attentions. Choose a denoiser such as "
            "SD3Transformer2DModel or UNet2DConditionModel."
        )
    if module is None and len(found) > 1:
        raise TargetError(
            f"{who}: {len(found)} modules look at a text ({joined([*found])}). Name the denoiser among them as module=."
        )
    entry = next(iter(found)) if module is None else module
    denoiser, places = model.get_submodule(entry), found[entry]
    rows: tuple[int | None, ...]
    if None in places.values():
        _check_positions(denoiser, [*places], who)
        rows = tuple(i if i < n_layers else None for i in range(len(places)))
        start, projection = 0, next((n for n in _PROJECTIONS if isinstance(getattr(denoiser, n, None), nn.Module)), "")
    else:
        rows = tuple(0 if stage in stages else None for stage in places.values())
        start, projection = 1, ""  # behind the token that begins the text
    wanted = [name for name, row in zip(places, rows, strict=True) if row is not None]
    if not wanted:
        there = joined([*dict.fromkeys(map(str, places.values()))])
        raise TargetError(
            f"{who}: none of stages={tuple(stages)} looks at a text. Name some of those that do: {there}."
        )
    context = _context(denoiser, wanted, who)
    given = context if not projection else candidates(denoiser.get_submodule(projection))[0].d_in
    facts: dict[str, Any] = {"start": start, "context": context, "given": given, "rows": rows, "projection": projection}
    paths = {None: entry} | {i: f"{entry}.{name}".lstrip(".") for i, name in enumerate(places)}
    targets = []
    for index, path in paths.items():
        target = module_target(model, path, context)
        targets.append(SoftTarget(target.name, target.module, target.site, target.owner, index=index, **facts))
    return targets


def _places(denoiser: nn.Module) -> dict[str, Stage | None]:
    """Name -> stage of the blocks that look at the text; None for those in a list, the first of such blocks alone."""
    found: dict[str, Stage | None] = {}
    for stage, name in STAGES.items():
        part = getattr(denoiser, name, None)
        blocks = part.named_children() if isinstance(part, nn.ModuleList) else [("", part)]
        for key, block in blocks:
            if isinstance(block, nn.Module) and _looks(block):
                found[f"{name}.{key}".rstrip(".")] = stage
    lists = [
        (n, m) for n, m in base_modules(denoiser) if isinstance(m, nn.ModuleList) and len(m) and all(map(_looks, m))
    ]
    return found or {f"{name}.{key}": None for name, blocks in lists[:1] for key, _ in blocks.named_children()}


def _looks(module: nn.Module) -> bool:
    return takes(module, TEXT) and handed_through(module) is not None


def _check_positions(denoiser: nn.Module, names: Sequence[str], who: str) -> None:
    for name in names:
        rotary = [parameter for parameter in parameters_of(denoiser.get_submodule(name)) if ROTARY.search(parameter)]
        if rotary:
            raise TargetError(
                f"{who}: {name!r} is given a table of positions ({rotary[0]}) made for the tokens of text and image "
                "alone. Choose a model whose text has no positions there, such as SD3."
            )


def _context(denoiser: nn.Module, names: Sequence[str], who: str) -> int:
    """The features of the text that the blocks ``names`` look at."""
    found = set()
    for name in names:
        block = denoiser.get_submodule(name)
        crossing = cross_attentions(block)
        for key, attention in find_attentions(block).items():
            added = getattr(attention, "add_k_proj", None)
            if isinstance(added, nn.Module):  # it looks at the text beside what it looks at as others do
                found.add(candidates(added)[0].d_in)
            elif key in crossing:
                found.add(widths_of(attention).context)  # type: ignore[union-attr]  # it is an attention
    if len(found) != 1:
        widths = ", ".join(map(str, sorted(found))) or "no"
        raise TargetError(
            f"{who}: the blocks {joined(names)} look at texts of {widths} features, by attentions that are known. "
            "Choose a model whose blocks look at one text, of one width."
        )
    return found.pop()


class SoftTokens(Adapter):
    """Makes the tokens: ``table[k] + times[t]`` for block k at time step t, the table through a frozen projection.

    Args:
        target: the denoiser.
        p: tokens of each block.
        n_times: rows of the table of time; None for none.
        who: how errors name the method.
    """

    def __init__(self, target: SoftTarget, p: int, n_times: int | None, who: str) -> None:
        super().__init__()
        self.rows, self.projection, self.who = target.rows, target.projection, who
        self.table = target.new_parameter(target.n_tables, p, target.given)
        if n_times is not None:
            self.times = target.new_parameter(n_times, target.n_tables * target.context)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """N(0, 0.02^2)."""
        for parameter in self.parameters():
            normal(parameter, _STD, generator)

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the denoiser answers when its blocks are handed the tokens."""
        given = given_to(x, layer)
        text = given.get(TEXT)
        if not isinstance(text, Tensor) or text.dim() != 3:
            seen = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise AdapterError(
                f"{self.who}: the denoiser was given {seen} as {TEXT}. Give the tokens of a text (B, n, features)."
            )
        through: str = handed_through(layer.module)  # type: ignore[assignment]  # it was chosen for that
        more = given.get(through) or {}
        if more.get("attention_mask") is not None:
            raise AdapterError(
                f"{self.who}: {through} has an attention_mask, made for the text without further tokens. Leave it out, "
                f"or give a mask of the text as {_MASK}."
            )
        tokens = self.tokens(text, given.get(_TIME), layer.module)
        own = tuple(None if row is None else tokens[row] for row in self.rows)
        others = more[_TOKENS][1] if _TOKENS in more else ()
        given[through] = {**more, _TOKENS: (text.shape[1], (*others, own))}
        return call_with(layer, given)

    def tokens(self, text: Tensor, time: Any, denoiser: nn.Module) -> tuple[Tensor, ...]:
        """For each row of the table (B, p, C), or (1, p, C) where all samples see the same."""
        table = self.table.to(text.dtype)
        if self.projection:
            table = denoiser.get_submodule(self.projection)(table)
        if not hasattr(self, "times"):
            return table[:, None].unbind()
        steps = torch.as_tensor(time, device=text.device).reshape(-1)
        if len(steps) not in (1, len(text)):
            raise AdapterError(
                f"{self.who}: there are {len(steps)} time steps for {len(text)} texts. Give one, or one for each."
            )
        n = len(self.times)
        row = (steps.long() * n).div(_STEPS, rounding_mode="floor").clamp(0, n - 1)
        times = self.times[row].unflatten(1, (len(table), 1, -1)).transpose(0, 1)  # (K, B, 1, C)
        return (table[:, None] + times.to(table.dtype)).unbind()

    def unmergeable_because(self) -> str:
        """Tokens are no weights."""
        return "soft tokens are no weights."


class SoftBlock(Adapter):
    """Puts the tokens of a block beside the text that it is given.

    Args:
        target: the block.
        who: how errors name the method.
    """

    def __init__(self, target: SoftTarget, who: str) -> None:
        super().__init__()
        self.name, self.who, self.context = target.name, who, target.context
        self.start, self.index = target.start, target.index or 0

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the block answers."""
        given = given_to(x, layer)
        through: str = handed_through(layer.module)  # type: ignore[assignment]  # it was chosen for that
        more = dict(given.get(through) or {})
        if _TOKENS not in more:
            raise AdapterError(
                f"{self.who}: the block {self.name!r} was called without its tokens. Call the whole denoiser, which "
                "makes them of the time step and hands them through to its blocks."
            )
        handed = more.pop(_TOKENS)
        if any(isinstance(other, SoftBlock) for other in layer.below):
            more[_TOKENS] = None  # all of them come in here
        if handed is not None:
            given |= self.longer(given, *handed)
        given[through] = more or None
        return call_with(layer, given)

    def longer(self, given: dict[str, Any], n: int, prompts: Sequence[Sequence[Tensor | None]]) -> dict[str, Any]:
        """Text and mask with the tokens of this block, out of those of all blocks, for a text of n tokens."""
        text = given[TEXT]
        own = [tokens for prompt in prompts if (tokens := prompt[self.index]) is not None]
        if text.shape[1] < n or (self.index == 0 and text.shape[1] > n) or text.shape[2] != self.context:
            raise AdapterError(
                f"{self.who}: the block {self.name!r} was given a text {tuple(text.shape)}; expected {n} tokens, "
                f"as the denoiser was given, of {self.context} features. Choose a model that leaves the text as it is "
                "before its blocks, but for a projection."
            )
        text = text[:, text.shape[1] - n :]  # without those of the block before
        rows = [tokens.to(text.dtype).expand(len(text), -1, -1) for tokens in own]
        changed = {TEXT: torch.cat([text[:, : self.start], *rows, text[:, self.start :]], dim=1)}
        mask = given.get(_MASK)
        if isinstance(mask, Tensor) and mask.shape[-1] == n and rows:
            # one where there is a token; or what is added to the scores
            is_open = mask.dim() == 2 or mask.dtype == torch.bool
            new = mask.new_full((*mask.shape[:-1], sum(row.shape[1] for row in rows)), int(is_open))
            changed[_MASK] = torch.cat([mask[..., : self.start], new, mask[..., self.start :]], dim=-1)
        return changed

    def unmergeable_because(self) -> str:
        """Tokens are no weights."""
        return "soft tokens are no weights."
