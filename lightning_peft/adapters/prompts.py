"""Prompts: trained tokens, what they are made of, and how they come between those of the input and leave again."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, AdapterError, Kind, Layer, MethodWithHead, Target
from lightning_peft.engine.limits import Count, WholeNumber
from lightning_peft.engine.slots import base_class
from lightning_peft.parts.attention import Prepend, Record, seen_by
from lightning_peft.parts.caches import tokens_in
from lightning_peft.parts.layout import own_of, own_place, with_own
from lightning_peft.parts.tokens import TokenTarget, embedding_of, stack_targets, text_targets


class Prompt(nn.Module):
    """Trained tokens: ``table`` (p, D)."""

    def __init__(self, target: Target, p: int) -> None:
        super().__init__()
        self.p = p
        self.table = target.new_parameter(p, target.d_out)

    def reset(self, generator: torch.Generator, embedding: nn.Embedding | None) -> None:
        """Fill the parameters; ``embedding`` is that of the ids, in models that have one."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """(p, D)."""
        return self.table

    def shift(self, x: Tensor, positions: Tensor, length: int) -> Tensor:
        """The embedded tokens (batch, n, D) themselves.

        ``positions`` (n,) or (batch, n) are their places in a text of no more than ``length`` tokens.
        """
        return x


class Tokens(Adapter):
    """An adapter that lets a module see more tokens than its caller knows of.

    Args:
        target: the module.
        prompt: the tokens that come in; None where they came in before.
        p: how many they are.
        who: how errors name the method.
    """

    prompt: Prompt | None

    def __init__(self, target: TokenTarget, prompt: Prompt | None, p: int, who: str) -> None:
        super().__init__()
        self.prompt, self.p, self.who = prompt, p, who
        self.start, self.removes, self.causal, self.limit = target.start, target.removes, target.causal, target.limit
        self.place = own_place(target.module)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As the prompt begins."""
        if self.prompt is not None:
            self.prompt.reset(generator, embedding_of(layer.module))

    def unmergeable_because(self) -> str:
        """Tokens are no weights."""
        return "prompts are tokens, not a change of weights."

    def insert(self, x: Tensor, new: Tensor, axis: int = 1) -> Tensor:
        """``new`` between the first ``start`` entries of ``x`` along ``axis`` and the others."""
        return torch.cat([x.narrow(axis, 0, self.start), new, _from(x, axis, self.start)], dim=axis)

    def remove(self, x: Tensor, axis: int = 1, after: int = 0) -> Tensor:
        """The inverse of `insert`; ``after`` so many tokens of others that came in front of these since."""
        first = self.start + after
        if not first:
            return _from(x, axis, self.p)
        return torch.cat([x.narrow(axis, 0, first), _from(x, axis, first + self.p)], dim=axis)


def _below(layer: Layer) -> list[Tokens]:
    return [adapter for adapter in layer.below if isinstance(adapter, Tokens)]


def _from(x: Tensor, axis: int, first: int) -> Tensor:
    return x.narrow(axis, first, x.shape[axis] - first)


