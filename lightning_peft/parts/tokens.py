"""Where a model takes tokens: the part that embeds the ids of a text, or the stack of its blocks."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_peft.engine import Target, TargetError
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.slots import base_class, is_slot, plain_name
from lightning_peft.engine.targets import is_below, module_target
from lightning_peft.parts.attention import find_attentions, widths_of
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.layout import convolves

# tokens of their own that models put before those of the input: (1, n, D), or (D,) for one
_CLASS_TOKENS = frozenset(
    {"cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "reg_token", "register_tokens"}
)
_POSITIONS = re.compile(r"\b(wpe|(embed_)?positions?(_embeddings?)?|position_embedding)$")
ROTARY = re.compile(r"rope|rotary|position_embeddings|freqs|position_bias")


@dataclass(frozen=True)
class TokenTarget(Target):
    """A module that is given more tokens than its caller knows of.

    Args:
        place: the module embeds the ids of a ``"text"``; it is the ``"decoder"`` that looks at that text; a ``"block"``
            of tokens (batch, n, width); or a block that looks at ``"windows"`` of a grid.
        start: how many tokens stay before the new ones.
        inserts: the new tokens come in here.
        removes: and leave behind it.
        causal: a token sees those before it only.
        limit: positions that the model has; None if there is no end.
        patch: pixels of a patch.
    """

    place: Literal["text", "decoder", "block", "windows"]
    start: int = 0
    inserts: bool = True
    removes: bool = True
    causal: bool = False
    limit: int | None = None
    patch: int = 1


def token_target(model: nn.Module, name: str, width: int, **facts: Any) -> TokenTarget:
    """The module ``name`` of ``model`` as a target, with what is known of it."""
    target = module_target(model, name, width)
    return TokenTarget(target.name, target.module, target.site, target.owner, **facts)


def text_targets(
    model: nn.Module, p: int, who: str, module: str | None = None, class_tokens: int | None = None
) -> list[TokenTarget]:
    """The part of ``model`` that embeds ids, and a decoder that looks at what it answers; empty if there is none.

    Args:
        model: where to look.
        p: how many tokens it will get.
        who: how errors name the caller.
        module: its path, where there are several.
        class_tokens: tokens that stay in front; None for one in models that look both ways, none in others.

    Raises:
        TargetError: there are several, or none of that path, or it has too few positions.
    """
    found = text_parts(model)
    pairs = encoders_and_decoders(model)
    decoders = {decoder for _, decoder in pairs}
    if module is not None:
        if module not in found:
            raise TargetError(
                f"{who}: module {module!r} embeds no text.{nearest(module, found)} Those that do: "
                f"{', '.join(map(repr, found)) or 'none'}."
            )
        chosen = [module]
    else:
        chosen = [name for name in found if name not in decoders]
    if len(chosen) > 1:
        raise TargetError(
            f"{who}: {len(chosen)} parts embed text ({', '.join(chosen)}). Name one as module={chosen[0]!r}."
        )
    targets = []
    for name in chosen:
        part, decoder = found[name], next((d for encoder, d in pairs if encoder == name), None)
        causal = is_causal(part)
        start = class_tokens if class_tokens is not None else int(not causal and decoder is None)
        limit = positions_of(part)
        if limit is not None and p >= limit:
            raise TargetError(
                f"{who}: num_virtual_tokens={p}, but {base_class(part).__name__} has {limit} positions for them and "
                "the text. Ask for fewer, or use a model of longer texts."
            )
        width = part.get_input_embeddings().embedding_dim
        facts: dict[str, Any] = {"place": "text", "start": start, "causal": causal, "limit": limit}
        targets.append(token_target(model, name, width, removes=decoder is None, **facts))
        if decoder is not None:
            targets.append(token_target(model, decoder, width, place="decoder", inserts=False, removes=False))
    return targets


def text_parts(model: nn.Module) -> dict[str, Any]:
    """Name -> module of the parts that embed ids, the innermost ones."""
    found = {name: part for name, part in model.named_modules() if embedding_of(part) is not None}
    outer = {name for name in found if any(o != name and (not plain_name(name) or is_below(o, name)) for o in found)}
    return {name: part for name, part in found.items() if name not in outer}


def encoders_and_decoders(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each encoder that embeds ids, and of the decoder that looks at what it answers."""
    pairs = (_encoder_decoder(part, name) for name, part in model.named_modules())
    return [pair for pair in pairs if pair is not None]


def parameters_of(module: Any) -> tuple[str, ...]:
    """Names of what the forward of ``module`` takes."""
    if is_slot(module):
        return module._parameter_names
    return tuple(inspect.signature(module.forward).parameters)


def is_causal(part: nn.Module) -> bool:
    """As its attentions say; one that says nothing is, if it keeps a cache."""
    said = [m.is_causal for m in find_attentions(part).values() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(said) if said else keeps_cache(part)


def keeps_cache(module: nn.Module) -> bool:
    """Whether ``module`` is given a cache of earlier tokens."""
    return not {"cache", "past_key_values", "cache_params"}.isdisjoint(parameters_of(module))


def embedding_of(part: Any) -> nn.Embedding | None:
    """The layer by which ``part`` embeds ids, if it takes their embeddings in place of them."""
    if not callable(getattr(part, "get_input_embeddings", None)):
        return None
    if not {"inputs_embeds", "attention_mask"} <= set(parameters_of(part)):
        return None
    try:
        found = part.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def _encoder_decoder(part: nn.Module, name: str) -> tuple[str, str] | None:
    encoder, decoder = getattr(part, "encoder", None), getattr(part, "decoder", None)
    if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module) or embedding_of(encoder) is None:
        return None
    looks = "encoder_hidden_states" in parameters_of(decoder)
    return (f"{name}.encoder".lstrip("."), f"{name}.decoder".lstrip(".")) if looks else None


