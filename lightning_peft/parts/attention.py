"""Attentions: where a model has them, and what their products of queries, keys and values are given.

A module is an attention if it holds projections to keys and values under their customary names, or one projection to
queries, keys and values at once. What it multiplies is seen where ``F.scaled_dot_product_attention`` is called: by a
mode of torch, so no class of attention has to be known, and masks, caches and rotations stay the module's own.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_peft.engine import AdapterError, Target, TargetError
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.slots import base_class
from lightning_peft.engine.targets import as_patterns, matches, module_target, sites

_QUERY = ("q_proj", "query", "to_q", "q", "wq", "q_lin", "query_proj")
_KEY = ("k_proj", "key", "to_k", "k", "wk", "k_lin", "key_proj")
_VALUE = ("v_proj", "value", "to_v", "v", "wv", "v_lin", "value_proj")
_FUSED = ("qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "to_qkv")
_CROSS = re.compile(r"cross|encoder_attn|encdecattention|multihead_attn|\battn2\b", re.IGNORECASE)


@dataclass(frozen=True)
class Widths:
    """Features that an attention takes (``d_in``), those of all its keys and of all its values together, and those of
    what the keys are made of (``context``): another sequence, if it looks at one.
    """

    d_in: int
    keys: int
    values: int
    context: int


def widths_of(module: nn.Module) -> Widths | None:
    """The widths of ``module`` if it is an attention, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return Widths(module.embed_dim, module.embed_dim, module.embed_dim, module.kdim)
    shapes = {name: shape for name, child in module.named_children() if (shape := _linear_shape(child)) is not None}
    query, key, value = (next((shapes[n] for n in names if n in shapes), None) for names in (_QUERY, _KEY, _VALUE))
    if key is not None and value is not None:
        return Widths((query or key)[1], key[0], value[0], key[1])
    fused = next((shapes[name] for name in _FUSED if name in shapes), None)
    if fused is None:
        return None
    d_out, d_in = fused
    keys = d_out // 2 if "q_attn" in shapes else _keys_in(module, d_out)
    return Widths(d_in, keys, keys, d_in)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    for site in sites(module):
        if site.kind == "linear" and site.weight in ("weight", ""):
            shape = Target("", module, site, "").shape
            return shape[0], shape[1]
    return None


def _keys_in(module: nn.Module, d_out: int) -> int:
    """Features of all keys in a projection to queries, keys and values at once; there may be fewer heads of keys."""
    width = _number(module, "head_dim")
    if width is not None:
        heads = _number(module, "num_key_value_heads")
        if heads is not None:
            return heads * width
        heads = _number(module, "num_heads", "num_attention_heads", "n_head")
        if heads is not None:
            return (d_out - heads * width) // 2
    return d_out // 3


def heads_of(module: nn.Module) -> int | None:
    """How many heads the keys of an attention have; None if it does not say how wide they are."""
    widths, width = widths_of(module), _number(module, "head_dim", "key_value_proj_dim", "attention_head_size")
    return None if widths is None or not width else widths.keys // width


