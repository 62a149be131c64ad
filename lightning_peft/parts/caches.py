"""Where a model keeps the keys and values of its tokens: the part that is given a cache, as transformers has them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.engine import AdapterError, TargetError
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import as_patterns, matches
from lightning_peft.parts.attention import find_attentions, heads_of, is_cross, widths_of
from lightning_peft.parts.tokens import (
    TokenTarget,
    encoders_and_decoders,
    is_causal,
    parameters_of,
    positions_of,
    text_parts,
    token_target,
)

CACHES = ("cache", "past_key_values")  # how transformers calls the argument, and called it before


@dataclass(frozen=True)
class Kept:
    """What a layer of the cache keeps of a token: the features of all its keys and of all its values, in ``heads``."""

    heads: int
    keys: int
    values: int


@dataclass(frozen=True)
class CacheTarget(TokenTarget):
    """A part of a model, with the layers of its cache."""

    layers: tuple[Kept, ...] = ()

    @property
    def width(self) -> int:
        """Features of the keys and values of all layers together."""
        return sum(kept.keys + kept.values for kept in self.layers)


def cache_target(model: nn.Module, p: int, who: str, patterns: str | Sequence[str] | None = None) -> CacheTarget:
    """The part of ``model`` that is given a cache; of an encoder and a decoder the decoder.

    Args:
        model: where to look.
        p: how many tokens the cache will hold before those of the text.
        who: how errors name the caller.
        patterns: which part it is, where there are several; None for the only one.

    Raises:
        TargetError: there is none, or there are several; a layer of its cache is not known; it has too few positions.
    """
    encoders = {encoder for encoder, _ in encoders_and_decoders(model)}
    takes = {name: part for name, part in text_parts(model).items() if {*CACHES} & {*parameters_of(part)}}
    found: dict[str, Any] = {name: part for name, part in takes.items() if name not in encoders}
    wanted = as_patterns(patterns)
    chosen = [n for n, part in found.items() if patterns is None or any(matches(q, n, part) for q in wanted)]
    if len(chosen) != 1:
        raise TargetError(
            f"{who}: a prefix in the cache is for one part that embeds text and keeps one, and {len(chosen)} parts of "
            f"{base_class(model).__name__} are meant. There are: {', '.join(map(repr, found)) or 'none'}. Name one in "
            "target_modules, or use place='attention'."
        )
    (name,) = chosen
    part, limit = found[name], positions_of(found[name])
    if limit is not None and p >= limit:
        raise TargetError(
            f"{who}: num_virtual_tokens={p}, but {base_class(part).__name__} has {limit} positions for them and the "
            "text. Ask for fewer, or use a model of longer texts."
        )
    facts = {"place": "text", "causal": is_causal(part), "limit": limit}
    target = token_target(model, name, part.get_input_embeddings().embedding_dim, **facts)
    return CacheTarget(**target.__dict__, layers=_layers(part, who))


def _layers(part: nn.Module, who: str) -> tuple[Kept, ...]:
    """What each layer of the cache of ``part`` keeps, in their order; its attentions know which layer they write."""
    layers: dict[int, Kept] = {}
    for name, attention in find_attentions(part).items():
        widths, heads, index = widths_of(attention), heads_of(attention), getattr(attention, "layer_idx", None)
        if not is_cross(name, attention) and widths is not None and heads and isinstance(index, int):
            layers[index] = Kept(heads, widths.keys, widths.values)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise TargetError(
            f"{who}: it is not known what {base_class(part).__name__} keeps in its cache: its attentions say that they "
            f"write the layers {sorted(layers)}. Use place='attention'."
        )
    return tuple(layers[index] for index in sorted(layers))


def tokens_in(cache: Any, who: str) -> int:
    """How many tokens ``cache`` holds; 0 if there is none.

    Raises:
        AdapterError: it does not say.
    """
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except (ValueError, AttributeError):
        raise AdapterError(
            f"{who}: {type(cache).__name__} does not say how many tokens it holds, so it is not known whether a text "
            "begins or goes on. Call the model with use_cache=False."
        ) from None


def empty_cache(part: Any, with_text: bool) -> Any:
    """A cache as ``part`` itself makes one; ``with_text`` for a decoder that keeps what it looks at there too.

    Raises:
        TargetError: it is no model of transformers.
    """
    library = sys.modules.get("transformers")
    if library is None or not hasattr(part, "config"):
        raise TargetError(f"{base_class(part).__name__} is no model of transformers: call it with an empty cache.")
    own, beside = (library.DynamicCache(config=part.config) for _ in range(2))
    return library.EncoderDecoderCache(own, beside) if with_text else own
