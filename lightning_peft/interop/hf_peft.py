"""Translation to and from the files of Hugging Face PEFT, for the methods that both know.

Its file holds ``base_model.model.<module>.lora_A.weight`` and the like; its config says which modules, by name. Reading
trusts the tensors, not the patterns of the config: what is in the file is what is adapted. `ROWS` has a row for each of
its types. What HF PEFT has no place for (buffers of ours, say) stands in the file under our own names, which it passes
over.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prompts import Tokens
from lightning_peft.engine import AdapterFileError, HostedMethod, Method, adapters_of
from lightning_peft.engine.method import METHOD_STATE
from lightning_peft.engine.slots import plain_name
from lightning_peft.engine.targets import candidates
from lightning_peft.interop import hf_delta, hf_experts, hf_lora, hf_prompts, hfpeft
from lightning_peft.interop.hf_format import (
    BROUGHT,
    PREFIX,
    Found,
    NoCounterpart,
    Parts,
    Place,
    Row,
    State,
    Unread,
    check_brought,
    ends_of,
    tied_names,
)
from lightning_peft.interop.renamed import new_names, under_new_names


def reads(config: Mapping[str, Any]) -> str | None:
    """Why a file of HF PEFT with this config is not read here, as sentences; None if it is."""
    try:
        check_settings(config)
    except AdapterFileError as reason:
        return str(reason)
    return None


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise an `AdapterFileError` if the type, or a setting of it, is not known here."""
    kind = config.get("peft_type")
    if kind not in ROWS:
        known = ", ".join(sorted(kind for kind, row in ROWS.items() if row.read))
        raise Unread(f"the file holds an adapter of HF PEFT's type {kind!r}; those read here: {known}.")
    ROWS[kind].check(config)


def method_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[Method, dict[str, Tensor]]:
    """The method that made this file of HF PEFT, its targets named in full, and the tensors that `from_peft` takes.

    Raises:
        AdapterFileError: the type, or a setting of it, is not known here; or something is missing in the file.
    """
    try:
        return _method_of_ours(config, tensors, model)
    except Unread as reason:
        return hfpeft.method_from(config, model, str(reason)), dict(tensors)