def positions_of(part: Any) -> int | None:
    """How many positions a table of trained ones has for tokens."""
    tokens = part.get_input_embeddings()
    for name, module in part.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and _POSITIONS.search(name):
            # some families leave the first rows out
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - unused
    return None


def stack_targets(
    model: nn.Module,
    who: str,
    *,
    deep: bool,
    blocks: str | Sequence[str] | None = None,
    class_tokens: int | None = None,
) -> list[TokenTarget]:
    """The blocks of ``model``, each of which is given more tokens.

    Args:
        model: where to look.
        who: how errors name the caller.
        deep: each block has tokens of its own; else the first inserts them, and behind the last they are removed.
        blocks: see `find_blocks`.
        class_tokens: tokens that stay in front; None for as many as the model says that it has.

    Raises:
        TargetError: a block does not take a sequence of any length.
    """
    names = find_blocks(model, blocks, who)
    attentions = find_attentions(model)
    inside = {name: [a for a in attentions if a.startswith(name + ".")] for name in names}
    for name in names:
        _check_block(model, name, [attentions[a] for a in inside[name]], who)
    biased = any(_has_bias(attentions[a]) for name in names for a in inside[name])
    parts = [part for name in names for part in model.get_submodule(name).modules()]
    windows = biased or any(getattr(part, "window_size", None) for part in parts)
    stacks = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if windows:
        _check_windows(model, names, deep, who)
    elif len(stacks) > 1:
        raise TargetError(
            f"{who}: there are {len(stacks)} stacks of blocks ({', '.join(stacks)}). Name the one that is to see the "
            f"prompt: blocks={stacks[0]!r}, say."
        )
    known, start = _class_tokens(model, names[0])
    if class_tokens is not None:
        if known and class_tokens > start:
            raise TargetError(
                f"{who}: class_tokens={class_tokens}, but {base_class(model).__name__} has {start} before its tokens. "
                "Leave class_tokens out, or give no more than that."
            )
        start = class_tokens
    place: Any = "windows" if windows else "block"
    last, targets = len(names) - 1, []
    for i, name in enumerate(names):
        width = widths_of(attentions[inside[name][0]]).d_in  # type: ignore[union-attr]  # it is an attention
        at = {"inserts": deep or i == 0, "removes": deep or i == last}
        targets.append(token_target(model, name, width, place=place, start=start, patch=_patch(model), **at))
    return targets


def _check_block(model: nn.Module, name: str, attentions: list[nn.Module], who: str) -> None:
    block = model.get_submodule(name)
    kind = base_class(block).__name__
    spatial = convolves(block)
    if spatial or not attentions:
        found = "convolutions over a grid" if spatial else "no attention, so the number of its tokens is fixed"
        raise TargetError(
            f"{who}: {name!r}, a {kind}, has {found}. Further tokens need blocks of attention: name them in blocks, or "
            "choose a method for the layers, such as LoRA."
        )
    given = parameters_of(block)
    rotary = [n for n in given if ROTARY.search(n)]
    if rotary and any(ROTARY.search(n.rpartition(".")[2]) for n, _ in model.named_modules()):
        raise TargetError(
            f"{who}: {name!r} is given a table of positions ({rotary[0]}) made for its tokens alone. Use PrefixTuning, "
            "or PromptTuning where the model embeds ids."
        )
    kept = [n for n in given if n in ("cache", "past_key_value", "past_key_values", "layer_past")]
    if kept:
        raise TargetError(
            f"{who}: {name!r} keeps the keys and values of its tokens ({kept[0]}), so it belongs to a language model. "
            "Use PromptTuning or PrefixTuning."
        )
    if any(isinstance(a, nn.MultiheadAttention) and not a.batch_first for a in attentions):
        raise TargetError(
            f"{who}: {name!r} takes tokens before samples (batch_first=False). Build it with batch_first=True."
        )


def _check_windows(model: nn.Module, names: list[str], deep: bool, who: str) -> None:
    for name in names:
        block = model.get_submodule(name)
        parts = [getattr(block, part, None) for part in ("norm1", "attn")]
        ours = all(isinstance(part, nn.Module) for part in parts) and hasattr(parts[1], "fused_attn")
        ours = ours and _has_bias(parts[1])
        if not ours:
            raise TargetError(
                f"{who}: {name!r}, a {base_class(block).__name__}, looks at windows, in a way that is not known here. "
                "Use a Swin of timm, or a method for the layers, such as LoRA."
            )
    if not deep:
        raise TargetError(
            f"{who}: {names[0]!r} looks at windows of a grid, through which no token is carried on. Use "
            "VPT(deep=True), where each block has its own."
        )


def _has_bias(attention: Any) -> bool:
    """Whether it adds a table of biases to the scores of its tokens, whose number is fixed by that."""
    return getattr(attention, "relative_position_bias_table", None) is not None


def _class_tokens(model: nn.Module, block: str) -> tuple[bool, int]:
    """(whether the model itself says it, how many tokens stand before those of the input)."""
    path = block.split(".")
    for depth in range(len(path) - 1, -1, -1):
        owner = model.get_submodule(".".join(path[:depth]))
        number = getattr(owner, "num_prefix_tokens", None)
        if isinstance(number, int):
            return True, number
        own = [p for n, p in owner.named_parameters() if n.rpartition(".")[2] in _CLASS_TOKENS]
        if own:
            return False, sum(1 if p.dim() == 1 else p.shape[-2] for p in own)
    return False, 0


def _patch(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size == module.stride:
            pixels = 1
            for length in module.kernel_size:
                pixels *= length
            return pixels
    return 1
