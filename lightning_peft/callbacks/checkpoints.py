"""What a Lightning checkpoint holds when a model is adapted: the adapters, and nothing of the frozen base.

``checkpoint["peft"]`` says with which methods and on which base, in tensors and primitives only, so that the file loads
with ``weights_only=True``. On loading, the base is filled in from the live module, and loading stays strict.

Averaging callbacks store further copies of the model; what holds for ``state_dict`` holds for each of them.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.callbacks.optimizer_state import names_in
from lightning_peft.engine import Adapter, AdapterFileError, MergeError, adapters_of, inject
from lightning_peft.engine.codes import linear_size
from lightning_peft.engine.inject import owners_of
from lightning_peft.engine.merge import check_finite, check_mergeable, merged_parameters
from lightning_peft.engine.record import has_record, record_of
from lightning_peft.engine.slots import base_class, base_parameters, plain_name, slots
from lightning_peft.engine.state import check_base, fingerprint, ranks_in, refuse
from lightning_peft.interop.files import FORMAT, adapted_root, check_format, describe, method_from
from lightning_peft.parts.nf4 import NF4Tensor

Save = Literal["adapter", "full", "merged"]

_OF_TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", "current_model_state", "averaging_state")


@dataclass
class Saving:
    """What is to be saved of a module, kept on it so that it holds with every Trainer.

    Args:
        what: ``PEFT``'s argument ``save``.
        warned: a warning that the adapters hold NaN was given.
    """

    what: Save = "adapter"
    warned: bool = False


def on_save(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Take the frozen base out of ``checkpoint``, or fold the adapters into it, and say what was done."""
    root = adapted_root(module)
    if not has_record(root) or record_of(root).merged is not None or "state_dict" not in checkpoint:
        return
    saving = module.__dict__.setdefault("_peft_saving", Saving())
    facts = describe_all(module) | {"holds": saving.what}
    facts["method_state"] = {name: dict(i.state) for name, i in record_of(root).injections.items() if i.state}
    trainer: Any = getattr(module, "_trainer", None)
    if "optimizer_states" in checkpoint and trainer is not None:
        facts["optimizer_param_names"] = [names_in(module, optimizer) for optimizer in trainer.optimizers]
    _warn_once_of_nan(module, checkpoint, saving)
    if saving.what == "adapter":
        base = base_tensors(module)
        for holder, key in _model_states(checkpoint):
            holder[key] = {plain_name(name): value for name, value in holder[key].items() if name not in base}
    elif saving.what == "full":
        others = {name: injection.in_place.items() for name, injection in record_of(root).injections.items()}
        for holder, key in _model_states(checkpoint):
            holder[key] = {name: _plain(value) for name, value in holder[key].items()}
        facts["in_place"] = {name: {k: v for k, v in items if v is not None} for name, items in others.items()}
    else:
        checkpoint["state_dict"] = _folded(_averaged(trainer) or module, checkpoint["state_dict"])
        for key in _OF_TRAINING:
            checkpoint.pop(key, None)
        facts.pop("optimizer_param_names", None)
    checkpoint["peft"] = facts


