"""Injection: put the adapters of a method into a model, switch them, and take them out again."""

import dataclasses
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_peft.engine import slots
from lightning_peft.engine.codes import can_train, first_and_last, holds_codes, linear_size
from lightning_peft.engine.errors import AdapterError, TargetError, joined
from lightning_peft.engine.method import Method
from lightning_peft.engine.readers import fused_above, readers, reads_in_training
from lightning_peft.engine.record import (
    Injection,
    ModelT,
    Record,
    check_known,
    check_not_routed,
    check_restorable,
    has_record,
    record_of,
)
from lightning_peft.engine.saving import SavePretrained, let_loops_save, read_method_states, refuse_to_save
from lightning_peft.engine.slots import Adapter, Layer, adapters_of
from lightning_peft.engine.targets import Target


def inject(model: ModelT, method: Method, name: str = "default") -> ModelT:
    """Put the adapters of ``method`` into ``model`` in place, freeze the rest, and return the model.

    Calling it again with the same method and name adds what is missing (modules built since then) and nothing else.
    Another ``name`` adds a second set of adapters beside the first; both act until `set_active` says otherwise.

    Args:
        model: any module with parameters.
        method: what to inject.
        name: name of the adapter, without ``.`` and ``:``; attributes of ``nn.ModuleDict`` are taken.

    Raises:
        TargetError: the method finds nothing to adapt, or something that it cannot adapt.
        AdapterError: the name is taken by another method, or a parameter would be trained by two.
    """
    existing = _check(model, method, name)
    targets = [t for t in method.targets(model) if not _is_occupied(t, name)]
    parameters = slots.base_parameters(model)  # a tied parameter once
    own = {id(parameters[n]) for n in existing.in_place} if existing else set()
    in_place = [n for n in method.trained_in_place(model) if id(model.get_parameter(n)) not in own]
    if not (targets or in_place or existing):
        raise TargetError(
            f"{type(method).__name__} found nothing to train in {type(model).__name__}. Its arguments select neither a "
            "layer nor a parameter: name some, or use another method."
        )
    _check_in_place(model, in_place, type(method).__name__)
    planned = list(zip(targets, method.adapters(targets), strict=True))
    for target, adapter in planned:
        adapter.site = target.site
    for target, adapter in tqdm(planned, desc=type(method).__name__, unit="layer", delay=2, leave=False):
        _fill(adapter, target, name)
    readers_of = [_readers(model, target.owner, adapter) for target, adapter in planned]
    _check_readable(planned, readers_of, type(method).__name__)
    stored = _stored(model, method, targets)
    state = method.initial_state(model) | ({"calibrated": torch.zeros(())} if method.calibrated else {})

    # nothing may fail from here on
    record = record_of(model, create=True)
    injection = record.injections.setdefault(name, Injection(method, state=state))
    read_method_states(model)
    let_loops_save(model)
    for (target, adapter), reading in zip(planned, readers_of, strict=True):
        slots.occupy(target.module, name, adapter)
        _connect(model, target.owner, target.module, adapter, reading)
        refuse_to_save(model, target.owner)
    _freeze(model, record)
    for target, weight in stored:
        target.module._parameters[target.site.weight] = nn.Parameter(weight, requires_grad=False)
    for n in dict.fromkeys(n for n in in_place if n in parameters):
        parameters[n].requires_grad_(True)
        injection.in_place[n] = parameters[n].detach().clone() if method.keeps_base else None
    return model


