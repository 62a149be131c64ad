"""Adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``, or the one file of diffusers.

For a method that HF PEFT knows, both files are HF PEFT's own format. What it has no place for (the method with its
arguments, the library's version, the fingerprint of the base) stands in the metadata of the safetensors file, which
other readers ignore; so the tensor file alone is enough to load an adapter here. No pickle is ever read.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.engine import AdapterError, AdapterFileError, Method, adapters_of, get_method, inject, unload
from lightning_peft.engine.inject import check_unwrapped
from lightning_peft.engine.limits import one_of
from lightning_peft.engine.merge import check_finite
from lightning_peft.engine.record import has_record, record_of
from lightning_peft.engine.slots import is_sharded, whole
from lightning_peft.engine.state import adapter_state, base_values, check_base, fingerprint, load_adapter_state
from lightning_peft.interop import diffusers_lora, hf_peft
from lightning_peft.interop.as_lora import as_lora as plain_lora
from lightning_peft.interop.hf_format import EXPERT
from lightning_peft.interop.patterns import check_pattern, strings
from lightning_peft.interop.untrusted import (
    check_names,
    check_patterns,
    check_places,
    check_size,
    is_pickle,
    told_by,
    without_code,
)

ModelT = TypeVar("ModelT", bound=nn.Module)
Format = Literal["peft", "diffusers", "lightning_peft"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
_METADATA = "lightning_peft"
_ROUNDING = 1e-5  # relative errors up to it are those of single precision


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    as_lora: bool | int = False,
    format: Format = "peft",
) -> Path:
    """Write adapter ``name`` of ``model`` to ``folder``; each file is complete or not there at all.

    Of a model that is sharded over several ranks, the first one writes; all of them have to call this.

    Args:
        model: the model that was given to `inject`, or a LightningModule with it inside.
        folder: made if it does not exist; an adapter that is there already is replaced.
        name: which adapter.
        as_lora: write a plain LoRA on the original base, for servers that know no other method. True: the LoRA that
            computes the same, for low-rank changes of weights; a method that starts at a part of the weight doubles
            its rank. A number: the nearest LoRA of that rank in each layer, for any change of weights of linear,
            convolution and embedding layers (LoHa, DoRA; weights trained in place, if there is no adapter). A warning
            and the file say the largest relative error of a layer, ``|D - D_r| / |D|`` in the Frobenius norm.
        format: ``"peft"`` for the two files of HF PEFT, which hold any method; ``"diffusers"`` for the one LoRA file
            that ``pipe.load_lora_weights(folder)`` reads: LoRA and DoRA as they are, other low-rank changes of weights
            as with ``as_lora``. Its keys begin with ``unet``, ``transformer`` or ``text_encoder``.
            ``"lightning_peft"`` for our own names in those two files, also of what HF PEFT knows.

    Returns:
        The folder.

    Raises:
        AdapterError: there is no such adapter, it is merged, it holds NaN or infinite values, it is no change of
            weights that LoRA can make and LoRA is asked for, diffusers has no place for it, or the folder holds an
            adapter in the other format.
    """
    if format not in get_args(Format):
        raise AdapterError(f"save_adapter: format must be {one_of(get_args(Format))}, got {format!r}.")
    if not isinstance(as_lora, int) or as_lora < 0:
        raise AdapterError(f"save_adapter: as_lora must be True, False or an integer >= 1, got {as_lora!r}.")
    folder, model = Path(folder), adapted_root(model)
    if as_lora and as_lora is not True and is_sharded(model):
        raise AdapterError(
            "save_adapter: a LoRA of a given rank is computed from whole weights, and these are spread over ranks. "
            "Save the adapter as it is, and load it into a model of one process first."
        )
    state = {key: whole(value.detach()) for key, value in adapter_state(model, name).items()}
    if is_sharded(model) and torch.distributed.get_rank() > 0:
        return folder
    check_finite(state, AdapterError)
    method: Method = record_of(model).injections[name].method
    if format == "diffusers":
        facts, config, tensors = _as_diffusers(model, name, method, state, as_lora)
    else:
        facts, config, tensors = _as_peft(model, name, method, state, as_lora, folder if format == "peft" else None)
    _check_free(folder, CONFIG if format == "diffusers" else diffusers_lora.WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
    metadata = {"format": "pt", _METADATA: json.dumps(facts)}
    if format == "diffusers":
        metadata[diffusers_lora.METADATA] = json.dumps(config, indent=2, sort_keys=True)
        with replacing(folder / diffusers_lora.WEIGHTS) as tensor_file:
            save_file(contiguous, tensor_file, metadata=metadata)
        return folder
    # the tensors take their place last: until then the former ones say by themselves what they are
    with replacing(folder / TENSORS) as tensor_file, replacing(folder / CONFIG) as config_file:
        save_file(contiguous, tensor_file, metadata=metadata)
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


Written = tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]  # facts, config, tensors


def _as_peft(
    model: nn.Module, name: str, method: Method, state: dict[str, Tensor], as_lora: bool | int, folder: Path | None
) -> Written:
    """In our own format where there is no ``folder``, or HF PEFT has no place for it."""
    inner, prefix = unwrapped(model, state)
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    found = adapters_of(inner, name)
    facts: dict[str, Any] = {"base": fingerprint(model, prefix, [name])}
    if as_lora:
        method, found, state, facts = _as_plain_lora(model, inner, prefix, method, found, state, as_lora)
    facts = describe(method) | facts
    if folder is None:
        return facts, facts, state
    try:
        config, tensors = hf_peft.to_peft(inner, method, found, state, prefix)
        facts["layout"] = "peft"
    except AdapterFileError as reason:
        config, tensors = facts, state
        if not isinstance(reason, hf_peft.NoCounterpart):
            warnings.warn(f"{folder} is written in our own format, not in HF PEFT's: {reason}", stacklevel=3)
    return facts, config, tensors


def _as_diffusers(
    model: nn.Module, name: str, method: Method, state: dict[str, Tensor], as_lora: bool | int
) -> Written:
    found = adapters_of(model, name)
    facts: dict[str, Any] = {}
    if as_lora or type(method) not in diffusers_lora.PLAIN:
        method, found, state, facts = _as_plain_lora(model, model, "", method, found, state, as_lora)
    config, tensors = diffusers_lora.to_diffusers(model, method, found, state)
    places = diffusers_lora.components(model)
    adapted = {key.partition(".")[0] for key in tensors}
    base = {part: fingerprint(model, _below(place), trained=()) for part, place in places.items() if part in adapted}
    # the scaling is in the factors
    plain = dataclasses.replace(method, alpha=None, alpha_pattern={}, use_rslora=False)  # type: ignore[type-var]
    return describe(plain) | facts | {"base": base, "layout": "diffusers"}, config, tensors


def _as_plain_lora(
    model: nn.Module,
    inner: nn.Module,
    prefix: str,
    method: Method,
    found: list[Any],
    state: dict[str, Tensor],
    as_lora: bool | int,
) -> tuple[Method, list[Any], dict[str, Tensor], dict[str, Any]]:
    """Method, adapters and state of the plain LoRA, and what the file says of it."""
    base = {id(model.get_parameter(key)): value for key, value in base_values(model).items()}
    r = as_lora if as_lora is not True and as_lora else None
    plain, found, state, (layer, error) = plain_lora(inner, found, state, r, base)
    if error > _ROUNDING:
        warnings.warn(
            f"as_lora={r} leaves out a part of the change that {type(method).__name__} made: {error:.2g} of its "
            f"Frobenius norm in {layer!r}, the layer where it is most. A larger rank leaves out less.",
            stacklevel=5,
        )
    trained = [prefix + key for key in state if ".adapters" not in key]
    facts = {"base": fingerprint(model, prefix, trained=trained)}
    return plain, found, state, facts | {"as_lora": {"method": method.name, "relative_error": error}}


def _below(path: str) -> str:
    """What the names of all that is inside of the module ``path`` begin with."""
    return f"{path}." if path else ""


def _check_free(folder: Path, other: str) -> None:
    """Raise an `AdapterFileError` if ``folder`` holds the file ``other`` of the other format."""
    if (folder / other).exists():
        raise AdapterFileError(
            f"{folder} holds an adapter in another format ({other}), and two in one folder could not be told apart. "
            "Name another folder, or delete it first."
        )


def load_adapter(model: ModelT, folder: str | Path, name: str = "default", *, allow_other_base: bool = False) -> ModelT:
    """Put the adapter of ``folder`` into ``model`` under ``name``, and return the model.

    Reads what `save_adapter` wrote; what HF PEFT's ``save_pretrained`` wrote for LoRA and its kin, AdaLoRA, LoHa, LoKr,
    MiSS (Bone), (IA)^3, prompt tuning, P-tuning and prefix tuning, and for its other types by ``peft`` itself
    (`HFPEFT`); and what ``save_lora_adapter`` and ``save_lora_weights`` of diffusers wrote. If the same method is in
    the model under this name already, its values are replaced.

    Args:
        model: a model like the one the adapter was made with, or a LightningModule with it inside.
        folder: what to read.
        name: name that the adapter gets.
        allow_other_base: load although the base weights are not those that the adapter was trained on.

    Raises:
        AdapterFileError: the files are missing, damaged, unsafe, of another format, or made for another model.
    """
    facts, config, tensors = read_adapter(folder)
    target = adapted_root(model)
    if not has_record(target):
        check_unwrapped(target)
    places: dict[str, str] = {}
    with told_by(folder):
        check_patterns(config.get("settings", config), str(folder))
        if "settings" not in config and (facts is None or facts.get("layout") == "peft"):
            check_places(tensors, str(folder))
        if "settings" in config:
            method, tensors, places = diffusers_lora.method_from_diffusers(config["settings"], tensors, target)
        elif facts:
            method = method_from(facts)
        else:
            method, tensors = hf_peft.method_from_peft(config, tensors, model)
            check_names(method, target, str(folder))
        was_there = has_record(target) and name in record_of(target).injections
        if was_there and places and facts and record_of(target).injections[name].method == method_from(facts):
            method = method_from(facts)  # the same, its targets not named in full
        check_size(method, target, tensors, str(folder))
        replaces = method.changes_base and not was_there
        kept = [
            (m, n, p, p.requires_grad)
            for m in (target.modules() if replaces else ())
            for n, p in m._parameters.items()
            if p is not None
        ]
        inject(target, method, name)
    try:
        with told_by(folder):
            state = adapter_state(target, name)
            inner, prefix = (target, "") if places else unwrapped(target, state)
            is_peft = facts is None or facts.get("layout") in ("peft", "diffusers")
            live = {key.removeprefix(prefix): value for key, value in state.items()}
            ours = tensors
            if is_peft:
                ours = hf_peft.from_peft(inner, name, live, tensors, prefix, allow_other_base)
            if facts and not allow_other_base:
                there = facts.get("base") or {}
                for part, place in places.items():
                    check_base(fingerprint(target, _below(place), [name]), there.get(part), f"{folder}, {part}")
                if not places:
                    check_base(fingerprint(target, prefix, [name]), there, str(folder))
            load_adapter_state(target, {prefix + key: value for key, value in ours.items()}, name)
    except BaseException:
        if not was_there:  # no value has been changed yet
            in_place = record_of(target).injections[name].in_place
            in_place.update({key: target.get_parameter(key).detach().clone() for key in in_place})
            unload(target, name)
            for module, key, parameter, trainable in kept:
                parameter.requires_grad = trainable
                module._parameters[key] = parameter
        raise
    return model


def read_adapter(folder: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, Tensor]]:
    """(our facts or None, config, tensors) of an adapter folder, or of a ``.safetensors`` file that says what it is.

    The config of a file of diffusers is its ``layout``, and the ``settings`` that it has in its metadata.

    Raises:
        AdapterFileError: the files are missing, damaged, or unsafe.
    """
    path = Path(folder)
    facts, config, tensors = _read_one(path)
    if facts is None and isinstance(config.get("adapters"), dict):  # X-LoRA of HF PEFT names folders of its experts
        config, tensors = _with_experts(path if path.is_dir() else path.parent, config, tensors)
    return facts, config, tensors


def _read_one(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, Tensor]]:
    file = path if path.is_file() else path / TENSORS
    if (path / diffusers_lora.WEIGHTS).is_file():
        _check_free(path, TENSORS)
        file = path / diffusers_lora.WEIGHTS
    if not file.is_file():
        pickled = sorted(p for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        hint = ""
        if pickled:
            hint = f" {pickled[0].name} is a pickle, which can run code when it is read: convert it first, by"
            hint += without_code(pickled[0], path / TENSORS)
        inside = sorted(p.parent.name for p in path.glob(f"*/{TENSORS}"))
        if inside:
            hint += f" There are adapters in folders of it: {', '.join(inside)}. Name one of them."
        if not path.exists():
            hint += " Nothing of that name is on this machine, and nothing is fetched from elsewhere."
        raise AdapterFileError(f"there is no {TENSORS} in {path}.{hint}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        if is_pickle(file):
            raise AdapterFileError(
                f"{file} is a pickle under a false name, which is never read. Take it from where it was saved again, "
                f"or convert it, by{without_code(file, file.with_suffix('.safetensors'))}"
            ) from None
        raise AdapterFileError(
            f"{file} is damaged, or of another kind ({error}). Take it from where it was saved again."
        ) from None
    facts = _parse(metadata[_METADATA], file) if _METADATA in metadata else None
    if diffusers_lora.METADATA in metadata or file.name == diffusers_lora.WEIGHTS:
        stated = metadata.get(diffusers_lora.METADATA)
        settings = _parse(stated, file) if stated else None
        if facts:
            check_format(facts, str(file))
        return facts, {"layout": "diffusers", "settings": settings}, tensors
    config_file = file.parent / CONFIG
    config = _parse(_text(config_file), config_file) if config_file.is_file() else facts
    if config is None:
        raise AdapterFileError(
            f"there is no {CONFIG} beside {file}, and the file does not say what it is. Take both from where they were "
            "saved again."
        )
    config = {key: value for key, value in config.items() if key != "settings"}  # what files of diffusers have
    if facts:
        check_format(facts, str(file))
    return facts, config, tensors


def _with_experts(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What lies in the folders that the config names, the configs in ``adapters``."""
    configs, tensors = [], dict(tensors)
    for i, (name, place) in enumerate(config["adapters"].items()):
        there = [path for path in (Path(str(place)), folder / str(place), folder / str(name)) if path.is_dir()]
        if not there:
            raise AdapterFileError(
                f"{folder} mixes adapters, and {name!r} of them is not at {place!r}. Put its folder there, or write "
                f"its path into {CONFIG} under 'adapters'; one that is not absolute may be relative to {folder}."
            )
        _, own, values = _read_one(there[0])
        check_patterns(own, str(there[0]))
        configs.append(own)
        tensors |= {EXPERT.format(i) + key: value for key, value in values.items()}
    return config | {"adapters": configs}, tensors


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{file} cannot be read ({error}). Take it from where it was saved again.") from None


