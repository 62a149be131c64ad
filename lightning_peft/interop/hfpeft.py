"""The bridge: any adapter of Hugging Face PEFT, computed by its own code in our slots.

HF PEFT builds its layers into a shadow of the model (`lightning_peft.interop.shadow`). Each layer that it put in the
place of a module becomes an adapter on the real one; where it calls the layer that it wraps, that call goes to what
lies below the adapter.

Paper: that of the tuner.
Formula: y = t(x, f), where t is the layer of the tuner and f what lies below.
Shapes: those of the tuner.
Example: {"config": {"peft_type": "OFT", "target_modules": "all-linear"}}
Init: that of the tuner, drawn from numbers of its own; most begin as the base.
Merge: W' = what ``merge`` of the tuner makes of W, where it has one.
"""

import contextlib
import copy
import dataclasses
import inspect
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.engine import (
    Adapter,
    AdapterError,
    AdapterFileError,
    MergeError,
    Method,
    TargetError,
    adapters_of,
    register,
    slots,
)
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.record import ModelT
from lightning_peft.engine.slots import Layer, Site, plain_name
from lightning_peft.engine.state import refuse
from lightning_peft.engine.targets import Target, sites
from lightning_peft.interop.hf_format import PREFIX
from lightning_peft.interop.patterns import check_pattern
from lightning_peft.interop.shadow import replaced, shadow_of, twin_of

NAME = "default"  # under which HF PEFT knows the one adapter of each shadow

_PROMPTS = "changes what a model is given, and with it the code that calls the model. Prompts of lightning_peft: "
_REFUSED = {
    "PROMPT_TUNING": _PROMPTS + "PromptTuning.",
    "MULTITASK_PROMPT_TUNING": _PROMPTS + "PromptTuning.",
    "CPT": _PROMPTS + "PromptTuning.",
    "P_TUNING": _PROMPTS + "PTuning.",
    "PREFIX_TUNING": _PROMPTS + "PrefixTuning(place='cache').",
    "CARTRIDGE": _PROMPTS + "PrefixTuning(place='cache').",
    "ADALORA": "drops ranks in calls that the training loop has to make. AdaLoRA of lightning_peft makes them itself.",
    "XLORA": "calls the model twice. XLoRA of lightning_peft does; load_experts takes adapters that are trained.",
    "SHADOW": "runs a network beside the model that none of its layers holds. See LadderSideTuning of lightning_peft.",
}


@register("hfpeft")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HFPEFT(Method):
    """Any tuner of Hugging Face PEFT, computed by ``peft`` itself.

    For tuners that this library has no method for.

    Args:
        config: a ``peft.PeftConfig``, or its settings with ``peft_type`` among them; by default LoRA on all linear
            layers. ``inference_mode`` and where a base came from do not count.

    Raises:
        AdapterError: ``peft`` is not installed or does not accept the settings, or the tuner cannot run here.
        TargetError: ``peft`` finds nothing to adapt, or adapts what cannot be adapted here.
    """

    paper = ""

    config: Any = dataclasses.field(default_factory=lambda: {"peft_type": "LORA", "target_modules": "all-linear"})

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        targets = ["q_proj", "v_proj"]
        return (
            cls(config={"peft_type": "LORA", "r": 2, "target_modules": targets}),
            cls(config={"peft_type": "VERA", "r": 3, "target_modules": targets}),
        )

    def __post_init__(self) -> None:
        settings = self.config if isinstance(self.config, dict) else _settings_of(self.config)
        kind = _plain(settings.get("peft_type"))
        if kind in _REFUSED:
            raise AdapterError(f"HFPEFT: {kind} {_REFUSED[kind]}")
        object.__setattr__(self, "config", _told(settings))
        super().__post_init__()
        _peft_config(self.config)

    def targets(self, model: nn.Module) -> list[Target]:
        """Every module that ``peft`` replaces."""
        return list(_bridged(model, self.config).targets)

    def adapter(self, target: Target) -> Adapter:
        """The layer that ``peft`` made for it."""
        return HFPEFTAdapter(target)  # type: ignore[arg-type]  # it is one of those

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """Nothing, but for biases where the config says so."""
        return [] if self.config.get("bias", "none") == "none" else _bridged(model, self.config).in_place

    def num_trainable(self, target: Target) -> int:
        """What the layer of the tuner trains."""
        return self.total_trainable([target])

    def total_trainable(self, targets: list[Target]) -> int:
        """Those of all layers, what they share once."""
        layers = [target.layer for target in targets if isinstance(target, BridgedTarget)]
        return sum(p.numel() for p in {p for layer in layers for p in layer.parameters() if p.requires_grad})


