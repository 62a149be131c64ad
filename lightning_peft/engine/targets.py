"""Targets: which weights of a model a method wants, asked for by name, pattern, type or keyword."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_peft.engine.codes import answers_in, holds_codes, linear_size
from lightning_peft.engine.errors import TargetError, nearest
from lightning_peft.engine.slots import Kind, Site, base_class, in_codes, plain_name
from lightning_peft.engine.slots import base_modules as base_modules

ALL_LINEAR = "all-linear"
ALL_LAYERS = "all-layers"
OUTPUT_HEAD = "output-head"

# names that output heads go by; looked for in the last places of a model only, never inside its numbered blocks
_HEADS = ("lm_head", "classifier", "head", "fc", "score", "qa_outputs", "heads")


@dataclass(frozen=True)
class Target:
    """One weight of a model: its plain ``name``, its ``module`` and the path ``owner`` to it, its use (``site``)."""

    name: str
    module: nn.Module
    site: Site
    owner: str

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, output axis first."""
        size = linear_size(self.module) if in_codes(self.module, self.site) else None
        return self.site.get(self.module)[0].shape if size is None else torch.Size(size)  # codes have any shape

    @property
    def d_out(self) -> int:
        """Output features or channels."""
        return self.shape[0]

    @property
    def d_in(self) -> int:
        """Input features; for a convolution input channels of one group times kernel size; 1 for a whole module."""
        return self.shape[1:].numel()

    def new_parameter(self, *size: int) -> nn.Parameter:
        """A parameter for an adapter, not yet filled: beside the weight, in its precision but float32 at least."""
        weight = self.site.get(self.module)[0]
        coded = in_codes(self.module, self.site)
        dtype, device = answers_in(self.module) if coded else (weight.dtype, weight.device)
        return nn.Parameter(torch.empty(size, dtype=torch.promote_types(dtype, torch.float32), device=device))


def module_target(model: nn.Module, name: str, width: int) -> Target:
    """The whole module ``name`` of ``model`` as a target, which answers with ``width`` features."""
    return Target(plain_name(name), model.get_submodule(name), Site("module", "", None, width=width), name)


def sites(module: nn.Module) -> list[Site]:
    """The weights of one module that adapters can sit on; empty for a module of unknown type."""
    cls = base_class(module)
    bias = "bias" if "bias" in module._parameters else None
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            return [Site("linear", "in_proj_weight", "in_proj_bias", read=True)]
        return [Site("linear", f"{part}_proj_weight", None, read=True) for part in "qkv"]
    if "weight" not in module._parameters:
        # in codes of another library; or computed from other parameters at each call: weight_norm, parametrize
        return [] if linear_size(module) is None else [Site("linear", "", bias)]
    if isinstance(module, nn.Linear):
        return [Site("linear", bias=bias, read=_has_own_forward(cls, nn.Linear, module))]
    for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, conv):
            return [Site("conv", bias=bias, read=_has_own_forward(cls, conv, module))]
    if isinstance(module, nn.Embedding):
        return [Site("embedding", bias=None, transposed=True, read=_has_own_forward(cls, nn.Embedding, module))]
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm | nn.RMSNorm):
        return [Site("norm", bias=bias, read=bias is not None)]  # its vectors are small: change them, not the output
    if f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D":
        return [Site("linear", transposed=True)]
    return []


def _has_own_forward(cls: type[nn.Module], known: type[nn.Module], module: nn.Module) -> bool:
    # a subclass may do more to its weight than the known class (standardise it, say): a delta added to its output
    # would then differ from a delta merged into its weight, so the adapter acts through the weight
    own = cls.forward is not known.forward
    return own and module._parameters["weight"] is not None and not holds_codes(module, "weight")


def candidates(model: nn.Module) -> list[Target]:
    """Every weight in ``model`` that some adapter could sit on, in the order of ``named_modules``."""
    found = []
    for name, module in base_modules(model):
        for site in sites(module):
            found.append(Target(plain_name(site.name(name)), module, site, name))
    return found


def output_head(model: nn.Module) -> str | None:
    """Name of the layer, or of the small network, that makes the predictions; None where it cannot be told.

    Asked first are the models that know it (``get_classifier`` of timm, ``get_output_embeddings`` of transformers);
    then the customary names are looked for.
    """
    names = {id(module): name for name, module in base_modules(model)}
    for _, module in base_modules(model):
        for ask in ("get_classifier", "get_output_embeddings"):
            if callable(getattr(module, ask, None)):
                head = getattr(module, ask)()
                if isinstance(head, nn.Module) and next(head.parameters(), None) is not None:
                    return names.get(id(head))
    linear = [n for n, m in base_modules(model) if isinstance(m, nn.Linear) and not re.search(r"\b\d+\b", n)]
    named = [n for n in linear if plain_name(n).split(".")[-1] in _HEADS]
    return named[-1] if named else None