def _number(module: nn.Module, *names: str) -> int | None:
    owners = (module, getattr(module, "config", None))
    return next((n for owner in owners for name in names if isinstance(n := getattr(owner, name, None), int)), None)


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every attention in ``model``, in its order."""
    return {name: module for name, module in model.named_modules() if widths_of(module) is not None}


def attention_targets(model: nn.Module, patterns: str | Sequence[str] | None, who: str) -> list[Target]:
    """Attentions of ``model`` as targets, each a whole module.

    Args:
        model: where to look.
        patterns: which of them, as in ``target_modules``; None for all but those that look at another sequence.
        who: how errors name the caller.

    Raises:
        TargetError: none is found, or the keys and values of one cannot be reached.
    """
    found = find_attentions(model)
    if not found:
        raise TargetError(
            f"{who}: {base_class(model).__name__} holds no attention with projections to keys and values. Choose a "
            "method for its layers, such as LoRA."
        )
    chosen = {name: module for name, module in found.items() if patterns is None and not is_cross(name, module)}
    for pattern in as_patterns(patterns):
        hits = {name: module for name, module in found.items() if matches(pattern, name, module)}
        if not hits:
            raise TargetError(
                f"{who}: target_modules {pattern!r} matched none of {len(found)} attentions.{nearest(pattern, found)} "
                f"Their names are like {next(iter(found))!r}."
            )
        chosen |= hits
    if not chosen:
        raise TargetError(
            f"{who}: every attention of {base_class(model).__name__} looks at another sequence. Name in target_modules "
            f"those that you want, such as {next(iter(found))!r}."
        )
    for name, module in chosen.items():
        _check_reachable(name, module, who)
    return [module_target(model, n, widths_of(m).d_in) for n, m in found.items() if n in chosen]  # type: ignore[union-attr]


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether the attention ``name`` looks at another sequence, by what it says or how it is called."""
    return bool(getattr(module, "is_cross_attention", False) or _CROSS.search(name))


def _check_reachable(name: str, module: nn.Module, who: str) -> None:
    how = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if how not in (None, "sdpa"):
        raise TargetError(
            f"{who}: {name!r} computes its attention by {how!r}, where keys and values cannot be reached. Call "
            "model.set_attn_implementation('sdpa'), or build the model with attn_implementation='sdpa'."
        )
    if getattr(module, "bias_k", None) is not None:
        raise TargetError(
            f"{who}: {name!r} has keys and values of its own (add_bias_kv) behind those of the tokens. Leave it out: "
            "name the other attentions in target_modules."
        )


# processors of diffusers that multiply by themselves what AttnProcessor2_0 hands to torch
_DIFFUSERS = "diffusers.models.attention_processor"
_UNFUSED = ("AttnProcessor", "SlicedAttnProcessor")


class Products(TorchFunctionMode):
    """While it is entered, stands before every product of an attention; ``calls`` counts them."""

    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of all that torch computes, two functions are of interest."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self.product(dict(zip(_PRODUCT, args, strict=False)) | kwargs)
        if func is F.multi_head_attention_forward:  # it hides its product from a mode
            self.calls += 1
            return self.multihead(dict(zip(_MULTIHEAD, args, strict=False)) | kwargs)
        return func(*args, **kwargs)

    def product(self, given: dict[str, Any]) -> Any:
        """What is answered in place of ``F.scaled_dot_product_attention(**given)``."""
        raise NotImplementedError

    def multihead(self, given: dict[str, Any]) -> Any:
        """What is answered in place of ``F.multi_head_attention_forward(**given)``."""
        raise NotImplementedError


_PRODUCT = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MULTIHEAD = F.multi_head_attention_forward.__code__.co_varnames[: F.multi_head_attention_forward.__code__.co_argcount]