@dataclasses.dataclass(frozen=True)
class BridgedTarget(Target):
    """A module with the ``layer`` that HF PEFT made for it.

    ``shadow`` is what that wraps, ``holders`` the parts of it that had it as a child, under which names, ``tuned``
    the model it is part of, and ``root`` what names begin with here and not in that.
    """

    layer: nn.Module
    shadow: nn.Module
    holders: list[tuple[nn.Module, str]]
    tuned: nn.Module
    root: str


@dataclasses.dataclass
class _Bridged:
    targets: list[BridgedTarget]
    in_place: list[str]


class HFPEFTAdapter(Adapter):
    """A layer of HF PEFT, without the layer that it wraps."""

    def __init__(self, target: BridgedTarget) -> None:
        super().__init__()
        self.layer = target.layer
        # no children: they are the base
        self.__dict__.update(shadow=target.shadow, holders=target.holders, tuned=target.tuned, root=target.root)
        self._by_task = "task_ids" in inspect.signature(target.layer.forward).parameters  # in Poly
        self._tasks: Tensor | None = None
        self._trained = {name for name, p in target.layer.named_parameters() if p.requires_grad}

    def forward(self, x: Any, layer: Layer) -> Any:
        shadow, keyword = self.__dict__["shadow"], layer.keyword
        if hasattr(self.layer, "parameter_name"):  # it exchanges a parameter of the shadow while that runs
            if not layer.is_base:
                raise AdapterError("HFPEFT: target_parameters act on a bare module, and here another adapter is below.")
            shadow.__dict__["_parameters"] = dict(layer.module._parameters)
            return self.layer(x, **layer.arguments())

        def below(*args: Any, **kwargs: Any) -> Any:
            if not args and keyword is not None:
                args = (kwargs.pop(keyword),)
            return layer(*args, **kwargs)

        shadow.__dict__["forward"] = below
        try:
            if keyword is None or self.site.kind != "module":  # single layers call it x, whatever its name was
                return self.layer(x, **layer.arguments(), **self._tasks_of(x))
            return self.layer(**{keyword: x}, **layer.arguments())
        finally:
            del shadow.__dict__["forward"]

    def _tasks_of(self, x: Tensor) -> dict[str, Tensor]:
        if not self._by_task:
            return {}
        if self._tasks is None:
            raise AdapterError(
                "HFPEFT: POLY answers each sample as its task wants it. Call the model inside of "
                "`with lightning_peft.interop.task_ids(model, ids):`, one number for each sample."
            )
        if len(x) % len(self._tasks):
            raise AdapterError(
                f"HFPEFT: a layer was given a batch of {len(x)}, and task_ids has {len(self._tasks)} numbers. Give one "
                "for each sample."
            )
        return {"task_ids": self._tasks.to(x.device).repeat_interleave(len(x) // len(self._tasks))}

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        plain = twin_of(self.__dict__["shadow"])
        stored = self.site.store(plain, weight, bias, weight.dtype)
        # a copy in plain numbers, in whatever form they are kept
        own = {name: nn.Parameter(value + 0, requires_grad=False) for name, value in stored.items()}
        plain.__dict__["_parameters"] = plain._parameters | own
        layer: Any = copy.deepcopy(self.layer, {id(self.__dict__["shadow"]): plain})
        try:
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                plain = layer.get_base_layer()
            else:
                plain = layer.unload_and_optionally_merge_module(True, False, [NAME])
        except Exception as error:
            raise MergeError(f"HF PEFT cannot merge {type(self.layer).__name__}: {error}") from error
        return self.site.get(plain)

    def unmergeable_because(self) -> str | None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        what = f"{type(self.layer).__module__.removesuffix('.layer')}.{type(self.layer).__name__}"
        if self.site.kind == "module":
            return f"{what} sits around a whole module."
        if slots.in_codes(self.__dict__["shadow"], self.site):
            return f"{slots.in_codes_because(self.__dict__['shadow'], self.site)} LoRA of lightning_peft merges there."
        if what == "peft.tuners.oft.Conv2d" and self.layer.get_base_layer().kernel_size != (1, 1):  # type: ignore[operator]
            return f"HF PEFT merges {what} into another function than it computes."
        never = isinstance(self.layer, BaseTunerLayer) and type(self.layer).merge is BaseTunerLayer.merge
        return f"HF PEFT does not merge {what}." if never else None

    def unreadable_because(self) -> str | None:
        return "HF PEFT merges without a graph: take a method of lightning_peft."

    @property
    def changes_weights(self) -> bool:
        """Whether HF PEFT can merge it."""
        return self.unmergeable_because() is None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Of what HF PEFT trains."""
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(requires_grad and name in self._trained)
        return self


@contextlib.contextmanager
def task_ids(model: ModelT, ids: Sequence[int] | Tensor) -> Iterator[ModelT]:
    """While it lasts, sample i of each batch is of task ``ids[i]``, for adapters of HF PEFT's Poly in ``model``.

    A batch that is k times as long has k samples for each, one behind the other, as beams of ``generate`` are. Where
    activations are checkpointed, call ``backward`` inside too.

    Raises:
        AdapterError: there is no such adapter. Inside: a layer is given a batch that fits not the number of ``ids``.
    """
    found = [a for _, _, a in adapters_of(model) if isinstance(a, HFPEFTAdapter) and a._by_task]
    if not found or not len(ids):
        raise AdapterError(
            f"task_ids: expected the number of a task for each sample, and an adapter of HFPEFT with POLY; got "
            f"{ids!r} and {len(found)} such adapters."
        )
    before = [adapter._tasks for adapter in found]
    try:
        for adapter in found:
            adapter._tasks = torch.as_tensor(ids)
        yield model
    finally:
        for adapter, tasks in zip(found, before, strict=True):
            adapter._tasks = tasks


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a PeftConfig that are not the default, in values that JSON can hold."""
    kind = _plain(settings.get("peft_type"))
    default = _defaults(kind)
    for name in settings:
        if name not in default:
            raise AdapterError(f"HFPEFT: {kind} of peft has no setting {name!r}.{nearest(name, default)}")
    told = {name: _plain(value) for name, value in settings.items() if name not in _OF_NO_MATTER}
    return {"peft_type": kind} | {name: value for name, value in told.items() if value != default[name]}


def _settings_of(config: Any) -> dict[str, Any]:
    if not (dataclasses.is_dataclass(config) and hasattr(config, "peft_type")):
        raise AdapterError(f"HFPEFT: expected a peft.PeftConfig, or a dictionary of its settings, got {config!r}.")
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _defaults(kind: Any) -> dict[str, Any]:
    """Setting of this type -> its default."""
    default = {}
    for field in dataclasses.fields(_config_class(kind)):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default[field.name] = _plain(made)
    return default


_OF_NO_MATTER = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "runtime_config",
}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)  # of an enumeration