class TextTokens(Tokens):
    """Tokens inside a part that embeds ids: beside the embedded ids go masks, types and positions.

    Once the cache of a generation holds the prompt, masks and positions alone are made longer.
    """

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the module answers; its own tokens alone, unless a decoder is to look at the prompt too."""
        names, given = layer.module._parameter_names, self.given(x, layer)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = layer.module.get_input_embeddings()(given["input_ids"])
        past = tokens_in(given.get("cache", given.get("past_key_values")), self.who)
        before = max(
            past - self.p - sum(other.p for other in _below(layer)), 0
        )  # tokens of the text that the cache holds
        n = embeds.shape[1]
        self._check(given, before, n)

        mask, positions = given.get("attention_mask"), given.get("position_ids")
        counted = torch.arange(before, before + n, device=embeds.device)
        if positions is not None and positions.dim() == 2:
            counted = positions
        elif mask is not None and mask.dim() == 2:
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -n:]
            positions = counted if self.causal and "position_ids" in names else None
        if positions is not None:
            if mask is None and self.causal and not past:  # transformers finds packed documents by their positions
                mask = documents(positions)
            given["position_ids"] = self._positions(positions, past)
        if "cache_position" in given and given["cache_position"] is not None:
            given["cache_position"] = self._positions(given["cache_position"], past)
        if mask is not None:
            given["attention_mask"] = self._mask(mask, rows=not past)
        prompt: Prompt = self.prompt  # type: ignore[assignment]  # here they always come in
        embeds = prompt.shift(embeds, counted, before + n)
        if not past:
            new = prompt().to(embeds.dtype).expand(len(embeds), -1, -1)
            embeds = self.insert(embeds, new)
            types = given.get("token_type_ids")
            if types is not None:
                given["token_type_ids"] = self.insert(types, types[:, :1].expand(-1, self.p))
        given.pop("input_ids", None)
        answer = self.answer(given | {"inputs_embeds": embeds}, layer)
        return answer if past or not self.removes else self._without(answer, n + self.p)

    def given(self, x: Any, layer: Layer) -> dict[str, Any]:
        """Name -> value of all that the module was given.

        Raises:
            AdapterError: neither ids nor their embeddings are among them, or both.
        """
        given = layer.arguments() | {layer.keyword or layer.module._parameter_names[0]: x}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            raise AdapterError(
                f"{self.who}: {base_class(layer.module).__name__} was given "
                f"{'neither' if ids is None else 'both'} of input_ids and inputs_embeds. Give one of them."
            )
        return given

    def answer(self, given: dict[str, Any], layer: Layer) -> Any:
        """What the module answers when it is given this."""
        first = layer.keyword or layer.module._parameter_names[0]
        return layer(given.pop(first, None), **given)

    def _check(self, given: dict[str, Any], before: int, n: int) -> None:
        mask = given.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor) or given.get("cu_seq_lens_q") is not None:
            raise AdapterError(
                f"{self.who}: the mask was made elsewhere, for the tokens without a prompt. Give an "
                "attention_mask of padding (2-D), or one added to the scores (4-D); generate with a dynamic cache."
            )
        if getattr(given.get("cache", given.get("past_key_values")), "is_compileable", False):
            raise AdapterError(
                f"{self.who}: a static cache has room for the tokens without a prompt. Use a dynamic one, which is the "
                "default of generate()."
            )
        if mask is not None and mask.shape[-1] != before + n:
            raise AdapterError(
                f"{self.who}: attention_mask is of {mask.shape[-1]} tokens, but there are {before} in the "
                f"cache (beside the prompt) and {n} new ones. Fill the cache with the prompt in place, and give a mask "
                "of all tokens."
            )
        if self.limit is not None and before + n + self.p > self.limit:
            raise AdapterError(
                f"{self.who}: {before + n} tokens and a prompt of {self.p} need more than the {self.limit} "
                "positions of this model. Cut the text, or use fewer num_virtual_tokens."
            )

    def _positions(self, positions: Tensor, past: int) -> Tensor:
        if past:
            return positions + self.p
        own = torch.arange(self.p, device=positions.device).expand(*positions.shape[:-1], -1)
        if self.start:
            own = own + positions[..., self.start - 1 : self.start] + 1
        later = _from(positions, -1, self.start) + self.p
        return torch.cat([positions[..., : self.start], own.to(positions.dtype), later], dim=-1)

    def _mask(self, mask: Tensor, rows: bool) -> Tensor:
        if mask.dim() == 2:  # one where there is a token
            return self.insert(mask, mask.new_ones(len(mask), self.p))
        is_bool = mask.dtype == torch.bool
        mask = longer(self, mask, is_bool, rows)
        if rows and self.causal:
            mask[..., self.start : self.start + self.p, :] = self._rows(mask, is_bool)
        return mask

    def _rows(self, mask: Tensor, is_bool: bool) -> Tensor:
        """What the prompt of a causal model sees, (p, n): what is in front of it, and itself up to each token."""
        sees = torch.ones(self.p, mask.shape[-1], dtype=torch.bool, device=mask.device).tril(self.start)
        if is_bool:
            return sees
        return torch.zeros_like(sees, dtype=mask.dtype).masked_fill(~sees, torch.finfo(mask.dtype).min)

    def _without(self, answer: Any, n: int) -> Any:
        if isinstance(answer, tuple):
            return tuple(self._without(part, n) for part in answer)
        if isinstance(answer, Tensor):
            if answer.dim() == 4 and answer.shape[2] == n:  # attention weights
                return self.remove(self.remove(answer, 2), 3)
            return self.remove(answer) if answer.dim() == 3 and answer.shape[1] == n else answer
        for key in ("last_hidden_state", "hidden_states", "attentions"):
            if getattr(answer, key, None) is not None:
                answer[key] = self._without(answer[key], n)
        return answer


def documents(positions: Tensor) -> Tensor | None:
    """(rows, 1, n, n), True where a token looks: back to the start of its document, where positions do not go on.

    None where each row is one document, for which the model has a mask of its own: it may look over a window alone.
    """
    ahead = positions[:, 1:] != positions[:, :-1] + 1
    if not torch.compiler.is_compiling() and not ahead.any():
        return None
    document = F.pad(ahead.long().cumsum(1), (1, 0))
    return document.unsqueeze(2).eq(document.unsqueeze(1)).tril().unsqueeze(1)


def longer(tokens: Tokens, mask: Tensor, open_: Any, rows: bool = True) -> Tensor:
    """A mask (..., n, n) for longer sequences. Everything looks at the prompt, which sees what the first token sees.

    So nothing of the future reaches a token by way of the prompt.
    """
    wide = mask.new_full((*mask.shape[:-1], tokens.p), open_)
    mask = tokens.insert(mask, wide, axis=mask.dim() - 1)
    if not rows or mask.shape[-2] == 1:
        return mask
    return tokens.insert(mask, mask[..., :1, :].expand(*mask.shape[:-2], tokens.p, -1), axis=mask.dim() - 2)


class DecoderTokens(Tokens):
    """Lets a decoder look at the prompt in what the encoder answers: its mask is made as long as that."""

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the decoder answers."""
        given = layer.arguments()
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is None or states is None or mask.shape[-1] + self.p > states.shape[1]:
            return layer(x)
        ones = mask.new_ones(len(mask), self.p)
        return layer(x, **given | {"encoder_attention_mask": self.insert(mask, ones)})


