"""An image beside the text: its embedding becomes tokens, to which cross-attentions look by projections of their own.

The module that is called makes the tokens and hands them through to its attentions; each takes them out again, calls
the attention as it is, with the text alone, and adds its own branch. So masks of the text fit, and no processor of
attention has to be known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.prefix import uniform
from lightning_peft.engine import Adapter, AdapterError, Layer, Target, TargetError
from lightning_peft.engine.errors import joined, nearest
from lightning_peft.engine.slots import active_adapters, base_class, holds_adapters
from lightning_peft.engine.targets import as_patterns, is_below, matches, module_target, sites
from lightning_peft.parts.condition import TEXT, call_with, cross_attentions, entries, given_to, handed_through

_IMAGE = "added_cond_kwargs"
_TOKENS = "ip_hidden_states"  # attentions of diffusers pass over what is handed through by this name


@dataclass(frozen=True)
class ImageTarget(Target):
    """The module that is given the image, or an attention that looks at it.

    Args:
        context: C, features of a token.
        keys: features of all keys of the attention, and so of its values; 0 for the module that is given the image.
    """

    context: int
    keys: int = 0


def image_targets(model: nn.Module, patterns: str | Sequence[str] | None, who: str) -> list[ImageTarget]:
    """The module of ``model`` that is given text and image, and its cross-attentions.

    Args:
        model: where to look.
        patterns: which of the attentions, as in ``target_modules``; None for all.
        who: how errors name the caller.

    Raises:
        TargetError: there is no such module, or there are several; or an attention is not of the known form.
    """
    attentions = cross_attentions(model)
    held = {entry: [n for n in attentions if not entry or is_below(n, entry)] for entry in entries(model, TEXT, _IMAGE)}
    found = [name for names in held.values() for name in names]
    if not found:
        raise TargetError(
            f"{who}: {base_class(model).__name__} holds no module with cross-attentions that is given {TEXT} and "
            f"{_IMAGE}. Choose a denoiser that looks at a text by attentions of their own, such as a "
            "UNet2DConditionModel."
        )
    chosen = set(found) if patterns is None else set[str]()
    for pattern in as_patterns(patterns):
        hits = {name for name in found if matches(pattern, name, attentions[name])}
        if not hits:
            raise TargetError(
                f"{who}: target_modules {pattern!r} matched none of {len(found)} cross-attentions."
                f"{nearest(pattern, found)} Their names are like {found[0]!r}."
            )
        chosen |= hits
    used = [entry for entry, names in held.items() if chosen & set(names)]
    if len(used) > 1:
        raise TargetError(
            f"{who}: there are {len(used)} modules that are given text and image ({joined(used)}). Name the "
            "cross-attentions of one of them in target_modules."
        )
    targets = [_attention(model, name, attentions[name], who) for name in found if name in chosen]
    other = next((t for t in targets if t.context != targets[0].context), None)
    if other is not None:
        raise TargetError(
            f"{who}: {targets[0].name!r} looks at tokens of {targets[0].context} features, and {other.name!r} at "
            f"{other.context}. Name attentions that look at the same ones in target_modules."
        )
    return [_target(model, used[0], targets[0].context, targets[0].context), *targets]


def _target(model: nn.Module, name: str, width: int, context: int, keys: int = 0) -> ImageTarget:
    target = module_target(model, name, width)
    return ImageTarget(target.name, target.module, target.site, target.owner, context, keys)


def _attention(model: nn.Module, name: str, module: Any, who: str) -> ImageTarget:
    because = _unserved(module)
    if because is not None:
        raise TargetError(
            f"{who}: the attention {name!r} {because}. Leave it out: name others in target_modules; or choose a model "
            "whose cross-attentions have to_q, to_k, to_v and to_out alone."
        )
    (keys, context), width = _shape(module.to_k), _shape(module.to_out[0])[0]
    return _target(model, name, width, context, keys)


def _unserved(module: Any) -> str | None:
    """Why the branch would be wrong, or could not be computed, at this attention; None if it can."""
    lists = nn.ModuleList | nn.Sequential
    outs = module.to_out if isinstance(getattr(module, "to_out", None), lists) and len(module.to_out) else [None]
    linears: list[Any] = [*(getattr(module, name, None) for name in ("to_q", "to_k", "to_v")), outs[0]]
    heads = getattr(module, "heads", None)
    if not isinstance(heads, int) or not all(isinstance(layer, nn.Linear) for layer in linears):
        return "has no layers to_q, to_k, to_v and to_out.0 with a number of heads"
    inner = {_shape(layer)[0] for layer in linears[:3]} | {_shape(linears[3])[1]}
    if len(inner) > 1 or min(inner) % heads:
        return "shares keys between heads"
    for name in ("add_k_proj", "add_q_proj", "group_norm", "spatial_norm"):
        if getattr(module, name, None) is not None:
            return f"has a layer {name} besides"
    norms = (getattr(module, name, None) for name in ("norm_q", "norm_k"))
    if any(p.shape[-1] != min(inner) // heads for norm in norms if norm is not None for p in norm.parameters()):
        return "normalises its queries over all heads"
    return None


def _shape(layer: nn.Module) -> torch.Size:
    return Target("", layer, sites(layer)[0], "").shape  # of codes, too


class ImageTokens(Adapter):
    """Makes tokens of the embedding of an image: ``LN(W_p e + b_p)``, N of them.

    Args:
        target: the module that is given text and image.
        d_image: D, features of an embedding.
        n: N.
        who: how errors name the method.
    """

    def __init__(self, target: ImageTarget, d_image: int, n: int, who: str) -> None:
        super().__init__()
        self.context, self.d_image, self.who = target.context, d_image, who
        self.proj_weight = target.new_parameter(n * target.context, d_image)
        self.proj_bias = target.new_parameter(n * target.context)
        self.norm_weight, self.norm_bias = target.new_parameter(target.context), target.new_parameter(target.context)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The projection as ``nn.Linear``, the norm as ``nn.LayerNorm``."""
        uniform(self.proj_weight, self.d_image**-0.5, generator)
        uniform(self.proj_bias, self.d_image**-0.5, generator)
        self.norm_weight.fill_(1.0)
        self.norm_bias.zero_()

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the module answers when its attentions are handed the tokens."""
        given = given_to(x, layer)
        through: str = handed_through(layer.module)  # type: ignore[assignment]  # it was chosen for that
        more = given.get(through) or {}
        tokens = self.tokens(self.embedding(given))
        # with whose they are: another adapter may hand its own
        given[through] = {**more, _TOKENS: (*more.get(_TOKENS, ()), (self, tokens))}
        return call_with(layer, given)

    def embedding(self, given: dict[str, Any]) -> Tensor:
        """The embeddings (B, n images, D) in what the module was given, in the precision of the text."""
        text, embeds = given.get(TEXT), (given.get(_IMAGE) or {}).get("image_embeds")
        if isinstance(embeds, list | tuple) and len(embeds) == 1:
            embeds = embeds[0]
        if embeds is None:
            raise AdapterError(
                f"{self.who}: the model was called without the embedding of an image. Give it as "
                f"{_IMAGE}={{'image_embeds': ...}}, zeros where an image is left out; or let the text alone act: "
                "set_active(model, ())."
            )
        if isinstance(embeds, Tensor) and embeds.dim() == 2:
            embeds = embeds[:, None]
        batch = len(text) if isinstance(text, Tensor) else None
        fits = isinstance(embeds, Tensor) and embeds.dim() == 3 and embeds.shape[-1] == self.d_image
        if not isinstance(embeds, Tensor) or not fits or batch not in (None, len(embeds)):
            shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else f"a {type(embeds).__name__}"
            raise AdapterError(
                f"{self.who}: image_embeds is {shape}; expected ({batch or 'B'}, {self.d_image}), or "
                f"({batch or 'B'}, n, {self.d_image}) for n images, or a list of one of these. Repeat it for each "
                "sample of the batch (zeros for those without condition), and give its width as image_embed_dim."
            )
        return embeds.to(text.dtype) if isinstance(text, Tensor) else embeds

    def tokens(self, embeds: Tensor) -> Tensor:
        """(B, n N, C)."""
        dtype = embeds.dtype
        tokens = F.linear(embeds, self.proj_weight.to(dtype), self.proj_bias.to(dtype))
        tokens = tokens.reshape(len(embeds), -1, self.context)
        weight, bias = self.norm_weight.to(tokens.dtype), self.norm_bias.to(tokens.dtype)
        return F.layer_norm(tokens, (self.context,), weight, bias)

    def unmergeable_because(self) -> str:
        """An image is no weight."""
        return "an image comes with each call, and is not a change of weights."


class ImageAttention(Adapter):
    """``attention(x, text) + (Attn(Q, c W'_k, c W'_v)) W_o`` with the queries and the output layer of the attention.

    Args:
        target: the attention.
        source: what makes the tokens.
        scale: factor of the branch.
    """

    scaling: Tensor

    def __init__(self, target: ImageTarget, source: ImageTokens, scale: float) -> None:
        super().__init__()
        self.name, self.who = target.name, source.who
        self.source = (source,)  # in a tuple it is no child
        self.keys = target.new_parameter(target.keys, target.context)
        self.values = target.new_parameter(target.keys, target.context)
        # a tensor: changing it does not recompile a compiled model
        self.register_buffer("scaling", self.keys.new_tensor(scale), persistent=False)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Copies of the projections of the text."""
        self.keys.copy_(_weight(layer.module.to_k))
        self.values.copy_(_weight(layer.module.to_v))

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the attention answers to the text, and the branch."""
        given = given_to(x, layer)
        handed = given.pop(_TOKENS, ())
        tokens = next((own for source, own in handed if source is self.source[0]), None)
        states, text = given[layer.module._parameter_names[0]], given.get(TEXT)
        if tokens is None or text is None or states.dim() != 3:
            seen = f"a map {tuple(states.shape)}" if states.dim() != 3 else "no text" if text is None else "no image"
            raise AdapterError(
                f"{self.who}: the attention {self.name!r} was given {seen}, where tokens that look at a text and an "
                "image were expected. Call the whole denoiser, which hands the image through to its attentions; or "
                "name others in target_modules."
            )
        if given.get("ip_adapter_masks") is not None:
            raise AdapterError(
                f"{self.who}: ip_adapter_masks say which pixels see an image, and the branch of {self.name!r} lets all "
                "see it. Leave them out."
            )
        rest = tuple(pair for pair in handed if pair[0] is not self.source[0])
        y = call_with(layer, given | {_TOKENS: rest} if rest else given)
        return y + (self.scaling * self.branch(states, tokens, layer.module)).to(y.dtype)

    def branch(self, x: Tensor, tokens: Tensor, attention: Any) -> Tensor:
        """What the image adds, (B, n, features) for x (B, n, features) and tokens (B, m, C)."""
        norm_q, norm_k = (getattr(attention, name, None) for name in ("norm_q", "norm_k"))
        q, k = attention.to_q(x), F.linear(tokens, self.keys.to(tokens.dtype))
        v = _heads(F.linear(tokens, self.values.to(tokens.dtype)), attention)
        q, k = (_heads(part, attention) for part in (q, k))
        q = (q if norm_q is None else norm_q(q)).to(v.dtype)
        k = (k if norm_k is None else norm_k(k)).to(v.dtype)
        scale = attention.scale if isinstance(getattr(attention, "scale", None), float) else None
        seen = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        # the part of this in what a layer without activation makes of the sum with the text
        out, *others = attention.to_out
        seen = out(seen) - out(torch.zeros_like(seen[:1, :1]))
        for layer in others:
            seen = layer(seen)
        return seen / getattr(attention, "rescale_output_factor", 1.0)

    def unmergeable_because(self) -> str:
        """An image is no weight."""
        return self.source[0].unmergeable_because()


def _heads(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a projection, as those who change it have made it."""
    site = sites(layer)[0]
    below = active_adapters(layer, site.weight) if holds_adapters(layer) else ()
    return Layer(layer, site, tuple(adapter for adapter in below if adapter.changes_weights)).weight