def _config_class(kind: Any) -> Any:
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
    except ImportError as error:
        raise AdapterError("adapters of HF PEFT run by its own code: pip install peft.") from error
    if kind not in known:
        there = ", ".join(sorted(name.value for name in known))
        raise AdapterError(f"HFPEFT: peft has no type {kind!r}.{nearest(str(kind), there.split(', '))} It has {there}.")
    return known[kind]


def _peft_config(settings: Mapping[str, Any]) -> Any:
    """The config as ``peft`` wants it; a new one, for it writes into what it is given."""
    kind = settings["peft_type"]
    if settings.get("alora_invocation_tokens"):
        raise AdapterError("HFPEFT: alora_invocation_tokens works in generate of HF PEFT's own model alone.")
    try:
        return _config_class(kind)(**{k: copy.deepcopy(v) for k, v in settings.items() if k != "peft_type"})
    except Exception as error:
        raise AdapterError(f"HFPEFT: peft does not accept the settings of {kind}: {error}") from error


def _bridged(model: nn.Module, settings: Mapping[str, Any]) -> _Bridged:
    """What ``peft`` does to ``model``, done to its shadow; the model stays as it is."""
    import peft

    if any(p.is_meta for p in model.parameters()):
        raise TargetError("HFPEFT: peft starts from weights, and those of this model are not there yet (meta device).")
    config, (path, root) = _peft_config(settings), _network(model)
    twins: dict[str, nn.Module] = {}
    shadow = shadow_of(root, "", twins, {})
    base = slots.base_parameters(root)
    before = {p: (p.requires_grad, p.data, p._version) for p in base.values()}
    try:
        # what it draws are numbers of its own
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how it would load and save
            torch.manual_seed(torch.initial_seed())
            tuned = peft.get_peft_model(shadow, config, NAME)
        in_place = [name for name, p in base.items() if p.requires_grad]
        changed = [name for name, p in base.items() if _has_changed(p, *before[p][1:])]
    except Exception as error:
        raise TargetError(f"HFPEFT: peft cannot put {settings['peft_type']} here: {error}") from error
    finally:
        for parameter, (requires_grad, data, version) in before.items():
            parameter.requires_grad_(requires_grad)
            if _has_changed(parameter, data, version):
                parameter.data = data
    if changed:
        raise TargetError(
            f"HFPEFT: {settings['peft_type']} with these settings changes the base ({changed[0]!r}) when it begins, so "
            "that it could not be taken out again. Use another start, or the method of lightning_peft of that name."
        )
    if config.peft_type != "LORA" and in_place:
        raise TargetError(f"HFPEFT: {settings['peft_type']} trains the base in place ({in_place[0]!r}).")
    targets: list[BridgedTarget] = []
    owners = {plain_name(name): (path + name, module) for name, module in root.named_modules()}
    for name, twin, layer, holders in replaced(shadow, twins):
        owner, module = owners[name]
        here = [dataclasses.replace(site, read=False) for site in sites(module)]
        site = here[0] if len(here) == 1 else Site("module", "", None)
        targets.append(BridgedTarget(plain_name(owner), module, site, owner, layer, twin, holders, tuned, path))
    held = {*before, *(p for target in targets for p in target.layer.parameters())}
    outside = [name for name, p in tuned.named_parameters() if p.requires_grad and p not in held]
    if outside:
        raise TargetError(f"HFPEFT: {settings['peft_type']} trains {outside[0]!r}, which none of its layers holds.")
    return _Bridged(targets, [path + name for name in in_place])