class BlockTokens(Tokens):
    """Tokens inside a block, or carried on through it."""

    dropping: float = 0.0  # probability with which a number of the prompt is dropped, in training only

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the block answers, with the prompt or without it."""
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] < self.start:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise AdapterError(
                f"{self.who}: {base_class(layer.module).__name__} was given {shape}, not tokens (batch, n, "
                f"width) with {self.start} class tokens in front. Name the right blocks, or other class_tokens."
            )
        if self.prompt is not None:
            x = self.prompt.shift(x, torch.arange(x.shape[1], device=x.device), x.shape[1])
            x = self.insert(x, self.tokens(len(x)).to(x.dtype))
        given = layer.arguments()
        others = _below(layer)
        n = x.shape[1] - self.p - sum(other.p for other in others if other.prompt is None)  # as its caller knows it
        changed = {name: self._argument(name, value, given, n) for name, value in given.items()}
        y = layer(x, **changed) if changed else layer(x)
        if not self.removes:
            return y
        seen = own_of(y, self.place)
        if layer.is_base and seen.shape[1] != x.shape[1]:
            raise AdapterError(
                f"{self.who}: {base_class(layer.module).__name__} answered {seen.shape[1]} tokens where it was "
                f"given {x.shape[1]}, so the prompt cannot be found again. Choose other blocks."
            )
        after = sum(other.p for other in others if other.prompt is not None and not other.removes)
        own = self.remove(seen, after=after)
        return with_own(y, self.place, own)

    def tokens(self, batch: int) -> Tensor:
        """(batch, p, D): of each sample, others are dropped."""
        prompt: Prompt = self.prompt  # type: ignore[assignment]  # asked only where it is
        return F.dropout(prompt().expand(batch, -1, -1), self.dropping, self.training)

    def _argument(self, name: str, value: Any, given: dict[str, Any], n: int) -> Any:
        if name == "is_causal" and value:  # a hint that the longer mask does not keep to
            return not any("mask" in other and isinstance(given[other], Tensor) for other in given)
        if not isinstance(value, Tensor) or "mask" not in name:
            if value is not None and any(word in name for word in ("rope", "rotary", "freqs")):
                raise AdapterError(
                    f"{self.who}: the block is given {name}, positions of its tokens alone. Use "
                    "PrefixTuning, which leaves the number of tokens as it is."
                )
            return value
        if value.shape[-1] != n:
            return value  # of another sequence
        if value.dtype == torch.bool:
            # torch.nn says what is closed, all others what is open
            open_: Any = name not in ("src_mask", "src_key_padding_mask", "tgt_mask", "tgt_key_padding_mask")
        else:
            open_ = 0 if value.is_floating_point() else 1
        if value.dim() == 2 and ("padding" in name or name == "attention_mask" or value.shape[0] != n):
            return self.insert(value, value.new_full((len(value), self.p), open_))
        return longer(self, value, open_)


class WindowTokens(BlockTokens):
    """Tokens that each window of a block sees: keys and values that its own norm and projections make of them."""

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the block answers; the grid stays as it is."""
        block = layer.module
        seen = Record()
        given = block.norm1(self.tokens(1).to(x.dtype))
        seen_by(seen, block.attn, lambda: block.attn(given), self.who)
        # those of the prompt alone: there may be a prefix in front of them
        keys, values = (t[0, :, -self.p :].transpose(0, 1).flatten(1) for t in (seen.key, seen.value))
        return seen_by(Prepend(keys, values), block.attn, lambda: layer(x), self.who)


