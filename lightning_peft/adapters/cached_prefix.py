"""A prefix in the cache of a model: trained keys and values that it takes for those of tokens which it has read."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.prefix import Trunk, normal, uniform
from lightning_peft.adapters.prompts import Prompt, TextTokens, Tokens, documents
from lightning_peft.engine import AdapterError, Layer
from lightning_peft.engine.slots import base_class
from lightning_peft.parts.caches import CACHES, CacheTarget, empty_cache, tokens_in


class KeysAndValues(Prompt):
    """(p, W): of each layer its keys and then its values, W features together.

    Args:
        target: the part with the cache.
        p: tokens of the prefix.
        init_std: standard deviation of the start, without a trunk.
        hidden: inner features of the small network that makes them; None trains them directly.
    """

    def __init__(self, target: CacheTarget, p: int, init_std: float, hidden: int | None) -> None:
        nn.Module.__init__(self)
        self.p, self.init_std, self.trunk = p, init_std, None
        if hidden is None:
            self.table = target.new_parameter(p, target.width)
        else:
            self.trunk = Trunk(target, p, hidden)
            self.weight, self.bias = target.new_parameter(target.width, hidden), target.new_parameter(target.width)

    def reset(self, generator: torch.Generator, embedding: nn.Embedding | None) -> None:
        """N(0, init_std^2); with a trunk, as its layers are."""
        if self.trunk is None:
            normal(self.table, self.init_std, generator)
        else:
            self.trunk.reset(generator)
            for parameter in (self.weight, self.bias):
                uniform(parameter, self.weight.shape[1] ** -0.5, generator)

    def forward(self) -> Tensor:
        """(p, W)."""
        return self.table if self.trunk is None else F.linear(self.trunk(), self.weight, self.bias)


class CachedPrefix(TextTokens):
    """Fills an empty cache with the prefix, before the part of a model that is given it reads its first token.

    The mask is made longer, and positions that are given count on from those of the prefix; all else is what the part
    does with a cache that is not empty. Where it is given none, it gets one that lasts for the call.

    Args:
        target: the part with the cache.
        p: tokens of the prefix.
        init_std: see `KeysAndValues`.
        hidden: see `KeysAndValues`.
        who: how errors name the method.
    """

    prompt: KeysAndValues

    def __init__(self, target: CacheTarget, p: int, init_std: float, hidden: int | None, who: str) -> None:
        super().__init__(target, KeysAndValues(target, p, init_std, hidden), p, who)
        self.layers = target.layers

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the part answers behind the prefix."""
        module, given = layer.module, self.given(x, layer)
        below = [other for other in layer.below if isinstance(other, Tokens)]
        if not all(isinstance(other, CachedPrefix) for other in below):
            raise AdapterError(
                f"{self.who}: a prompt lies below a prefix in the cache, and would take it for its own. Inject the "
                "prompt after the prefix."
            )
        name = next(name for name in CACHES if name in (given.keys() & {*CACHES} or module._parameter_names))
        cache = theirs = given.get(name)
        past = tokens_in(cache, self.who)
        batch, n = given["input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"].shape[:2]
        self._check(given, max(past - self.p - sum(other.p for other in below), 0), n)
        if cache is None:
            cache = empty_cache(module, given.get("encoder_hidden_states") is not None)
        if not past:  # then those below find their prefix there
            self._fill(cache, [*below, self], batch, module.get_input_embeddings().weight.dtype)
        held = tokens_in(cache, self.who)
        use = given.get("use_cache")
        asked = self.causal and (getattr(module.config, "use_cache", False) if use is None else use)

        # where layers are computed again in the backward pass, they are not given the cache
        again = getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()
        answer = None if again else self.answer(self._moved_on(given, packed=not past) | {name: cache}, layer)
        if again or tokens_in(cache, self.who) != held + n:
            raise AdapterError(
                f"{self.who}: the layers of {base_class(module).__name__} do not use the cache that it is given, so no "
                "token sees the prefix. Gradient checkpointing of transformers takes it away: switch that off, or use "
                "place='attention'."
            )
        return answer if asked or theirs is not None else _without(answer, cache)

    def _moved_on(self, given: dict[str, Any], packed: bool) -> dict[str, Any]:
        """``given`` with positions behind the prefix, and a mask that is open to it."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is None and positions is not None and positions.dim() == 2 and self.causal and packed:
            mask = documents(positions)  # which transformers finds by their positions, where there is no cache
        moved = {} if mask is None else {"attention_mask": self._mask(mask, rows=False)}
        counts = [key for key in ("position_ids", "cache_position") if given.get(key) is not None]
        return given | moved | {key: given[key] + self.p for key in counts}

    def _fill(self, cache: Any, prefixes: list[Any], batch: int, dtype: torch.dtype) -> None:
        """Put ``prefixes`` into an empty cache, the first of them first."""
        table = torch.cat([prefix.prompt() for prefix in prefixes]).to(dtype)
        parts = iter(table.split([width for kept in self.layers for width in (kept.keys, kept.values)], dim=1))
        own = getattr(cache, "self_attention_cache", cache)
        for i, kept in enumerate(self.layers):
            # (p, heads * d) -> (batch, heads, p, d)
            keys, values = (next(parts).unflatten(1, (kept.heads, -1)).transpose(0, 1) for _ in range(2))
            own.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), i)

    def unmergeable_because(self) -> str:
        """Keys and values are no weights."""
        return "a prefix is keys and values beside those of the tokens, not a change of weights."


def _without(answer: Any, cache: Any) -> Any:
    """``answer`` less a cache that nobody asked for."""
    if isinstance(answer, tuple):
        return tuple(part for part in answer if part is not cache)
    return type(answer)(**{key: value for key, value in answer.items() if value is not cache})