def set_active(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let the adapters of these names act, and no others; which of them train does not change.

    Raises:
        AdapterError: there is no adapter of that name, a method that keeps no copy of the base would be left, or two
            of them train the same parameter in place. Or it is called inside of `routed`.
    """
    record = record_of(model)
    check_not_routed(record)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    check_known(record, wanted)
    changing = [i for name, i in record.injections.items() if i.active != (name in wanted)]
    for injection in changing:
        check_restorable(injection)
    shared = Counter(n for name in wanted for n in record.injections[name].in_place)
    if shared and shared.most_common(1)[0][1] > 1:
        raise AdapterError(
            f"set_active: {shared.most_common(1)[0][0]!r} is trained in place by several of {joined(wanted)}, and only "
            "one of them can act at a time. Name that one."
        )
    for _, module in slots.slots(model):
        slots.set_active(module, wanted)
    parameters = slots.base_parameters(model)
    for injection in sorted(changing, key=lambda i: not i.active):  # first those that leave: they give the base back
        injection.active = not injection.active
        for n, other in injection.in_place.items():
            _exchange(parameters[n], other)  # type: ignore[arg-type]


def set_trainable(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let the adapters of these names train, and freeze the others; which of them act does not change.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    record = record_of(model)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    check_known(record, wanted)
    for name in record.injections:
        for _, _, adapter in adapters_of(model, name):
            adapter.requires_grad_(name in wanted)
    trained = {n for name in wanted for n in record.injections[name].in_place}
    for n in {n for injection in record.injections.values() for n in injection.in_place}:
        model.get_parameter(n).requires_grad_(n in trained)


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """While it lasts, ``model`` answers as the base model.

    Raises:
        AdapterError: a method trained the base in place and kept no copy of it.
    """
    record = record_of(model)
    active = [name for name, injection in record.injections.items() if injection.active]
    set_active(model, ())
    try:
        yield model
    finally:
        set_active(model, active)


def detach(model: nn.Module) -> dict[str, nn.ModuleDict]:
    """Give every module its own class back; return name -> the adapters that were on it."""
    adapted = [(n, m) for n, m in slots.base_modules(model) if slots.is_slot(m)]
    for _, module in slots.base_modules(model):
        if isinstance(module.__dict__.get("save_pretrained"), SavePretrained):
            del module.__dict__["save_pretrained"]
            module.__dict__.pop("_hf_peft_config_loaded", None)
    return {n: held for n, m in adapted if (held := slots.vacate(m)) is not None}


def attach(model: nn.Module, held: dict[str, nn.ModuleDict], active: Iterable[str]) -> None:
    """The inverse of `detach`; the adapters of the names in ``active`` act."""
    let_loops_save(model)
    for path, adapters in held.items():
        module = model.get_submodule(path)
        alike: dict[tuple[slots.Site, bool], Adapter] = {}  # the same modules read or call for all of a kind
        for key, adapter in adapters.items():
            slots.hang(module, key.partition(":")[0], adapter)  # type: ignore[arg-type]
            alike[adapter.site, _is_to_be_called(adapter)] = adapter  # type: ignore[arg-type, assignment, index]
        for adapter in alike.values():
            _connect(model, path, module, adapter, _readers(model, path, adapter))
        slots.set_active(module, active)
        refuse_to_save(model, path)


def _readers(model: nn.Module, owner: str, adapter: Adapter) -> list[nn.Module]:
    """The modules that read the weights of module ``owner``, and have to see the effective ones."""
    found = readers(model, owner, adapter.site.weight)
    return [m for m in found if reads_in_training(m) or not _is_to_be_called(adapter)]


def _is_to_be_called(adapter: Adapter) -> bool:
    # what is no change of weights acts in calls alone, so those who could do without a call have to call
    return adapter.unmergeable_because() is not None


def _connect(model: nn.Module, owner: str, module: nn.Module, adapter: Adapter, reading: list[nn.Module]) -> None:
    for reader in reading:
        slots.let_read(reader, module)
    if _is_to_be_called(adapter):
        for fused in fused_above(model, owner):
            slots.let_call(fused, module)


def _check(model: Any, method: Any, name: str) -> Injection | None:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"inject: expected a torch.nn.Module to adapt, got {type(model).__name__}.")
    if not isinstance(method, Method):
        raise AdapterError(f"inject: expected a method such as LoRA(r=8), got {method!r}.")
    if not name or "." in name or ":" in name:
        raise AdapterError(f"inject: name must be a string without '.' or ':', and not empty, got {name!r}.")
    if hasattr(slots.Adapters(), name):
        raise AdapterError(f"inject: name {name!r} is taken by an attribute of nn.ModuleDict. Choose another.")
    if next(itertools.chain(model.parameters(), model.buffers()), None) is None:
        raise TargetError(
            f"inject: {type(model).__name__} has no parameters to adapt. Inject after its layers are built."
        )
    if not has_record(model):
        inner = next((n for n, m in model.named_modules() if has_record(m)), None)
        if inner is not None:
            raise AdapterError(
                f"inject: the submodule {inner!r} was adapted before. Inject into that one, or unload it first."
            )
        check_unwrapped(model)
        return None
    record = record_of(model)
    if record.merged is not None:
        raise AdapterError("inject: the adapters are merged into the base. unmerge(model) before injecting more.")
    check_not_routed(record)
    existing = record.injections.get(name)
    if existing is not None and existing.method != method:
        there, now = _apart(existing.method, method)
        raise AdapterError(
            f"inject: the adapter name {name!r} is taken by {there}; asked for now: {now}. "
            f"unload(model, {name!r}) first. Or take another name, and unload this one when the new one is there: so "
            "it stays if that fails."
        )
    return existing


def check_unwrapped(model: nn.Module) -> None:
    """Raise an `AdapterError` if there is a model of HF PEFT in ``model``, whose factors are linear layers too."""
    for path, module in model.named_modules():
        if type(module).__module__ == "peft.peft_model":
            raise AdapterError(
                f"{path or 'the model'} is a {type(module).__name__} of HF PEFT. Take the model out of it with "
                "merge_and_unload() or unload(); load_adapter reads what its save_pretrained wrote."
            )


def _apart(one: Method, other: Method) -> tuple[str, str]:
    """Both as text; of the same class without what is the same, such as a list of many layers."""
    if type(one) is not type(other):
        return str(one), str(other)
    names = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)]  # type: ignore[arg-type]
    each = [", ".join(f"{name}={getattr(method, name)!r}" for name in names) for method in (one, other)]
    return f"{type(one).__name__}({each[0]})", f"{type(one).__name__}({each[1]})"


def _check_in_place(model: nn.Module, names: list[str], who: str) -> None:
    injections = record_of(model).injections if has_record(model) else {}
    taken = {n: a for a, i in injections.items() if i.active for n in i.in_place}
    for name in names:
        if name in taken:
            raise AdapterError(
                f"{who}: {name!r} is trained in place by adapter {taken[name]!r} already, and two cannot share it. "
                f"Leave it out of one of them (modules_to_save=(), or exclude_modules), or set_active(model, ()) first "
                "and let one act at a time."
            )
    for name in names:
        owner, _, own = name.rpartition(".")
        if not can_train(model.get_parameter(name)) or holds_codes(model.get_submodule(owner), own):
            raise TargetError(
                f"{who}: {name!r} is kept in few bits, which no gradient can change. Leave it out (exclude_modules, "
                "modules_to_save), or train an adapter on it."
            )
    for names_of_one in owners_of(model).values():
        chosen = [n for n in names_of_one if n in names]
        others = [n for n in names_of_one if n not in names]
        if chosen and others:
            raise TargetError(
                f"{who}: {chosen[0]!r} is tied to {others[0]!r}: training the one in place would change the other. "
                "Name both in modules_to_save, or untie them first."
            )


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter -> its names; more than one if it is tied (a module that is used twice ties nothing)."""
    owners: dict[int, list[str]] = {}
    for path, module in slots.base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners


def _check_readable(planned: list[tuple[Target, Adapter]], readers_of: list[list[nn.Module]], who: str) -> None:
    for (target, adapter), reading in zip(planned, readers_of, strict=True):
        by = ([target.module] if target.site.read else []) + reading
        because = adapter.unmergeable_because()
        if by and because is None and slots.in_codes(target.module, target.site):
            because = f"{slots.in_codes_because(target.module, target.site)} {slots.CALL_IT}"
        if because is None:
            because, by = adapter.unreadable_because(), [m for m in by if reads_in_training(m)]
        if because and by:
            raise TargetError(
                f"{who}: {type(adapter).__name__} cannot act on {target.name!r}: {slots.base_class(by[0]).__name__} "
                f"reads that weight without a call of the layer, and {because} Or leave it out with exclude_modules."
            )


def _stored(model: nn.Module, method: Method, targets: list[Target]) -> list[tuple[Target, Tensor]]:
    """(target, weight) of those that the method keeps in another form than they have."""
    changed, owners = [], owners_of(model)
    for target in targets:
        if method.changes_base and slots.in_codes(target.module, target.site):
            raise TargetError(
                f"{type(method).__name__}: the weight of {target.name!r} is quantised by another library "
                "already. Use LoRA."
            )
        weight = target.module._parameters.get(target.site.weight)
        kept = weight if weight is None else method.stored(weight, target)
        if weight is None or kept is None or kept is weight:
            continue
        own = f"{target.owner}.{target.site.weight}".lstrip(".")
        others = [name for name in owners[id(weight)] if name != own]
        if others:
            raise TargetError(
                f"{type(method).__name__}: the weight of {target.name!r} is tied to {others[0]!r}, which would be kept "
                "in another form with it. Leave that layer out with exclude_modules, or untie them first."
            )
        changed.append((target, kept))
    return changed


def _is_occupied(target: Target, name: str) -> bool:
    return slots.holds_adapters(target.module) and target.site.key(name) in target.module.adapters  # type: ignore[operator]


def _fill(adapter: Adapter, target: Target, name: str) -> None:
    if target.site.get(target.module)[0].is_meta:
        return
    # a generator of its own: other random numbers stay as they were, and the order of the modules has no influence
    seed = zlib.crc32(f"{name}/{target.name}".encode()) ^ (torch.initial_seed() & 0xFFFFFFFF)
    with torch.no_grad(), torch.device("cpu"):  # where the generator is, whatever the default
        holds = slots.holds_adapters(target.module)
        below = slots.active_adapters(target.module, target.site.weight) if holds else ()
        layer = Layer(target.module, target.site, below)
        try:
            adapter.reset_parameters(layer, torch.Generator().manual_seed(seed))
        except AdapterError as error:
            raise TargetError(f"{type(adapter).__name__} on {target.name!r}: {error}") from None


def _freeze(model: nn.Module, record: Record) -> None:
    in_place = {n for injection in record.injections.values() for n in injection.in_place}
    for name, parameter in slots.base_parameters(model).items():
        if name not in in_place and parameter.requires_grad:
            record.trainable.add(name)
            parameter.requires_grad_(False)
    for name, buffer in slots.base_buffers(model).items():
        if name not in record.buffers:
            record.buffers[name] = buffer.detach().clone()
    for path, module in slots.base_modules(model):
        if linear_size(module) is not None:
            # in the form in which they are saved (`Slot.train`), which tells one base from another
            module.state_dict()
            for name, parameter in module.named_parameters(path, recurse=False):
                if name not in record.samples and not parameter.is_meta:
                    record.samples[name] = first_and_last(parameter)


def _exchange(parameter: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        kept = parameter.detach().clone()
        parameter.copy_(other)
        other.copy_(kept)