_ADAPTERS: dict[str, type[Tokens]] = {
    "text": TextTokens,
    "decoder": DecoderTokens,
    "block": BlockTokens,
    "windows": WindowTokens,
}


def tokens_adapter(target: Target, prompt: Callable[[Target], Prompt], p: int, who: str) -> Tokens:
    """The adapter for ``target``, with a prompt where one comes in."""
    if not isinstance(target, TokenTarget):
        raise AdapterError(f"{target.name!r} takes no tokens. Make such targets with text_targets or stack_targets.")
    return _ADAPTERS[target.place](target, prompt(target) if target.inserts else None, p, who)


@dataclass(frozen=True, kw_only=True)
class PromptMethod(MethodWithHead):
    """A method that puts one prompt before the text, or before the tokens of the first block.

    Args:
        num_virtual_tokens: p, the tokens of the prompt.
        module: path of the part that embeds the text, where a model has several.
        blocks: path of the list of blocks, in a model that embeds no text; see `find_blocks`.
        class_tokens: tokens that stay before the prompt. By default the first one, where a text is looked at both ways
            and heads read their answer there; none elsewhere.
        modules_to_save: see `MethodWithHead`.
    """

    modalities: ClassVar = ("text",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Tokens}
    acts_on: ClassVar = "blocks"
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    num_virtual_tokens: Count = 20
    module: str | None = None
    blocks: str | None = None
    class_tokens: WholeNumber | None = None

    @abstractmethod
    def prompt(self, target: Target) -> Prompt:
        """A new prompt for ``target``, not yet filled."""

    @abstractmethod
    def num_prompt(self, width: int) -> int:
        """Trainable numbers of a prompt, by the formula of the paper."""

    def targets(self, model: nn.Module) -> list[Target]:
        """The part that embeds the text, or the blocks."""
        who = type(self).__name__
        found: list[Any] = []
        if self.blocks is None:
            found = text_targets(model, self.num_virtual_tokens, who, self.module, self.class_tokens)
        return found or stack_targets(model, who, deep=False, blocks=self.blocks, class_tokens=self.class_tokens or 0)  # type: ignore[return-value]

    def adapter(self, target: Target) -> Adapter:
        """The tokens, or what they need on their way."""
        return tokens_adapter(target, self.prompt, self.num_virtual_tokens, type(self).__name__)

    def num_trainable(self, target: Target) -> int:
        """Those of the prompt, where it comes in."""
        return self.num_prompt(target.d_out) if isinstance(target, TokenTarget) and target.inserts else 0