def check_format(facts: dict[str, Any], source: str) -> None:
    """Raise an `AdapterFileError` if ``source`` was written by a version that knows more than this one."""
    if not isinstance(facts.get("format", 0), int):
        raise AdapterFileError(
            f"{source} says that its format is {facts['format']!r}: it is damaged, or of another kind."
        )
    if facts.get("format", 0) > FORMAT:
        raise AdapterFileError(
            f"{source} has format {facts['format']}, this library reads up to {FORMAT}: it was written by "
            f"lightning_peft {facts.get('version')}. Upgrade to that version."
        )


def describe(method: Method) -> dict[str, Any]:
    """What a file says of the method that made it; primitives only."""
    from lightning_peft import __version__

    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    arguments = {name: describe(value) if isinstance(value, Method) else value for name, value in values.items()}
    return {"format": FORMAT, "version": __version__, "method": method.name, "arguments": arguments}


def method_from(facts: dict[str, Any]) -> Method:
    """The inverse of `describe`.

    Raises:
        AdapterError: the method or one of its arguments is not known here.
    """
    if not isinstance(facts.get("method"), str) or not isinstance(facts.get("arguments"), dict):
        raise AdapterFileError(
            "the file does not say which method made it, with which arguments: it is damaged, or of another kind."
        )
    for pattern in strings(facts["arguments"]):
        check_pattern(pattern, "the file")
    cls = get_method(facts["method"])
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(facts["arguments"]) - known)
    if unknown:
        raise AdapterFileError(
            f"{cls.__name__} has no argument {unknown[0]!r}: the file is of another version. Load it with that one."
        )

    def value(stored: Any) -> Any:
        if isinstance(stored, dict) and "method" in stored and "arguments" in stored:  # a method within a method
            return method_from(stored)
        return tuple(stored) if isinstance(stored, list) else stored

    try:
        return cls(**{name: value(stored) for name, stored in facts["arguments"].items()})
    except TypeError as error:
        raise AdapterFileError(f"the file does not describe a {cls.__name__}: {error}.") from None


def adapted_root(model: nn.Module) -> nn.Module:
    """The module in ``model`` that was given to `inject`; ``model`` itself if none was."""
    return next((module for module in model.modules() if has_record(module)), model)


def unwrapped(model: nn.Module, state: dict[str, Tensor]) -> tuple[nn.Module, str]:
    """The one child of a LightningModule that holds all adapters, with its prefix; any other model as it is."""
    children = {key.partition(".")[0] for key in state}
    if hasattr(model, "training_step") and len(children) == 1:
        (child,) = children
        if isinstance(getattr(model, child, None), nn.Module) and child != "adapters":
            return getattr(model, child), child + "."
    return model, ""


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file}: the description is damaged, or of another kind ({error}).") from None
    if not isinstance(parsed, dict):
        raise AdapterFileError(f"{file}: expected a JSON object that describes an adapter.")
    return parsed


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    It is in the same folder, and so on the same disk: only there can a file take the place of another in one step.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
