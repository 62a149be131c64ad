"""Adapter state: which tensors belong to an adapter, under which keys, and which base they belong to."""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine import slots
from lightning_peft.engine.codes import first_and_last, linear_size
from lightning_peft.engine.errors import AdapterError, AdapterFileError
from lightning_peft.engine.method import METHOD_STATE
from lightning_peft.engine.record import check_known, record_of
from lightning_peft.engine.slots import Adapter, adapters_of


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Key -> live tensor of everything that adapter ``name`` has trained or changed, and nothing of the base.

    Keys are those of ``state_dict`` when nothing is compiled, without the adapter name:
    ``blocks.0.attn.qkv.adapters.lora_A``; for a module with several weights
    ``self_attn.adapters:in_proj_weight.lora_A``; for what was trained in place ``head.weight``.
    What the method keeps beside its adapters is below ``method_state``.
    Buffers of the base (running statistics) are there if they are not what they were before injection.

    Raises:
        AdapterError: there is no such adapter, or it is merged.
    """
    record = record_of(model)
    if record.merged is not None:
        raise AdapterError("the adapters are merged into the base. unmerge(model) first.")
    check_known(record, (name,))
    state: dict[str, Tensor] = {}
    for prefix, adapter in _prefixed(model, name):
        state |= {prefix + key: value for key, value in adapter.state_dict(keep_vars=True).items()}
    parameters, injection = slots.base_parameters(model), record.injections[name]
    for key, other in injection.in_place.items():
        state[slots.plain_name(key)] = parameters[key] if injection.active or other is None else other
    state |= {f"{METHOD_STATE}.{key}": value for key, value in injection.state.items()}
    for key, buffer in slots.base_buffers(model).items():
        if key in record.buffers and not torch.equal(buffer, record.buffers[key].to(buffer.device)):
            state[slots.plain_name(key)] = buffer
    return state


def _prefixed(model: nn.Module, name: str) -> list[tuple[str, Adapter]]:
    """What the keys of each adapter begin with, and the adapter."""
    return [(a.site.prefix(path), a) for path, _, a in adapters_of(model, name)]


def ranks_in(adapters: Iterable[tuple[str, Adapter]], tensors: Mapping[str, Tensor]) -> list[tuple[str, Adapter, int]]:
    """Those of ``adapters`` (prefix of its keys, adapter) whose rank a file decides, with the rank in ``tensors``."""
    found = ((prefix, adapter, adapter.rank_in(tensors, prefix)) for prefix, adapter in adapters)
    return [(prefix, adapter, r) for prefix, adapter, r in found if r is not None]


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy ``tensors`` into the adapter ``name`` that was injected before; keys as in `adapter_state`.

    Raises:
        AdapterFileError: keys are missing or unexpected, a shape is wrong, integers are where numbers have a point,
            or a value is NaN or infinite; nothing has been changed then.
    """
    state, buffers = adapter_state(model, name), slots.base_buffers(model)
    before = {slots.plain_name(key): value for key, value in record_of(model).buffers.items() if key in buffers}
    optional = {slots.plain_name(key): buffer for key, buffer in buffers.items() if slots.plain_name(key) in before}
    problems = {
        "missing": [key for key in state if key not in tensors and key not in optional],
        "unexpected": [key for key in tensors if key not in state and key not in optional],
    }
    there = optional | state
    shapes: dict[str, tuple[int, ...]] = {key: value.shape for key, value in there.items()}
    ranks = ranks_in(_prefixed(model, name), tensors)
    for prefix, adapter, r in ranks:
        shapes |= {prefix + key: shape for key, shape in adapter.shapes_at(r).items()}
    problems["of the wrong shape"] = [k for k, v in tensors.items() if k in shapes and tuple(v.shape) != shapes[k]]
    problems["of another kind of number"] = [
        k for k, v in tensors.items() if k in there and _kind(v) is not _kind(there[k])
    ]
    # in eight bits they cannot be asked
    exact = {k: v.float() if v.dtype.itemsize < 2 else v for k, v in tensors.items() if v.is_floating_point()}
    problems["NaN or infinite"] = [k for k, v in exact.items() if not v.isfinite().all()]
    refuse(problems, f"adapter {name!r} of {slots.base_class(model).__name__}")
    for _, adapter, r in ranks:
        adapter.resize(r)
    with torch.no_grad():
        for key, value in {**before, **tensors}.items():  # a buffer that is not there had its base value
            there[key].copy_(value)


def _kind(tensor: Tensor) -> Any:
    """What may be copied into what: numbers of any precision, and otherwise the same alone."""
    return float if tensor.is_floating_point() else tensor.dtype


def refuse(problems: Mapping[str, list[str]], what: str) -> None:
    """Raise an `AdapterFileError` if there are any ``problems``: kind -> keys of the tensors that have it."""
    found = [
        f"{len(keys)} tensors are {problem}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for problem, keys in problems.items()
        if keys
    ]
    if found:
        raise AdapterFileError(
            f"the file does not fit {what}: {'; '.join(found)}. "
            "Load it into the model, and with the method, that it was made with."
        )


