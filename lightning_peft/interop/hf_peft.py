"""Translation to and from the files of Hugging Face PEFT, for the methods that both know.

Its file holds ``base_model.model.<module>.lora_A.weight`` and the like; its config says which modules, by name. Reading
trusts the tensors, not the patterns of the config: what is in the file is what is adapted.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.adapters.low_rank import LowRank, LowRankEmbedding
from lightning_peft.engine import Adapter, AdapterFileError, Method, adapters_of
from lightning_peft.engine.slots import plain_name
from lightning_peft.methods import IA3, DoRA, LoRA, LoRAPlus

V = TypeVar("V")

PREFIX = "base_model.model."

TENSOR = re.compile(r"(?P<module>.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?|ia3_l)$")

# settings of a LoraConfig that change what the file means, and the value at which they do not
_PLAIN = {
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False, True),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


def tensor_names(path: str, module: nn.Module, adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our parameter name -> (key, shape) in a file of HF PEFT.

    Raises:
        AdapterFileError: HF PEFT has no place for this adapter, or computes something else with it.
    """
    if not path:
        raise AdapterFileError("HF PEFT adapts the layers inside a model, not a model that is one layer.")
    if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        raise AdapterFileError(f"HF PEFT adds the update of out_proj twice in nn.MultiheadAttention ({path}).")
    if adapter.site.kind == "conv" and module.groups != 1:
        raise AdapterFileError(f"HF PEFT computes something else for {path}, a convolution with groups.")
    shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    if not isinstance(adapter, LowRank):  # (IA)^3
        (size,) = shapes["scale"]
        return {"scale": (f"{path}.ia3_l", (1, size) if adapter.on_input else (size, 1))}
    spatial = (1,) * (len(shapes["lora_A"]) - 2)
    keys = {
        "lora_A": (f"{path}.lora_A.weight", shapes["lora_A"]),
        "lora_B": (f"{path}.lora_B.weight", shapes["lora_B"] + spatial),
    }
    if isinstance(adapter, LowRankEmbedding):
        keys = {name: (f"{path}.lora_embedding_{name[-1]}", shapes[name]) for name in keys}
    if "magnitude" in shapes:
        vector = (1, *shapes["magnitude"], *spatial) if spatial else shapes["magnitude"]
        keys["magnitude"] = (f"{path}.lora_magnitude_vector", vector)
    return keys