def matches(pattern: str, name: str, module: nn.Module | None = None) -> bool:
    """Whether ``pattern`` selects ``name``: the full name, its last parts, a regular expression, or a class (name).

    >>> [matches(p, "blocks.0.attn.qkv") for p in ("qkv", "attn.qkv", r"blocks.[0-3].*qkv", "kv", "blocks")]
    [True, True, True, False, False]
    """
    name = plain_name(name)
    if name == pattern or name.endswith("." + pattern):
        return True
    if module is not None and any(pattern == cls.__name__ for cls in base_class(module).__mro__[:-2]):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(
            f"{pattern!r} is neither a name in the model nor a regular expression ({error}). Give one of them."
        ) from None


def as_patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """One pattern, several, or none, as a tuple."""
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def select_targets(
    model: nn.Module,
    kinds: Collection[Kind],
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    who: str = "target_modules",
) -> list[Target]:
    """The targets that the patterns select, in the order of the model.

    Args:
        model: where to look.
        kinds: what the method can adapt.
        target_modules: ``"all-linear"`` (every linear layer but the output head), ``"all-layers"`` (everything the
            method can adapt but the head), or any of: full names, last parts of names, regular expressions, classes.
        exclude_modules: patterns of what is left out.
        layers_to_transform: keep the blocks of these indices only (the first number in a name counts).
        who: how errors name the caller.

    Raises:
        TargetError: a pattern, or an index, selects nothing that can be adapted.
    """
    everything = candidates(model)
    supported = [t for t in everything if t.site.kind in kinds]
    chosen: set[str] = set()
    for pattern in as_patterns(target_modules):
        found = _keyword(model, supported, pattern) if pattern in (ALL_LINEAR, ALL_LAYERS) else None
        if found is None:
            found = [t for t in supported if _selects(model, pattern, t)]
        if not found:
            raise _nothing_found(who, pattern, model, supported, kinds)
        chosen.update(t.name for t in found)
    for pattern in as_patterns(exclude_modules):
        left_out = {t.name for t in everything if _selects(model, pattern, t)}
        if not left_out:
            hint = nearest(pattern, (t.name for t in everything))
            raise TargetError(f"{who}: exclude_modules {pattern!r} matched no layer of {_describe(model)}.{hint}")
        chosen -= left_out
    if layers_to_transform is not None:
        chosen = keep_layers(chosen, layers_to_transform, who)
    if not chosen:
        raise TargetError(
            f"{who}: exclude_modules {exclude_modules!r} left nothing of target_modules {target_modules!r} to adapt. "
            "Leave fewer layers out."
        )
    return [t for t in supported if t.name in chosen]


def unsupported(
    model: nn.Module, kinds: Collection[Kind], target_modules: str | Sequence[str]
) -> list[tuple[str, nn.Module]]:
    """(plain name, layer) of what the patterns select beside the targets: layers with weights of no such kind."""
    can = {id(t.module) for t in candidates(model) if t.site.kind in kinds}

    def selected(name: str, module: nn.Module) -> bool:
        patterns = as_patterns(target_modules)
        linear = ALL_LINEAR in patterns and isinstance(module, nn.Linear) and not is_below(name, output_head(model))
        return linear or any(matches(p, name, module) for p in patterns if p not in (ALL_LINEAR, ALL_LAYERS))

    return [
        (plain_name(name), module)
        for name, module in base_modules(model)
        if id(module) not in can
        and next(module.parameters(), None) is not None
        and not dict(module.named_children()).keys() - {"adapters", "parametrizations"}
        and selected(name, module)
    ]