def on_load(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put the tensors of the live base into an adapter checkpoint, so that it loads strictly.

    Raises:
        AdapterFileError: the checkpoint holds no adapter, one of another method, one for another base, or one that
            does not fit or is not finite; however strict the module wants loading to be.
    """
    root = adapted_root(module)
    if not has_record(root) or record_of(root).merged is not None:
        return
    methods = {name: injection.method for name, injection in record_of(root).injections.items()}
    facts = _facts_of(module, checkpoint)
    if facts is not None:
        stored = {name: method_from(adapter) for name, adapter in facts["adapters"].items()}
        if stored != methods:
            raise AdapterFileError(
                f"PEFT: the checkpoint was made with {stored}, but the model has {methods}. Use the same."
            )
        if facts.get("holds", "adapter") == "adapter":
            check_base(fingerprint(root), facts.get("base"), "this checkpoint")
    if "state_dict" not in checkpoint:  # the strategy loads the values by itself
        return
    for holder, key in _model_states(checkpoint):
        holder[key] = live_names(module, holder[key])
    if facts is None and not _tensors(module, _of_adapters(root)).keys() & checkpoint["state_dict"].keys():
        raise AdapterFileError(
            f"PEFT: the checkpoint holds no adapter, but the model has {', '.join(map(repr, methods))}. Load a "
            "checkpoint of the base before PEFT adapts it: module.load_state_dict(torch.load(path)['state_dict']), "
            "then fit."
        )
    states = list(_model_states(checkpoint))
    for holder, key in states:
        _check_own(module, holder[key], methods)
    if facts is None:  # an ordinary checkpoint of the adapted model
        return
    if facts.get("holds", "adapter") == "adapter":
        buffers = {prefix_of(module, root) + name: value for name, value in record_of(root).buffers.items()}
        base = {**_readable(module, base_tensors(module)), **buffers}  # buffers may have moved since
        for holder, key in states:
            holder[key] = {**base, **holder[key]}
    for name, state in facts.get("method_state", {}).items():
        for key, value in state.items():
            record_of(root).injections[name].state[key].copy_(value)
    for name, before in facts.get("in_place", {}).items():
        for key, value in before.items():
            record_of(root).injections[name].in_place[key].copy_(value)  # type: ignore[union-attr]


def inject_from(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Inject the methods that ``checkpoint`` was made with.

    Raises:
        AdapterFileError: there are none.
    """
    facts = _facts_of(module, checkpoint)
    if facts is None:
        raise AdapterFileError(
            f"PEFT: the checkpoint holds no adapter. Load it with {type(module).__name__}.load_from_checkpoint(path)."
        )
    for name, adapter in facts["adapters"].items():
        inject(module, method_from(adapter), name)


def check_can_merge(module: nn.Module) -> None:
    """Raise a `MergeError` if merged weights of ``module`` would not load into a model without adapters."""
    root = adapted_root(module)
    check_mergeable(adapters_of(root))
    owners, prefix = owners_of(module), prefix_of(module, root)
    parameters_of: dict[Any, list[str]] = {}
    for path, slot in slots(root):
        held: Any = slot.adapters
        lacking = frozenset(name for name, parameter in slot._parameters.items() if parameter is None)
        kind = (lacking, *((type(adapter), adapter.site) for adapter in held.values()))
        if kind not in parameters_of:  # computed once for each kind of layer
            parameters_of[kind] = list(merged_parameters(slot, torch.float32))
        for name in parameters_of[kind]:
            parameter = slot._parameters[name]
            if parameter is None:
                raise MergeError(
                    f"PEFT(save='merged'): merging adds a {name} to {path!r}, which the base does not have, so the "
                    "file would not load into it. Leave that layer out with exclude_modules, or use save='adapter'."
                )
            others = [owner for owner in owners[id(parameter)] if owner != f"{prefix}{path}.{name}"]
            if others:
                raise MergeError(
                    f"PEFT(save='merged'): the {name} of {path!r} is tied to {others[0]!r}, and merging changes only "
                    "one of them. Leave that layer out with exclude_modules, or use save='adapter'."
                )


def describe_all(module: nn.Module) -> dict[str, Any]:
    """Format, methods and base of an adapted module; primitives only."""
    root = adapted_root(module)
    described = {name: describe(injection.method) for name, injection in record_of(root).injections.items()}
    version = next(iter(described.values()))["version"]
    return {"format": FORMAT, "version": version, "adapters": described, "base": fingerprint(root)}


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Key in ``state_dict`` -> value of each frozen base parameter, and of each base buffer that has not changed.

    What lies outside the adapted part of ``module``, or requires gradients all the same, is not base: it may train.
    """
    root = adapted_root(module)
    state = module.state_dict(keep_vars=True)  # first: a model that shards itself puts its shards in place here
    prefix, record, frozen = prefix_of(module, root), record_of(root), frozen_base(module)
    coded = {name for name, m in module.named_modules() if linear_size(m) is not None}
    base: dict[str, Tensor] = {}
    for key, value in state.items():
        before = record.buffers.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        same = before is not None and torch.equal(value, before.to(value.device))
        if id(value) in frozen or same or _is_code(key, coded):
            base[key] = value.detach()
    return base


def _readable(module: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """``base`` without what a layer in codes writes beside its tensors and does not read, as those of bitsandbytes."""
    reads = nn.Module._load_from_state_dict
    coded = {name: m for name, m in module.named_modules() if linear_size(m) is not None}
    silent = {name for name, m in coded.items() if base_class(m)._load_from_state_dict is reads}
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {key: value for key, value in base.items() if key in tensors or not _is_code(key, silent)}


def _is_code(key: str, coded: set[str]) -> bool:
    """Whether ``key`` is of what a layer in codes of another library keeps, by whatever name: scales, say."""
    path, _, name = key.rpartition(".")
    while path and path not in coded:
        path, _, inner = path.rpartition(".")
        name = f"{inner}.{name}"
    return path in coded and not name.startswith("adapters.")


def frozen_base(module: nn.Module) -> set[int]:
    """id of each base parameter that no adapter trains in place and that requires no gradients."""
    root = adapted_root(module)
    return {id(p) for p in base_parameters(root).values() if not p.requires_grad} - _trained_in_place(root)


def live_names(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the keys that ``module`` has while it is, or is not, compiled; unknown keys as they are."""
    live = {plain_name(key): key for key in module.state_dict(keep_vars=True)}
    return {live.get(plain_name(key), key): value for key, value in state.items()}


def prefix_of(module: nn.Module, root: nn.Module) -> str:
    """What the keys of ``root`` begin with in the ``state_dict`` of ``module``."""
    return next(f"{name}." if name else "" for name, m in module.named_modules() if m is root)


def _trained_in_place(root: nn.Module) -> set[int]:
    return {id(root.get_parameter(name)) for i in record_of(root).injections.values() for name in i.in_place}


def _plain(value: Tensor) -> Tensor:
    # in the precision in which it was packed: there, packing it again changes nothing
    return NF4Tensor.unpacked(value.float()) if isinstance(value, NF4Tensor) else value  # type: ignore[arg-type]


def _of_adapters(root: nn.Module) -> set[int]:
    return {id(t) for _, _, a in adapters_of(root) for t in itertools.chain(a.parameters(), a.buffers())}


def _tensors(module: nn.Module, ids: set[int]) -> dict[str, Tensor]:
    """Key in ``state_dict`` -> live tensor of those with these ids."""
    return {key: value for key, value in module.state_dict(keep_vars=True).items() if id(value) in ids}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    root = adapted_root(module)
    return _tensors(module, _of_adapters(root) | _trained_in_place(root))


def _model_states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(dictionary, key) of each state of the whole model: the one that is loaded, and those of averaging callbacks."""
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            yield checkpoint, key
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("average_model_state") is not None:
            yield state, "average_model_state"


def _averaged(trainer: Any) -> nn.Module | None:
    """The copy of the module whose weights are saved in its place: the averaged one, while a callback has one."""
    averaging = (c for c in getattr(trainer, "callbacks", ()) if isinstance(c, WeightAveraging))
    return next((c._average_model.module for c in averaging if c._average_model is not None), None)


def _folded(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the adapters of ``module`` folded into the weights, under the keys of the base alone."""
    theirs = _tensors(module, _of_adapters(module))
    plain = {key: value for key, value in state.items() if key not in theirs}
    folded = {id(slot): merged_parameters(slot) for _, slot in slots(module)}
    for path, slot in module.named_modules(remove_duplicate=False):  # a module that is used twice has two keys
        for name, value in folded.get(id(slot), {}).items():
            plain[f"{path}.{name}".lstrip(".")] = value.cpu()
    return plain


def _facts_of(module: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    facts: dict[str, Any] | None = checkpoint.get("peft")
    if facts is None:
        return None
    check_format(facts, "the checkpoint")
    if facts.get("holds") == "merged":
        cls = type(module).__name__
        raise AdapterFileError(
            f"PEFT: the checkpoint holds merged weights, and no adapter to go on with. They go into a plain {cls}: "
            f"{cls}.load_from_checkpoint(path), without PEFT. A run that is to be resumed needs PEFT(save='adapter') "
            "or PEFT(save='full')."
        )
    return facts


def _check_own(module: nn.Module, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse a state in which what belongs to the adapters does not fit, or is not finite; take ranks from it."""
    own = _own_tensors(module)
    shapes: dict[str, tuple[int, ...]] = {key: tensor.shape for key, tensor in own.items()}
    adapters = [(f"{path}.", a) for path, a in module.named_modules() if isinstance(a, Adapter)]
    ranks = ranks_in(adapters, state)
    for prefix, adapter, r in ranks:
        shapes |= {prefix + key: shape for key, shape in adapter.shapes_at(r).items()}
    parts = [f"adapters.{name}{end}" for name in names for end in (".", ":")]
    there = module.state_dict(keep_vars=True).keys()
    refuse(
        {
            "missing": [key for key in own if key not in state],
            "unexpected": [key for key in state if key not in there and any(part in key for part in parts)],
            "of the wrong shape": [key for key in own if key in state and tuple(state[key].shape) != shapes[key]],
            "NaN or infinite": [key for key in own if key in state and not state[key].isfinite().all()],
        },
        f"the adapters of {type(module).__name__}",
    )
    for _, adapter, r in ranks:
        adapter.resize(r)


def _warn_once_of_nan(module: nn.Module, checkpoint: Mapping[str, Any], saving: Saving) -> None:
    if saving.warned:
        return
    state = checkpoint["state_dict"]
    try:
        check_finite({key: state[key] for key in _own_tensors(module) if key in state}, AdapterFileError)
    except AdapterFileError as error:
        saving.warned = True
        step = checkpoint.get("global_step", "?")
        rank_zero_warn(f"PEFT: the checkpoint of step {step} will be refused when it is loaded: {error}")