def _method_of_ours(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[Method, dict[str, Tensor]]:
    check_settings(config)
    row = ROWS[config["peft_type"]]
    row.warn(config)
    if any(".base_layer.out_proj." in key for key in tensors):
        raise AdapterFileError(
            "the file adapts nn.MultiheadAttention, where HF PEFT adds the update of out_proj twice."
        )
    own = re.compile(rf"(?:(?P<module>.+)\.)?(?P<name>{'|'.join(map(re.escape, row.names))})(?:(?<=vector)\.weight)?$")
    found: Parts = {}
    others: dict[str, Tensor] = {}
    brought: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = own.match(key.removeprefix(row.prefix))
        if match:
            found.setdefault(match["module"] or "", {})[match["name"]] = value
        elif key.endswith(BROUGHT):
            brought[key] = value
        elif not _is_copy(key, tensors):
            others[key.replace(".base_layer.", ".")] = value
    if row.prefix == PREFIX:  # it adapts layers
        now = new_names(model, (*found, *(key.removeprefix(PREFIX) for key in others)))
        because = _no_layer_now(model, now, found)
        if because and config["peft_type"] == "LORA":  # which HF PEFT fuses as transformers does the weights
            return hfpeft.method_from(config, model, because), dict(tensors)
        if because:
            raise AdapterFileError(f"{because} Merge it with the version of transformers that it was made with.")
        if now:
            config, found, others = under_new_names(now, config, found, others)
    try:
        method, found = row.read(config, found, _trained_whole(others, row), model)  # type: ignore[misc]  # it was checked
    except KeyError as missing:
        raise AdapterFileError(
            f"the file has no {missing.args[0]!r} of a layer that it adapts: it is damaged."
        ) from None
    short = _also_others(found, model)
    if short:
        names = (f"^{re.escape(name)}" if name in short else name for name in sorted(found))
        method = dataclasses.replace(method, target_modules=tuple(names))  # type: ignore[type-var]
    parts = {f"{row.prefix}{module}.{name}": t for module, named in found.items() for name, t in named.items()}
    return method, {key.lstrip("."): value for key, value in parts.items()} | others | brought


def _no_layer_now(model: nn.Module, now: Mapping[str, str], modules: Iterable[str]) -> str | None:
    """What has become of the first of ``modules`` that is ``now`` something else than a layer, as a sentence."""
    layers = ends_of(target.name for target in candidates(model)) if now else set()
    for name in modules:
        if name in now and now[name] not in layers:
            return f"the file adapts {name!r}, which is no layer in this version of transformers, but in {now[name]!r}."
    return None


def _also_others(found: Parts, model: nn.Module) -> set[str]:
    """Those of the names of layers ``found`` that end the names of others, which are not in the file.

    None of them inside of another model, whose names are longer.
    """
    there = {target.name for target in candidates(model)}
    if not found.keys() <= there:
        return set()
    ends = {name[match.end() :] for name in there - found.keys() for match in re.finditer(r"\.", name)}
    return ends & found.keys()


def _is_copy(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a bias of a module trained whole that is there under its own name too, or its base value."""
    plain = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != key and plain in tensors


def to_peft(
    model: nn.Module, method: Method, found: Found, state: State, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors as HF PEFT writes them, of a ``model`` that lies below ``prefix`` of what was adapted.

    Raises:
        NoCounterpart: HF PEFT does not know this method.
        AdapterFileError: it cannot express what the method did here.
    """
    if isinstance(method, hfpeft.HFPEFT):
        return hfpeft.to_peft(found, prefix)
    while isinstance(method, HostedMethod):  # what it injects is the other's
        method = method.host
    if type(method) not in CONFIGS:
        raise NoCounterpart(f"HF PEFT has no counterpart of {type(method).__name__}.")
    if not found:
        raise AdapterFileError("it reads no file in which nothing is adapted.")
    kind = CONFIGS[type(method)]
    row, tensors, left = ROWS[kind], {}, dict(state)
    for ours, place in places(found, row).items():
        # what is scaled there stands beside it as it is, for a division does not bring back every bit
        value = left.pop(ours) if place.factor == 1 else left[ours] * place.factor
        tensors[row.prefix + place.key] = value.reshape(place.shape)
    tied = [names for names in tied_names(model) if len(names) > 1 and any(name in left for name in names)]
    for names in tied:  # HF PEFT copies what is trained whole, and takes no other end along
        left |= dict.fromkeys(names, next(left[name] for name in names if name in left))
    biases = _single_biases(model, [key for key in left if not _is_ours(key)], row)
    adapted = {path for path, _, _ in found}
    for key, value in left.items():
        path = key.removesuffix(".bias")
        layer = ".base_layer" if key in biases and path in adapted else ""
        tensors[f"{row.whole_prefix}{path}{layer}{key.removeprefix(path)}"] = value
    whole = {key.rpartition(".")[0] for key in left if not _is_ours(key) and key not in biases}
    tensors |= row.derived(found, state)
    config = {
        "peft_type": kind,
        "modules_to_save": sorted(whole) or None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
    }
    if row.prefix:  # it adapts layers
        config["target_modules"] = _short_names(model, [path for path, _, _ in found])
    if row.transposed and row.prefix:
        config["fan_in_fan_out"] = any(a.site.kind == "linear" and a.site.transposed for _, _, a in found)
    if tied and "ensure_weight_tying" in row.known:
        config["ensure_weight_tying"] = True
    if row.bias:
        config["bias"] = "all" if biases else "none"
    return config | row.write(method, found, model, state), tensors  # type: ignore[misc]  # it has a method


def from_peft(
    model: nn.Module,
    name: str,
    state: State,
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    allow_other_base: bool = False,
) -> dict[str, Tensor]:
    """Tensors under our keys and in our shapes.

    Args:
        model: what lies below ``prefix`` of the model that was adapted.
        name: of the adapter, which was injected.
        state: its live tensors.
        tensors: of the file.
        prefix: see above.
        allow_other_base: also where the file holds other values of the base.

    Raises:
        AdapterFileError: it does, or two values of one parameter, or ``peft`` does not accept its own.
    """
    found = adapters_of(model, name)
    bridged = bool(found) and isinstance(found[0][2], hfpeft.HFPEFTAdapter)
    brought = hfpeft.beside(found, tensors, prefix) if bridged else {key for key in tensors if key.endswith(BROUGHT)}
    if brought and not allow_other_base:
        check_brought(model, tensors, brought)
    tensors = {key: value for key, value in tensors.items() if key not in brought}
    if bridged:
        return hfpeft.from_peft(found, state, tensors, prefix)
    prompt = any(isinstance(adapter, Tokens) for _, _, adapter in found)
    prefix = "base_model." if prompt else PREFIX
    left = {key.removeprefix(prefix): value for key, value in tensors.items()}
    ours: dict[str, Tensor] = {}
    for key, place in places(found).items():
        value = left.pop(place.key, left.pop(f"{place.key}.weight", None))
        if value is not None:
            value = value if place.factor == 1 else value / place.factor
            ours[key] = value.reshape(state[key].shape) if value.shape == place.shape else value
    # what stands under our own names is exact
    exact = {key.replace(".base_layer.", "."): value for key, value in left.items() if key not in _DERIVED}
    return _once(model, state, ours | exact)


def _once(model: nn.Module, state: State, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with those of tied parameters of ``state`` under one name."""
    for names in tied_names(model):
        own = next((name for name in names if name in state and name in tensors), None)
        for other in names:
            if own is None or other == own or other not in tensors:
                continue
            if not torch.equal(tensors[own], tensors.pop(other)):
                raise AdapterFileError(
                    f"the file holds two values, as {own!r} and as {other!r}, of what is one parameter here. Give each "
                    f"its own first: model.{other} = torch.nn.Parameter(model.{other}.detach().clone())."
                )
    return tensors


def places(found: Found, row: Row | None = None) -> dict[str, Place]:
    """Our key -> its place in a file of HF PEFT, for all adapters ``found``.

    Raises:
        AdapterFileError: HF PEFT has no place for one of them in a file of the type of ``row``, or computes something
            else with it. Without a row, of any type.
    """
    by_class = row.places if row else {cls: place for row in ROWS.values() for cls, place in row.places.items()}
    all_places: dict[str, Place] = {}
    for path, module, adapter in found:
        cls = next((cls for cls in type(adapter).__mro__ if cls in by_class), None)
        if cls is None:
            raise NoCounterpart(f"HF PEFT has no counterpart of {type(adapter).__name__} ({path}).")
        if row and adapter.site.kind != "module":
            row.check_layer(path, module, adapter)
        own = by_class[cls](path, module, adapter, found)
        all_places |= {adapter.site.prefix(path) + name: place for name, place in own.items()}
    return all_places


def _is_ours(key: str) -> bool:
    """Whether it is no parameter of the base."""
    return key.startswith((METHOD_STATE, "adapters.")) or ".adapters." in key


def _trained_whole(tensors: Iterable[str], row: Row) -> tuple[str, ...]:
    """The modules that these keys belong to; of those of which there is a bias alone, that."""
    plain = [key.removeprefix(row.whole_prefix) for key in tensors]
    more = {key.rpartition(".")[0] for key in plain if not key.endswith(".bias")}
    return tuple(sorted({path if path in more else key for key in plain for path in [key.rpartition(".")[0]]} | more))


def _single_biases(model: nn.Module, keys: Sequence[str], row: Row) -> set[str]:
    """Those of ``keys`` that are biases of modules of which nothing else is among them."""
    single: set[str] = set()
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for key in keys:
        path, _, name = key.rpartition(".")
        others = {f"{path}.{other}".lstrip(".") for other, _ in modules[path].named_parameters(recurse=False)}
        if not others <= {*keys}:
            if name != "bias" or not row.bias:
                raise AdapterFileError(f"HF PEFT saves modules whole, and of {path!r} {name} alone is trained.")
            single.add(key)
    return single


def _short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The last parts of the names where they select nothing else, else the full names."""
    last = {path.rpartition(".")[2] for path in paths}
    names = {plain_name(name) for name, _ in model.named_modules()}
    selected = {name for name in names if name.rpartition(".")[2] in last}
    return sorted(last if selected == set(paths) else paths)


ROWS: dict[str, Row] = {
    **hf_lora.ROWS,
    **hf_delta.ROWS,
    **hf_experts.ROWS,
    **hf_prompts.ROWS,
}
CONFIGS: dict[type[Method], str] = {method: kind for kind, row in ROWS.items() for method in row.methods}
_DERIVED = ("base_model.vera_A", "base_model.vera_B", hf_prompts.PROMPT)