def select_modules(
    model: nn.Module, patterns: str | Sequence[str] | None, who: str, parameters: bool = False
) -> list[str]:
    """Names of the modules of any type that the patterns (or ``"output-head"``) select.

    Args:
        model: where to look.
        patterns: see above.
        who: how errors name the caller.
        parameters: select single parameters too, by their names.

    Raises:
        TargetError: a pattern selects nothing.
    """
    everything: dict[str, nn.Module | None] = {name: module for name, module in base_modules(model) if name}
    if parameters:
        everything |= dict.fromkeys(_parameter_names(model))
    chosen: dict[str, None] = {}
    for pattern in as_patterns(patterns):
        if pattern == OUTPUT_HEAD:
            head = output_head(model)
            found = [] if head is None else [head]
            hint = " No layer here is known to be the head: give its name instead of 'output-head'."
        else:
            found = [name for name, module in everything.items() if matches(pattern, name, module)]
            hint = nearest(pattern, everything)
        if not found:
            raise TargetError(f"{who}: {pattern!r} matched none of {len(everything)} modules.{hint}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def select_parameters(
    model: nn.Module,
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    who: str,
) -> list[str]:
    """Names of the base parameters in the modules that the patterns select, or that they select one by one.

    ``"all-layers"`` means all of them.

    Raises:
        TargetError: a pattern, or an index, selects nothing.
    """
    everything = _parameter_names(model)

    def selected(patterns: str | Sequence[str]) -> set[str]:
        names = select_modules(model, patterns, who, parameters=True)
        return {name for name in everything if any(is_below(name, other) for other in names)}

    chosen = set(everything)
    if target_modules != ALL_LAYERS:
        chosen = selected(target_modules)
    chosen -= selected(exclude_modules)
    if layers_to_transform is not None:
        chosen = keep_layers(chosen, layers_to_transform, who)
    return [name for name in everything if name in chosen]


def _parameter_names(model: nn.Module) -> list[str]:
    """Of all parameters of the base, each under every name that it has."""
    owned = [(owner, module.named_parameters(recurse=False)) for owner, module in base_modules(model)]
    return [f"{owner}.{name}".lstrip(".") for owner, parameters in owned for name, _ in parameters]


def is_below(name: str, module: str | None) -> bool:
    """Whether ``name`` is ``module`` or inside it."""
    return module is not None and f"{plain_name(name)}.".startswith(f"{plain_name(module)}.")


def _keyword(model: nn.Module, supported: list[Target], keyword: str) -> list[Target]:
    head = output_head(model)
    linear = keyword == ALL_LINEAR
    return [t for t in supported if not is_below(t.name, head) and (t.site.kind == "linear" or not linear)]


def _selects(model: nn.Module, pattern: str, target: Target) -> bool:
    if pattern == OUTPUT_HEAD:
        return is_below(target.name, output_head(model))
    if matches(pattern, target.name, target.module) or matches(pattern, target.owner, target.module):
        return True
    # an attention is adapted as a unit: naming it means its output projection too
    parent, _, last = target.owner.rpartition(".")
    attention = model.get_submodule(parent) if last == "out_proj" else None
    return isinstance(attention, nn.MultiheadAttention) and matches(pattern, parent, attention)


def keep_layers(names: Iterable[str], indices: Sequence[int], who: str) -> set[str]:
    index = {name: int(number[0]) for name in names if (number := re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name))}
    missing = sorted(set(indices) - set(index.values()))
    if missing:
        there = f"0 to {max(index.values())}" if index else "none"
        raise TargetError(
            f"{who}: layers_to_transform {missing} matched no block. The layers to adapt are in blocks {there}."
        )
    return {name for name, i in index.items() if i in set(indices)}


def _nothing_found(
    who: str, pattern: str, model: nn.Module, supported: list[Target], kinds: Iterable[Kind]
) -> TargetError:
    can = f"{who} adapts {', '.join(sorted(kinds))} layers"
    hit = [(n, m) for n, m in base_modules(model) if n and matches(pattern, n, m)]
    if hit:
        name, module = hit[0]
        inside = [t.name for t in supported if t.name.startswith(name + ".")][:3]
        fix = f" Inside it can be adapted: {', '.join(inside)}." if inside else _endings(model, supported)
        return TargetError(
            f"{who}: target_modules {pattern!r} matched {name!r}, a {base_class(module).__name__}; but {can}.{fix}"
        )
    hint = nearest(pattern, (t.name for t in supported)) or _endings(model, supported)
    return TargetError(
        f"{who}: target_modules {pattern!r} matched none of {len(supported)} layers of {_describe(model)}; {can}.{hint}"
    )


def _endings(model: nn.Module, supported: list[Target]) -> str:
    if not supported:
        kinds = sorted({t.site.kind for t in candidates(model)})
        return f" There are none in it; choose a method that adapts {' or '.join(kinds)} layers." if kinds else ""
    endings = sorted({t.name.split(".")[-1] for t in supported})
    others = " 'all-layers' takes them all." if any(t.site.kind != "linear" for t in supported) else ""
    return f" The names of those end in: {', '.join(endings[:8])}{', ...' if len(endings) > 8 else ''}.{others}"


def _describe(model: nn.Module) -> str:
    return base_class(model).__name__