def base_values(model: nn.Module) -> dict[str, Tensor | None]:
    """Name -> base value of the parameters that are trained in place at present; None where no copy was kept."""
    active = (injection for injection in record_of(model).injections.values() if injection.active)
    return {key: other for injection in active for key, other in injection.in_place.items()}


def fingerprint(
    model: nn.Module, prefix: str = "", names: Collection[str] | None = None, trained: Collection[str] | None = None
) -> dict[str, str | int | None]:
    """What tells one base from another, however it is cast or wrapped.

    ``structure`` hashes names and shapes of the base parameters. ``values`` hashes up to 128 values of each frozen
    one, in bfloat16 so that a cast checkpoint stays the same base; None for a model without values (meta device).
    Only parameters whose names begin with ``prefix`` count, named without it. Frozen is what the adapters ``names``
    (all, by default) do not train in place, or all but the parameters ``trained``; of what others train, the base
    value counts.
    """
    injections, samples = record_of(model).injections, record_of(model).samples
    if trained is None:
        found = {key for name, i in injections.items() if names is None or name in names for key in i.in_place}
        trained = {slots.plain_name(key) for key in found}
    before = base_values(model)
    structure, values, count, real = hashlib.sha256(), hashlib.sha256(), 0, True
    modules = [(module, size) for _, module in slots.base_modules(model) if (size := linear_size(module))]
    sizes = {id(p): size for module, size in modules for p in module.parameters(recurse=False)}
    base = {slots.plain_name(name): (name, p) for name, p in slots.base_parameters(model).items()}
    for plain, (name, parameter) in sorted((plain, named) for plain, named in base.items() if plain.startswith(prefix)):
        shape = sizes.get(id(parameter)) or tuple(parameter.shape)  # codes may change theirs
        structure.update(f"{plain.removeprefix(prefix)}{shape}".encode())
        count += parameter.numel()
        real = real and not parameter.is_meta
        if plain not in trained and real:
            other = before.get(name)
            sample = samples[name] if name in samples else _sample(parameter if other is None else other)
            values.update(sample.view(torch.int16).numpy().tobytes())
    return {
        "class": slots.base_class(model.get_submodule(prefix.removesuffix("."))).__name__,
        "parameters": count,
        "structure": structure.hexdigest()[:16],
        "values": values.hexdigest()[:16] if real else None,
    }


def remember_values(model: nn.Module) -> None:
    """Keep what `fingerprint` takes of the base, so that it needs no other rank once the base is sharded.

    Of a base that is sharded already the values are collected: all ranks have to call this.
    """
    samples, before = record_of(model).samples, base_values(model)
    for name, parameter in slots.base_parameters(model).items():
        if name not in samples and not parameter.is_meta:
            other = before.get(name)
            samples[name] = _sample(parameter if other is None else other)


def _sample(value: Tensor) -> Tensor:
    """`first_and_last`; of a sharded tensor without putting it together."""
    if not hasattr(value, "full_tensor"):
        return first_and_last(value)
    count, width = value.numel(), math.prod(value.shape[1:])
    start, rows, groups = 0, value.shape[0], []
    for dim, placement in enumerate(value.placements):  # type: ignore[attr-defined]
        if placement.is_shard(0):
            mesh = value.device_mesh  # type: ignore[attr-defined]
            first = min(-(-rows // mesh.size(dim)) * mesh.get_local_rank(dim), rows)
            start, rows = start + first, min(-(-rows // mesh.size(dim)), rows - first)
            groups.append(mesh.get_group(dim))
        elif not placement.is_replicate():
            return _sample(slots.whole(value))
    positions = torch.tensor([*range(min(64, count)), *range(max(0, count - 64), count)], device=value.device)
    own = value.to_local().detach().flatten()  # type: ignore[attr-defined]
    here = (positions >= start * width) & (positions < start * width + own.numel())
    sample = torch.zeros(len(positions), dtype=own.dtype, device=own.device)
    sample[here] = own[positions[here] - start * width]
    for group in groups:  # each position has one owner, the others add zero
        torch.distributed.all_reduce(sample, group=group)
    return sample.to("cpu", torch.bfloat16)


def check_base(here: Mapping[str, Any], there: Mapping[str, Any] | None, source: str) -> None:
    """Compare the fingerprint of the live base with the one that an adapter was trained on.

    Raises:
        AdapterFileError: they differ; a base without values (meta device) is compared by structure alone.
    """
    if not there or not here.keys() <= there.keys():
        raise AdapterFileError(
            f"{source} does not say on which base the adapter was trained: it is damaged, or of another kind."
        )
    same_structure = here["structure"] == there["structure"]
    if same_structure and (None in (here["values"], there["values"]) or here["values"] == there["values"]):
        return
    what = "the same model with other weights" if same_structure else "another model"
    raise AdapterFileError(
        f"the adapter in {source} was trained on {what}: {there['class']} with {there['parameters']} parameters "
        f"(values {there['values']}); here is {here['class']} with {here['parameters']} (values {here['values']}). "
        "Load the base that it was trained on first; load_adapter(..., allow_other_base=True) loads it all the same."
    )
