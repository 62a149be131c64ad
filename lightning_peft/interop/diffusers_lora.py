"""LoRA files of diffusers: one ``pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights`` reads.

Keys are ``<component>.<module>.lora_A.weight``, where a component is what a pipeline calls a part of it: ``unet``,
``transformer``, ``text_encoder``. Settings of each component stand in the metadata of the file. Some readers see the
tensors alone (a state dict that is handed over) and scale by one; so the scaling is in the factors here, and
``alpha == r`` in the metadata: both compute the same. Nothing here imports diffusers.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.engine import Adapter, AdapterFileError, Method
from lightning_peft.engine.slots import base_class, plain_name
from lightning_peft.engine.targets import base_modules
from lightning_peft.interop.hf_format import PREFIX, read_alphas
from lightning_peft.interop.hf_lora import TENSOR, lora_method, tensor_names
from lightning_peft.interop.hf_peft import check_settings
from lightning_peft.methods import DoRA, LoRA, LoRAPlus

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

# what is written as it is; any other low-rank change becomes a plain LoRA first
PLAIN = (LoRA, LoRAPlus, DoRA)

_COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_\d+)?")


def components(model: nn.Module) -> dict[str, str]:
    """Component -> plain path to it, of ``model`` itself or of what it holds; ``""`` is the path to ``model``."""
    found: dict[str, str] = {}
    inside: list[str] = []
    for path, module in base_modules(model):
        if any(path.startswith(above) for above in inside):
            continue
        component = _component(path, module)
        if component is not None:
            inside.append(f"{path}." if path else "")
            # of two, the one that goes by this name: another may be a copy of it
            if component not in found or path.rpartition(".")[2] == component:
                found[component] = plain_name(path)
    return found


def to_diffusers(
    model: nn.Module, method: Method, found: list[tuple[str, nn.Module, Adapter]], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors as diffusers writes them.

    Args:
        model: which holds the components, or is one.
        method: one of `PLAIN`.
        found: (module name, module, adapter) of all.
        state: what is saved of them.

    Raises:
        AdapterFileError: something is not inside a component, or was trained beside the adapters, or diffusers
            computes something else with it.
    """
    places = components(model)
    members: dict[str, list[tuple[str, nn.Module, Adapter]]] = {component: [] for component in places}
    for path, module, adapter in found:
        members[_holding(path, places, model)].append((path, module, adapter))
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    left = dict(state)
    for component, adapters in members.items():
        ranks: dict[str, int] = {}
        for path, module, adapter in adapters:
            if adapter.site.kind == "embedding":
                raise AdapterFileError(
                    f"diffusers does not load the LoRA of an embedding ({path}). Leave it out with exclude_modules, or "
                    "merge(model) and save the weights."
                )
            inner = path.removeprefix(f"{places[component]}.")
            prefix = adapter.site.prefix(path)
            for ours, (key, shape) in tensor_names(inner, module, adapter).items():
                value = left.pop(prefix + ours)
                if ours == "lora_B":
                    value = value * adapter.scaling.to(value.device)  # type: ignore[operator]
                # transformers, which loads text encoders, does not complete this key as HF PEFT does
                whole = key.endswith("lora_magnitude_vector") and component.startswith("text_encoder")
                tensors[f"{component}.{key}{'.weight' if whole else ''}"] = value.reshape(shape)
            ranks[inner] = len(adapter.lora_A)  # type: ignore[arg-type]
        if ranks:
            settings = _settings(ranks) | {"use_dora": isinstance(method, DoRA), "lora_dropout": method.dropout}  # type: ignore[attr-defined]
            metadata |= {f"{component}.{key}": value for key, value in settings.items()}
    if left:
        raise AdapterFileError(
            f"{next(iter(left))!r} was trained or has changed beside the adapters, and a LoRA file of diffusers has no "
            "place for it. Save in the default format, or merge(model) and save the weights."
        )
    return metadata, tensors