class Prepend(Products):
    """Puts keys and values, which every query may look at, before those of the tokens.

    Args:
        keys: (p, all features of the keys), head after head.
        values: (p, all features of the values).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def product(self, given: dict[str, Any]) -> Tensor:
        """The product with the longer keys and values."""
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        p = len(self.keys)
        if given.get("is_causal"):
            open_ = torch.ones(query.shape[-2], p + key.shape[-2], dtype=torch.bool, device=key.device)
            given |= {"attn_mask": open_.tril(p), "is_causal": False}
        elif mask is not None:
            mask = mask.expand(*mask.shape[:-1], key.shape[-2]) if mask.shape[-1] == 1 else mask
            given["attn_mask"] = F.pad(mask, (p, 0), value=mask.dtype == torch.bool)
        given["key"] = torch.cat([_as_heads(self.keys, key), key], dim=-2)
        given["value"] = torch.cat([_as_heads(self.values, given["value"]), given["value"]], dim=-2)
        return F.scaled_dot_product_attention(**given)

    def multihead(self, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The same for ``nn.MultiheadAttention``: keys and values are projected here, and given as static ones."""
        p, heads = len(self.keys), given["num_heads"]
        if given.get("use_separate_proj_weight"):
            weights = (given["k_proj_weight"], given["v_proj_weight"])
        else:
            weights = given["in_proj_weight"].chunk(3)[1:]
        biases = (None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)[1:]
        for name, table, weight, bias in zip("kv", (self.keys, self.values), weights, biases, strict=True):
            rows = F.linear(given["key" if name == "k" else "value"], weight, bias)  # (n, batch, width)
            own = rows.reshape(len(rows), -1, heads, rows.shape[-1] // heads).permute(1, 2, 0, 3)
            given[f"static_{name}"] = torch.cat([_as_heads(table, own), own], dim=-2).flatten(0, 1)
        same = given["key"] is given["value"]  # its own projections are not used, but their length is looked at
        given["key"] = F.pad(given["key"], (*[0, 0] * (given["key"].dim() - 1), p, 0))
        given["value"] = given["key"] if same else F.pad(given["value"], (*[0, 0] * (given["value"].dim() - 1), p, 0))
        for name in ("attn_mask", "key_padding_mask"):  # in these, other than above, True means closed
            if given.get(name) is not None:
                given[name] = F.pad(given[name], (p, 0))
        output, weights_seen = F.multi_head_attention_forward(**given | {"is_causal": False})
        return output, None if weights_seen is None else weights_seen[..., p:]


class Record(Products):
    """Keeps the keys and values that an attention makes, and multiplies nothing."""

    key: Tensor
    value: Tensor

    def product(self, given: dict[str, Any]) -> Tensor:
        """Something of the right shape."""
        self.key, self.value = given["key"], given["value"]
        return given["query"]


def _as_heads(table: Tensor, like: Tensor) -> Tensor:
    """(p, heads * d) as (batch, heads, p, d) beside ``like`` (batch, heads, n, d), whose heads may be repeated."""
    heads = table.shape[1] // like.shape[-1]
    if heads * like.shape[-1] != table.shape[1] or like.shape[-3] % heads:
        raise AdapterError(
            f"a prefix of {table.shape[1]} features was made for this attention, but it multiplies {like.shape[-3]} "
            f"heads of {like.shape[-1]} features. Leave it out: name the other attentions in target_modules."
        )
    own = table.to(like.dtype).unflatten(1, (heads, like.shape[-1])).transpose(0, 1)
    own = own.repeat_interleave(like.shape[-3] // heads, dim=0) if like.shape[-3] != heads else own
    return own.expand(*like.shape[:-3], *own.shape)


def seen_by(mode: Products, attention: nn.Module, call: Callable[[], Any], who: str) -> Any:
    """What ``call``, which calls ``attention``, answers under ``mode``.

    Raises:
        AdapterError: the attention did not call the product of torch.
    """
    with fused(attention), mode:
        answer = call()
    if not mode.calls:
        raise AdapterError(
            f"{who}: {base_class(attention).__name__} computes its attention without "
            "F.scaled_dot_product_attention, so its keys and values cannot be reached. Switch it to that function "
            "(attn_implementation='sdpa' in transformers), or leave it out with target_modules."
        )
    return answer


@contextmanager
def fused(attention: Any) -> Iterator[None]:
    """Let an attention of timm or diffusers call the product of torch, where it was set to multiply by itself."""
    fitting: dict[str, Any] = {}
    if getattr(attention, "fused_attn", None) is False:
        fitting["fused_attn"] = True
    kind = type(getattr(attention, "processor", None))
    if kind.__module__ == _DIFFUSERS and kind.__name__ in _UNFUSED and attention.scale_qk:
        fitting["processor"] = sys.modules[_DIFFUSERS].AttnProcessor2_0()
    before = {name: getattr(attention, name) for name in fitting}
    for name, value in fitting.items():
        setattr(attention, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(attention, name, value)
