"""What one row of the table of HF PEFT's types says, and the patterns in which its configs name layers."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.engine import Adapter, AdapterFileError, Method, Target
from lightning_peft.engine.codes import is_code
from lightning_peft.engine.inject import owners_of
from lightning_peft.engine.slots import base_class, plain_name, whole
from lightning_peft.engine.targets import candidates

V = TypeVar("V")
Found = list[tuple[str, Any, Any]]  # plain module name, module, adapter
State = Mapping[str, Tensor]  # our key -> tensor
Parts = dict[str, dict[str, Tensor]]  # name of a module -> name of a tensor of it -> tensor

PREFIX = "base_model.model."
EXPERT = "experts.{}."  # what the keys of an expert of X-LoRA begin with, which come from another file
_BEFORE = re.compile(r"^(experts\.\d+\.)?base_model\.model\.")
BROUGHT = ".base_layer.weight"  # an embedding that was adapted, as it is in the base

# settings of every type that say where something is, or what for, and nothing about what is computed
_NEUTRAL = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save fan_in_fan_out runtime_config"
)

# settings of a LoraConfig, and of what is derived from it, that change what the file means, and the value at which they
# do not
LORA_PLAIN: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False,),
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
LORA_KNOWN = (
    "r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora use_dora init_lora_weights loftq_config "
    "eva_config corda_config lora_ga_config megatron_core qalora_group_size ensure_weight_tying"
)


class NoCounterpart(AdapterFileError):
    """HF PEFT has nothing like it, so nobody expects it to read the file."""


class Unread(AdapterFileError):
    """No method of ours computes it, so HF PEFT itself has to."""


class Place(NamedTuple):
    """Where a tensor of ours stands in a file of HF PEFT.

    Args:
        key: without the prefix of its row.
        shape: there.
        factor: theirs = factor * ours.
    """

    key: str
    shape: tuple[int, ...]
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One type of HF PEFT: how it is read and written here.

    Args:
        names: what the keys of its tensors end in.
        places: class of adapter -> (path, module, adapter, all adapters) -> name of a tensor of ours -> its place.
        methods: those of ours that are written as this type.
        write: (method, adapters, model, what is saved) -> what its config says beside the targets.
        read: (config, tensors, modules trained whole, model) -> the method, and the tensors as ``places`` has them, or
            `Unread`; None where a file may hold what no method of ours computes.
        because: why it is not read, as sentences.
        derived: (adapters, what is saved) -> key -> tensor that HF PEFT wants to see; here it follows from others.
        layers: types of layer that HF PEFT adapts.
        transposed: whether it adapts transformers' ``Conv1D`` as well.
        bias: whether it trains biases in place if it is told to.
        required: settings without which a file cannot be read.
        plain: setting -> the values at which the file means what is read here.
        unlike: (config) -> why it means something else for another reason, as sentences; None if it does not.
        training: setting that acts in training only, and is not known here -> the value at which it does nothing.
        known: its other settings.
        prefix: of its keys.
        whole_prefix: of the keys of what was trained whole.
    """

    names: tuple[str, ...]
    places: Mapping[type[Adapter], Callable[[str, Any, Any, Found], dict[str, Place]]] = field(default_factory=dict)
    methods: tuple[type[Method], ...] = ()
    write: Callable[[Any, Found, nn.Module, State], dict[str, Any]] | None = None
    read: Callable[[Mapping[str, Any], Parts, tuple[str, ...], nn.Module], tuple[Method, Parts]] | None = None
    because: str = ""
    derived: Callable[[Found, State], dict[str, Tensor]] = lambda found, state: {}
    layers: tuple[type[nn.Module], ...] = (nn.Module,)
    transposed: bool = True
    bias: bool = False
    required: tuple[str, ...] = ()
    plain: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unlike: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    training: Mapping[str, Any] = field(default_factory=dict)
    known: str = ""
    prefix: str = PREFIX
    whole_prefix: str = PREFIX

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise an `AdapterFileError` that names a setting which is missing, or not known here (`Unread`)."""
        if self.read is None:
            raise Unread(f"files of HF PEFT's type {config['peft_type']!r} are not read here: {self.because}")
        for setting in self.required:
            value = config.get(setting)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise AdapterFileError(
                    f"the config has no number {setting!r}, but {value!r}: it is damaged, or of another kind."
                )
        for setting, plain in self.plain.items():
            if setting in config and config[setting] not in plain:
                raise Unread(
                    f"the file was made with {setting}={config[setting]!r}, which is not read here (only {plain[0]!r} "
                    "is). Merge it with HF PEFT, or convert it to a plain adapter there."
                )
        because = self.unlike(config)
        if because:
            raise AdapterFileError(because)

    def warn(self, config: Mapping[str, Any]) -> None:
        """Name what is set in ``config`` and passed over."""
        known = {*self.required, *self.plain, *self.training, *f"{_NEUTRAL} {self.known}".split()} | (
            {"bias"} if self.bias else set()
        )
        for setting in sorted(key for key in config.keys() - known if config[key]):
            warnings.warn(
                f"the setting {setting}={config[setting]!r} of the file is not known here, and is passed over. It may "
                "come from a later version of HF PEFT: see that the outputs are what they were.",
                stacklevel=5,
            )
        for setting, nothing in self.training.items():
            if config.get(setting, nothing) != nothing:
                warnings.warn(
                    f"{setting}={config[setting]!r} acts in training alone, and is not known here: the outputs are the "
                    "same, but training goes on without it.",
                    stacklevel=5,
                )

    def check_layer(self, path: str, module: nn.Module, adapter: Adapter) -> None:
        """Raise an `AdapterFileError` if HF PEFT cannot adapt this layer, or computes something else there."""
        if not path:
            raise AdapterFileError("HF PEFT adapts the layers inside a model, not a model that is one layer.")
        if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
            raise AdapterFileError(f"HF PEFT adds the update of out_proj twice in nn.MultiheadAttention ({path}).")
        transposed = adapter.site.kind == "linear" and adapter.site.transposed
        in_codes = adapter.site.kind == "linear" and not adapter.site.weight  # of another library, which it knows
        known = isinstance(module, self.layers) or transposed or in_codes
        if not known or (transposed and not self.transposed):
            raise AdapterFileError(f"HF PEFT does not adapt a {base_class(module).__name__} ({path}) in this way.")
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise AdapterFileError(f"HF PEFT computes something else for {path}, which is not padded with zeros.")


def target_of(model: nn.Module, name: str) -> Target:
    """The layer ``name`` of ``model``, or the only one whose name ends so, for a model inside of another.

    Raises:
        AdapterFileError: there is none, or more than one.
    """
    there = candidates(model)
    found = [t for t in there if t.name == name] or [t for t in there if t.name.endswith(f".{name}")]
    if len(found) != 1:
        raise AdapterFileError(
            f"the file adapts {name!r}, and {base_class(model).__name__} has {len(found) or 'no'} layers of that name. "
            "Load it into the model that it was made with."
        )
    return found[0]


def tied_names(model: nn.Module) -> list[list[str]]:
    """The plain names of each parameter of the base of ``model``: several where it is tied."""
    return [[plain_name(name) for name in names] for names in owners_of(model).values()]


def check_brought(model: nn.Module, tensors: Mapping[str, Tensor], keys: Iterable[str]) -> None:
    """Raise an `AdapterFileError` if weights of the base that a file brings along, under ``keys``, are others here.

    HF PEFT puts them into the base, where an embedding was given more rows, say. Values that were cast are the same.
    """
    names = {plain_name(name): name for several in owners_of(model).values() for name in several}
    for key in keys:
        name = names.get(re.sub(_BEFORE, "", key).replace(".base_layer.", "."))
        if name is None:
            raise AdapterFileError(f"the file holds {key!r}, which is no part of an adapter of this model.")
        here, there = model.get_parameter(name).detach(), tensors[key]
        if here.is_meta or is_code(here):
            continue
        here, there = whole(here).cpu(), there.cpu()
        cast = here.dtype != there.dtype
        rounding = max(torch.finfo(t.dtype).eps for t in (here, there)) if cast else 0.0
        same = here.shape == there.shape and torch.allclose(here.float(), there.float(), rounding, 1e-7 * cast)
        if not same:
            raise AdapterFileError(
                f"the adapter was trained beside a {plain_name(name)!r} {tuple(there.shape)} of other values than the "
                f"one here {tuple(here.shape)}, and the file brings it along as {key!r}. Copy that into the model "
                "first; load_adapter(..., allow_other_base=True) loads the adapter all the same."
            )


def exactly(path: str, others: Iterable[str]) -> str:
    """The pattern of HF PEFT that selects ``path``, and not those of ``others`` that end in it."""
    return f"^{re.escape(path)}" if any(other.endswith(f".{path}") for other in others) else re.escape(path)


def own_values(values: Mapping[str, V], default: V) -> dict[str, V]:
    """Those of ``values`` that a pattern has to name, the longest names first.

    A name selects all that end in it, and the first pattern that matches counts. So a longer name that ends in one that
    is there is there as well, before it.
    """
    own = [name for name, value in values.items() if value != default]
    named = [n for n in values if n in own or any(n.endswith(f".{short}") for short in own)]
    return {name: values[name] for name in sorted(named, key=len, reverse=True)}


def read_alphas(config: Mapping[str, Any], names: Iterable[str], setting: str = "lora_alpha") -> dict[str, float]:
    """Name of each adapted module -> its alpha."""

    own = {name: selected(config.get("alpha_pattern") or {}, name) for name in names}
    return {name: config.get(setting, 8) if alpha is None else alpha for name, alpha in own.items()}


def selected(patterns: Mapping[str, V], name: str) -> V | None:
    """The value of the first pattern of HF PEFT that selects ``name``."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def ends_of(names: Iterable[str]) -> set[str]:
    """All that dotted ``names`` end in, themselves among it: a file may be for a model inside of another."""
    return {name[match.end() :] for name in names for match in re.finditer(r"^|\.", name)}


def as_given(value: float) -> float:
    """What was rounded to single precision, as somebody may have written it: 0.1 and not 0.10000000149."""
    return float(f"{value:.7g}")


def ranks_and_alphas(
    method: Any, ranks: Mapping[str, int], scalings: Mapping[str, float], power: float = 1.0
) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """r, alpha, and the patterns of the layers that have others.

    Args:
        method: whose r and alpha they are.
        ranks: path of each layer -> its rank.
        scalings: the same for alpha / rank^power.
        power: see above.
    """
    alphas = {path: as_given(scaling * ranks[path] ** power) for path, scaling in scalings.items()}
    alpha = method.r**power if method.alpha is None else method.alpha
    return (
        method.r,
        alpha,
        {exactly(path, ranks): rank for path, rank in ranks.items() if rank != method.r},
        {exactly(path, ranks): a for path, a in alphas.items() if not math.isclose(a, alpha, rel_tol=1e-6)},
    )