def to_peft(
    model: nn.Module, method: Method, found: list[tuple[str, nn.Module, Adapter]], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors as HF PEFT writes them.

    Raises:
        AdapterFileError: HF PEFT does not know this method, or cannot express what it did here.
    """
    if type(method) not in CONFIGS:
        raise AdapterFileError(f"HF PEFT has no counterpart of {type(method).__name__}.")
    tensors, left = {}, dict(state)
    for path, module, adapter in found:
        prefix = f"{path}.{adapter.site.key('adapters')}."
        for ours, (key, shape) in tensor_names(path, module, adapter).items():
            tensors[PREFIX + key] = left.pop(prefix + ours).reshape(shape)
    tensors |= {PREFIX + key: value for key, value in left.items()}
    whole = sorted({key.rpartition(".")[0] for key in left})
    config = {
        "target_modules": _short_names(model, [path for path, _, _ in found]),
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(a.site.kind == "linear" and a.site.transposed for _, _, a in found),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
    }
    return config | CONFIGS[type(method)](method, found), tensors


def method_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> Method:
    """The method that made this file of HF PEFT, its targets named in full.

    Raises:
        AdapterFileError: the method, or a setting of it, is not known here.
    """
    check_settings(config)
    if any(".base_layer.out_proj." in key for key in tensors):
        raise AdapterFileError(
            "the file adapts nn.MultiheadAttention, where HF PEFT adds the update of out_proj twice."
        )
    matched = {key: TENSOR.match(key.removeprefix(PREFIX)) for key in tensors}
    names = {key: m["module"] for key, m in matched.items() if m}
    whole = {
        key.removeprefix(PREFIX).rpartition(".")[0] for key, m in matched.items() if not m and "base_layer" not in key
    }
    reader = _READERS[config["peft_type"]]
    return reader(config, {names[key]: tensors[key] for key in names if _gives_rank(key)}, tuple(sorted(whole)))


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise an `AdapterFileError` if the method, or a setting of it, is not known here."""
    kind = config.get("peft_type")
    if kind not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise AdapterFileError(f"the file holds an adapter of HF PEFT's type {kind!r}; those read here: {known}.")
    if kind == "LORA" and not isinstance(config.get("r"), int):
        raise AdapterFileError("the config does not say the rank r of the adapter: it is torn or foreign.")
    for setting, plain in _PLAIN.items():
        if setting in config and config[setting] not in plain:
            raise AdapterFileError(
                f"the file was made with {setting}={config[setting]!r}, which is not read here (only {plain[0]!r} is). "
                "Merge it with HF PEFT, or convert it to a plain adapter there."
            )


def from_peft(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our keys and in our shapes, for the adapter ``name`` that was injected into ``model``."""
    left = {key.removeprefix(PREFIX): value for key, value in tensors.items() if ".base_layer.weight" not in key}
    ours: dict[str, Tensor] = {}
    for path, module, adapter in adapters_of(model, name):
        prefix = f"{path}.{adapter.site.key('adapters')}."
        for parameter, (key, shape) in tensor_names(path, module, adapter).items():
            if key not in left and f"{key}.weight" in left:
                key = f"{key}.weight"
            if key in left and left[key].shape == shape:
                ours[prefix + parameter] = left.pop(key).reshape(adapter.get_parameter(parameter).shape)
    return ours | left


def _gives_rank(key: str) -> bool:
    return key.endswith(("lora_A.weight", "lora_embedding_A", "ia3_l"))


def _short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The last parts of the names where they select nothing else, else the full names."""
    last = {path.rpartition(".")[2] for path in paths}
    names = {plain_name(name) for name, _ in model.named_modules()}
    selected = {name for name in names if name.rpartition(".")[2] in last}
    return sorted(last if selected == set(paths) else paths)


def _lora_config(method: LoRA, found: list[tuple[str, nn.Module, Adapter]]) -> dict[str, Any]:
    ranks = {path: adapter.lora_A.shape[0] for path, _, adapter in found}  # type: ignore[index]
    power = 0.5 if method.use_rslora else 1
    alphas = {path: round(float(adapter.scaling) * ranks[path] ** power, 6) for path, _, adapter in found}  # type: ignore[arg-type]
    alpha = method.r**power if method.alpha is None else method.alpha
    return {
        "peft_type": "LORA",
        "r": method.r,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(path, ranks): r for path, r in ranks.items() if r != method.r},
        "alpha_pattern": {exactly(path, ranks): a for path, a in alphas.items() if abs(a - alpha) > 1e-4},
        "lora_dropout": method.dropout,
        "use_rslora": method.use_rslora,
        "use_dora": isinstance(method, DoRA),
        "bias": "none",
    }


def exactly(path: str, others: Iterable[str]) -> str:
    """The pattern of HF PEFT that selects ``path``, and not those of ``others`` that end in it."""
    return f"^{re.escape(path)}" if any(other.endswith(f".{path}") for other in others) else re.escape(path)


def _ia3_config(method: IA3, found: list[tuple[str, nn.Module, Any]]) -> dict[str, Any]:
    inner = {path for path, _, adapter in found if adapter.on_input}
    outer = {path for path, _, adapter in found if not adapter.on_input}
    # HF PEFT wants both lists in the same form, and no name of the one in the other
    return {"peft_type": "IA3", "target_modules": sorted(inner | outer), "feedforward_modules": sorted(inner)}


def read_alphas(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Name of each adapted module -> its alpha."""

    def alpha(name: str) -> Any:
        patterns = config.get("alpha_pattern") or {}
        hits = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        return hits[0] if hits else config.get("lora_alpha", 8)

    return {name: alpha(name) for name in names}


def lora_method(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    whole: tuple[str, ...] = (),
    exact: bool = False,
) -> Method:
    """The method of a LoraConfig.

    Args:
        config: its settings.
        ranks: name of each adapted module -> its rank.
        alphas: the same for alpha.
        whole: modules that were trained whole.
        exact: the names are those in the model; else their last parts, for a model inside of another.
    """
    alpha = config.get("lora_alpha", 8)
    names = {name: f"^{re.escape(name)}" if exact else name for name in ranks}
    return (DoRA if config.get("use_dora") else LoRA)(
        r=config["r"],
        alpha=alpha,
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
        rank_pattern={names[name]: r for name, r in own_values(ranks, config["r"]).items()},
        alpha_pattern={names[name]: a for name, a in own_values(alphas, alpha).items()},
        target_modules=tuple(sorted(names.values())),
        modules_to_save=whole,
    )


def _read_lora(config: Mapping[str, Any], found: dict[str, Tensor], whole: tuple[str, ...]) -> Method:
    return lora_method(config, {name: t.shape[0] for name, t in found.items()}, read_alphas(config, found), whole)


def own_values(values: Mapping[str, V], default: V) -> dict[str, V]:
    """Those of ``values`` that a pattern has to name, the longest names first.

    A name selects all that end in it, and the first pattern that matches counts. So a longer name that ends in one that
    is there is there as well, before it.
    """
    own = [name for name, value in values.items() if value != default]
    named = [n for n in values if n in own or any(n.endswith(f".{short}") for short in own)]
    return {name: values[name] for name in sorted(named, key=len, reverse=True)}


def _read_ia3(config: Mapping[str, Any], found: dict[str, Tensor], whole: tuple[str, ...]) -> Method:
    inner = tuple(sorted(name for name, tensor in found.items() if tensor.shape[0] == 1))
    return IA3(target_modules=tuple(sorted(found)), feedforward_modules=inner, modules_to_save=whole)


CONFIGS: dict[type[Method], Callable[..., dict[str, Any]]] = {
    LoRA: _lora_config,
    LoRAPlus: _lora_config,
    DoRA: _lora_config,
    IA3: _ia3_config,
}
_READERS: dict[str, Callable[..., Method]] = {"LORA": _read_lora, "IA3": _read_ia3}