def _has_changed(parameter: nn.Parameter, data: Tensor, version: int) -> bool:
    return parameter.data_ptr() != data.data_ptr() or parameter._version != version


def _network(model: nn.Module) -> tuple[str, nn.Module]:
    """What ``peft`` is to see, with what its names begin with: the one network in a LightningModule, or the model."""
    inner = [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if hasattr(model, "training_step") and len(inner) == 1 and next(model.parameters(recurse=False), None) is None:
        return f"{inner[0][0]}.", inner[0][1]
    return "", model


def method_from(config: Mapping[str, Any], model: nn.Module, because: str) -> HFPEFT:
    """The method that made a file of HF PEFT which is not read otherwise, ``because`` of this.

    Raises:
        AdapterFileError: it does not run here either.
    """
    try:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(config.get(name), str):
                check_pattern(config[name], "the file")
        kind = config.get("peft_type")
        known = _defaults(kind)
        later = [name for name in config if name not in known and config[name]]
        if later:
            warnings.warn(
                f"settings of the file that {kind} of peft does not know are passed over: {later}.", stacklevel=5
            )
        method = HFPEFT(config={name: value for name, value in config.items() if name in known})
        method.targets(model)
    except AdapterError as error:
        raise AdapterFileError(f"{because} {error}") from None
    return method


@contextlib.contextmanager
def _tuned(found: list[tuple[str, nn.Module, Adapter]]) -> Iterator[Any]:
    """The model of HF PEFT whose layers these are, put together while it lasts.

    Raises:
        AdapterFileError: there are several.
    """
    parts = [adapter.__dict__ for _, _, adapter in found]
    if len({id(part["tuned"]) for part in parts}) > 1:
        raise AdapterFileError("HF PEFT cannot write an adapter that was injected in several goes. Inject it at once.")
    held = [(holder, key, part["shadow"]) for part in parts for holder, key in part["holders"]]
    for holder, key, shadow in held:
        holder._modules[key] = shadow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bases and hubs
            yield parts[0]["tuned"]
    finally:
        for holder, key, _ in held:
            del holder._modules[key]


def _inner(found: list[tuple[str, nn.Module, Adapter]], prefix: str) -> str:
    """What the keys of ``peft`` begin with for what lies below ``prefix`` of our model."""
    return PREFIX + prefix.removeprefix(found[0][2].__dict__["root"])


def to_peft(found: list[tuple[str, nn.Module, Adapter]], prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors as ``peft`` writes them for the part of our model below ``prefix``, where all of it lies."""
    with tempfile.TemporaryDirectory() as folder, _tuned(found) as tuned:
        tuned.save_pretrained(folder, save_embedding_layers=False)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    inner = _inner(found, prefix)
    return config, {PREFIX + k.removeprefix(inner) if k.startswith(inner) else k: t for k, t in tensors.items()}


def beside(found: list[tuple[str, nn.Module, Adapter]], tensors: Mapping[str, Tensor], prefix: str) -> set[str]:
    """Keys of ``tensors`` for which ``peft`` has a place in the base, and which are no part of the adapters ``found``.

    It would write them there.
    """
    from peft import get_peft_model_state_dict

    inner = _inner(found, prefix)
    with _tuned(found) as tuned:
        own = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys()
        base = tuned.state_dict().keys() - own
    there = {key: inner + key.removeprefix(PREFIX) if key.startswith(PREFIX) else key for key in tensors}
    return {key for key, place in there.items() if place in base}


def from_peft(
    found: list[tuple[str, nn.Module, Adapter]], state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Tensors under our keys, for the adapters ``found`` below ``prefix``, whose ``state`` stays as it is.

    Raises:
        AdapterFileError: ``peft`` does not accept them.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    before = {key: value.detach().clone() for key, value in state.items()}
    inner = _inner(found, prefix)
    tensors = {inner + k.removeprefix(PREFIX) if k.startswith(PREFIX) else k: t for k, t in tensors.items()}
    try:
        with _tuned(found) as tuned:
            tensors = _converted(tuned, tensors)
            missing = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - tensors.keys()
            told: Any = set_peft_model_state_dict(tuned, tensors, NAME)
        refuse({"missing": sorted(missing), "unexpected": list(told.unexpected_keys)}, "what HF PEFT expects")
        return {key: value.detach().clone() for key, value in state.items()}
    except AdapterFileError:
        raise
    except Exception as error:
        raise AdapterFileError(f"HF PEFT does not accept the file: {error}") from error
    finally:
        with torch.no_grad():
            for key, value in before.items():
                state[key].copy_(value)


def _converted(tuned: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` for the modules of today, where transformers has fused or renamed some since."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # of an earlier peft
        return dict(tensors)
    return convert_peft_adapter_state_dict_for_transformers(tuned, tuned.peft_config[NAME], dict(tensors), NAME)