def method_from_diffusers(
    metadata: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[Method, dict[str, Tensor], dict[str, str]]:
    """The method that made this file, its targets named in full; its tensors as HF PEFT names them; its components.

    Args:
        metadata: what the file says of itself, if it does.
        tensors: of the file.
        model: where they are to go.

    Raises:
        AdapterFileError: ``model`` has no such component or module, or a setting, or the form of the keys, is not
            known here.
    """
    places = components(model)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    renamed: dict[str, Tensor] = {}
    settings: list[Mapping[str, Any]] = []
    modules = {plain_name(path) for path, _ in base_modules(model)}
    split = _split(tensors, places)
    for component, parts in split.items():
        place = f"{places[component]}." if places[component] else ""
        matched = {key: TENSOR.match(key) for key in parts}
        odd = next((key for key, match in matched.items() if match is None), None)
        if odd is not None:
            raise AdapterFileError(
                f"the key {odd!r} is of a form that is not read here. Load the file with load_lora_adapter of "
                "diffusers, and write it with save_lora_adapter."
            )
        inner = {match["module"]: parts[key].shape[0] for key, match in matched.items() if match and _is_down(key)}
        missing = next((name for name in inner if place + name not in modules), None)
        if missing is not None:
            raise AdapterFileError(
                f"the file adapts {missing!r} of the {component}, which {base_class(model).__name__} does not have. "
                "Load it into the model that it was made with."
            )
        config = _config(metadata, component) or _settings(inner) | {
            "use_dora": any("lora_magnitude_vector" in key for key in parts)
        }
        check_settings(config)
        settings.append(config)
        ranks |= {place + name: r for name, r in inner.items()}
        alphas |= {place + name: alpha for name, alpha in read_alphas(config, inner).items()}
        renamed |= {PREFIX + place + key: value for key, value in parts.items()}
    for setting in ("use_dora", "use_rslora"):
        if len({bool(config.get(setting)) for config in settings}) > 1:
            raise AdapterFileError(
                f"{setting} differs between {' and '.join(split)}, and one method cannot be both. Take each component "
                "into a file of its own."
            )
    return lora_method(settings[0], ranks, alphas, exact=True), renamed, {name: places[name] for name in split}


def _component(path: str, module: nn.Module) -> str | None:
    """What pipelines call ``module``, which lies at ``path``; None if they load no LoRA into it."""
    attribute = plain_name(path).rpartition(".")[2]
    if hasattr(module, "load_lora_adapter"):  # a model of diffusers
        if _COMPONENT.fullmatch(attribute):
            return attribute
        kind = base_class(getattr(module, "_orig_mod", module)).__name__
        return "unet" if "UNet" in kind else "transformer" if "Transformer" in kind else None
    # a model of transformers: there are others in it, so its attribute decides
    return attribute if attribute.startswith("text_encoder") and hasattr(module, "load_adapter") else None


def _holding(path: str, places: Mapping[str, str], model: nn.Module) -> str:
    """The component that module ``path`` is in."""
    for component, place in places.items():
        if not place or path.startswith(f"{place}."):
            return component
    here = f"; here are: {', '.join(places)}" if places else ""
    raise AdapterFileError(
        f"{path!r} is in no part of {base_class(model).__name__} that pipelines of diffusers load LoRA into (unet, "
        f"transformer, text_encoder{here}). Save in the default format, or merge(model) and save the weights."
    )


def _split(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Component -> its tensors. A file without names of components is for the only one that there is."""
    named: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, rest = key.partition(".")
        component, inner = (first, rest) if _COMPONENT.fullmatch(first) else ("", key)
        named.setdefault(component, {})[inner] = value
    if list(named) == [""] and len(places) == 1:
        return {next(iter(places)): named[""]}
    missing = [component or "a model without a name" for component in named if component not in places]
    if missing:
        there = ", ".join(places) or "none"
        raise AdapterFileError(
            f"the file adapts {missing[0]}; components of diffusers that are here: {there}. Load it into the model "
            "that it was made with, or into a module that holds it under that name."
        )
    return named


def _config(metadata: Mapping[str, Any] | None, component: str) -> dict[str, Any] | None:
    """The settings of ``component``; those of a file without names of components stand there as they are."""
    prefix = f"{component}."
    own = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if key.startswith(prefix)}
    return own or {key: value for key, value in (metadata or {}).items() if "." not in key} or None


def _settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Those of a LoRA of these ranks whose scaling is one."""
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    # ^: a name is taken for the last part of longer ones as well
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "bias": "none",
    }


def _is_down(key: str) -> bool:
    return key.endswith("lora_A.weight")
