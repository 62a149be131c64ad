"""Merging: fold the adapters into plain weights, and take them out again without a trace."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_peft.engine import slots
from lightning_peft.engine.codes import answers_in, can_train, is_code, linear_size, own_tensors, parts
from lightning_peft.engine.errors import AdapterError, MergeError
from lightning_peft.engine.inject import attach, detach, owners_of, set_active
from lightning_peft.engine.record import ModelT, check_known, check_not_routed, forget, record_of
from lightning_peft.engine.saving import refuse_to_save
from lightning_peft.engine.slots import Adapter, adapters_of
from lightning_peft.engine.state import adapter_state


@dataclasses.dataclass
class Merged:
    """What `unmerge` needs: the adapters, the base parameters they were folded into, and what was active.

    Layers that were in codes are kept as they were.
    """

    adapters: dict[str, nn.ModuleDict]
    coded: dict[str, nn.Module]
    parameters: dict[str, dict[str, nn.Parameter | None]]
    active: tuple[str, ...]
    frozen: set[str]


def merge(model: ModelT, *, keep_base: bool = True, dequantize: bool = False) -> ModelT:
    """Fold the active adapters into the base weights in place; what is left are plain modules and their base keys.

    A weight that is tied to another is untied first (a warning says so): the other end keeps its value.

    Args:
        model: the model that was given to `inject`.
        keep_base: keep the base weights and the adapters, so that `unmerge` can put them back bit for bit.
        dequantize: turn each adapted layer that another library has quantised into a plain ``nn.Linear`` in the dtype
            of the model (a warning says what that costs); without it, such a layer is an error. It gives what the
            quantised layer with its adapters gave, to within rounding: not what it gave before it was quantised.

    Raises:
        MergeError: an adapter cannot be merged, or holds NaN or infinite values, or sits on a quantised layer;
            nothing has been changed then.
        AdapterError: nothing was injected into this model, or it is called inside of `routed`.
    """
    record = record_of(model)
    if record.merged is not None:
        raise MergeError("merge: the adapters are merged already. unmerge(model) takes them out again.")
    check_not_routed(record)
    active = tuple(name for name, injection in record.injections.items() if injection.active)
    acting = [(path, module, a) for name in active for path, module, a in adapters_of(model, name)]
    check_mergeable(acting)
    for name in active:
        check_finite(adapter_state(model, name), MergeError)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    owners = owners_of(model)
    kept: dict[str, dict[str, nn.Parameter | None]] = {}
    dtype = _dtype(model)
    layers = tqdm(list(slots.slots(model)), desc="Merging", unit="layer", delay=2, leave=False)
    merged = {path: merged_parameters(module, dtype, dequantize) for path, module in layers}
    plain: dict[str, nn.Linear] = {}
    for path, module in list(slots.slots(model)):
        new = merged[path]
        if not new:  # none of its adapters acts
            continue
        if slots.in_codes(module, next(iter(module.adapters.values())).site):  # type: ignore[operator]
            if module is model:
                raise MergeError(
                    "merge: the model is that layer itself, so no other can take its place. Put it into nn.Sequential."
                )
            plain[path] = _plain_linear(module, new)
            continue
        kept[path] = {name: module._parameters[name] for name in new}
        for name, value in new.items():
            old = module._parameters[name]
            if old is not None and len(owners[id(old)]) > 1:
                others = [owner for owner in owners[id(old)] if owner != f"{path}.{name}"]
                warnings.warn(f"merge: {path}.{name} was tied to {', '.join(others)}; it is untied now.", stacklevel=2)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    coded = {path: model.get_submodule(path) for path in plain}
    if plain:
        _warn_of_bytes(coded, plain)
    adapters = detach(model)
    _exchange(model, plain)
    for path in plain:
        refuse_to_save(model, path, f"{path!r} was dequantised, and {_STILL_QUANTISED}")
    for path, before in kept.items():
        if None in before.values():
            made = next(name for name, parameter in before.items() if parameter is None)
            because = f"the merged {path!r} has a {made} that the model does not have by itself, and from_pretrained "
            refuse_to_save(model, path, because + "passes over it. Save the adapters with save_adapter before merging.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or (name in record.trainable and can_train(parameter)))
    record.merged = Merged(adapters, coded, kept, active, frozen)
    if not keep_base:
        forget(model)
    return model


def unmerge(model: ModelT) -> ModelT:
    """Undo `merge`: the base weights and the adapters are back, bit for bit.

    Raises:
        MergeError: nothing is merged, or the base was not kept.
    """
    record = model.__dict__.get("_peft")
    if record is None or record.merged is None:
        raise MergeError("unmerge: nothing is merged, or it was with keep_base=False. Call merge(model) first.")
    merged: Merged = record.merged
    for path, layer in merged.coded.items():
        plain = model.get_submodule(path)
        layer.train(plain.training)
        if answers_in(layer)[1] != plain.weight.device:  # the model has been moved since
            layer.to(plain.weight.device)  # type: ignore[arg-type]
    _exchange(model, merged.coded)
    modules = dict(model.named_modules())
    for path, parameters in merged.parameters.items():
        device = next(p.device for name in parameters if (p := modules[path]._parameters[name]) is not None)
        for name, parameter in parameters.items():
            if parameter is not None and parameter.device != device:  # the model has been moved since
                parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        modules[path]._parameters.update(parameters)
    for path, held in merged.adapters.items():
        device = next((p.device for p in modules[path].parameters()), None)
        if device is not None:
            held.to(device)
    attach(model, merged.adapters, merged.active)
    for name, parameter in model.named_parameters():
        if name in merged.frozen:
            parameter.requires_grad_(False)
    record.merged = None
    return model


def unload(model: ModelT, name: str | None = None) -> ModelT:
    """Take all adapters out, or those of one name; the base is as it was before `inject`.

    That means its parameters and its buffers bit for bit, and, with the last adapter, its ``requires_grad`` flags.
    Weights that the method keeps in another form (``changes_base``) stay in it, and frozen.

    Raises:
        AdapterError: a method trained the base in place and kept no copy of it, or there is no such adapter.
    """
    record = record_of(model)
    check_known(record, () if name is None else (name,))
    if record.merged is not None:
        unmerge(model)
    leaving = [n for n in record.injections if name in (None, n)]
    active = [n for n, injection in record.injections.items() if injection.active and n not in leaving]
    set_active(model, active)
    held = detach(model)
    for left in leaving:
        for adapters in held.values():
            for key in [key for key in adapters if key.partition(":")[0] == left]:
                del adapters[key]
        for parameter in record.injections.pop(left).in_place:
            still_trained = any(parameter in injection.in_place for injection in record.injections.values())
            model.get_parameter(parameter).requires_grad_(still_trained)
    if record.injections:
        attach(model, {path: adapters for path, adapters in held.items() if len(adapters)}, active)
        return model
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key in record.buffers:
                buffer.copy_(record.buffers[key])
    for key, base in model.named_parameters():
        base.requires_grad_(key in record.trainable and can_train(base))
    forget(model)
    return model


def merged_parameters(module: Any, dtype: torch.dtype | None = None, dequantize: bool = False) -> dict[str, Tensor]:
    """Name -> value, in the layout and dtype of ``module``, of its parameters with the active adapters folded in.

    ``dtype`` is for a layer that has no weight yet. Computed in float32 at least and rounded once.

    Raises:
        MergeError: the weight is in codes of another library, and nobody said ``dequantize``; or they cannot be read.
    """
    new: dict[str, Tensor] = {}
    for site in dict.fromkeys(adapter.site for adapter in module.adapters.values()):
        adapters = slots.active_adapters(module, site.weight)
        if adapters:
            coded = slots.in_codes(module, site)
            if coded and not dequantize:
                because = slots.in_codes_because(module, site)
                raise MergeError(
                    f"merge: nothing can be merged: {because} merge(model, dequantize=True) puts a plain one there."
                )
            try:
                weight, bias = slots.values(module, site)
            except AdapterError as error:
                raise MergeError(f"merge: nothing can be merged: {error}") from None
            values_in, exact = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
            weight, bias = weight.to(exact), None if bias is None else bias.to(exact)
            with torch.no_grad():
                for adapter in adapters:
                    weight, bias = adapter.merged(weight, bias)
                if coded:
                    both = {"weight": weight, "bias": bias}
                    stored = {name: value.to(dtype or values_in) for name, value in both.items() if value is not None}
                else:
                    stored = site.store(module, weight, bias, dtype)
            new |= {name: value.clone(memory_format=torch.contiguous_format) for name, value in stored.items()}
    return new


_STILL_QUANTISED = (
    "from_pretrained would take it for what the configuration says. Load the base in full precision, then "
    "load_adapter(model, folder, allow_other_base=True), merge(model) and save that; or save model.state_dict()."
)


def _warn_of_bytes(coded: Mapping[str, nn.Module], plain: Mapping[str, nn.Linear]) -> None:
    before = sum(part.nbytes for module in coded.values() for t in own_tensors(module) for part in parts(t))
    after = sum(p.nbytes for layer in plain.values() for p in layer.parameters())
    path, *others = plain
    warnings.warn(
        f"merge: {path}{f' and {len(others)} more are' if others else ' is'} in {plain[path].weight.dtype} now and no "
        f"longer quantised: {after:,} bytes, which were {before:,}. They give what the quantised layers with their "
        "adapters gave, to within rounding.",
        stacklevel=3,
    )


def _dtype(model: nn.Module) -> torch.dtype | None:
    """In which ``model`` computes, as its first weight says; a layer in codes may have a dtype of its own."""
    coded = {id(p) for m in model.modules() if linear_size(m) is not None for p in m.parameters(recurse=False)}
    base = slots.base_parameters(model).values()
    return next((p.dtype for p in base if not is_code(p) and id(p) not in coded), None)


def _plain_linear(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Linear:
    """A plain layer with these values in the place of ``module``, whose hooks it keeps."""
    d_out, d_in = values["weight"].shape
    plain = nn.Linear(d_in, d_out, bias="bias" in values, device="meta").train(module.training)
    for name, value in values.items():
        plain._parameters[name] = nn.Parameter(value, requires_grad=False)
    vars(plain).update({key: vars(module)[key] for key in vars(plain) if "hooks" in key})
    return plain


def _exchange(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each of ``layers`` in the place of the module of that name, in all places where that is."""
    new = {id(model.get_submodule(path)): layer for path, layer in layers.items()}
    for parent in model.modules():
        parent._modules.update({key: new[id(child)] for key, child in parent._modules.items() if id(child) in new})


def check_mergeable(acting: list[tuple[str, nn.Module, Adapter]]) -> None:
    """Raise a `MergeError` that names the first of these adapters that is no change of weights."""
    refused = [(path, reason) for path, _, adapter in acting if (reason := adapter.unmergeable_because()) is not None]
    if refused:
        path, reason = refused[0]
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise MergeError(f"merge: the adapter on {path!r}{others} cannot be merged: {reason} Keep it as an adapter.")


def check_finite(state: Mapping[str, Tensor], error: type[Exception]) -> None:
    """Raise ``error`` for the first tensor that holds NaN or an infinite value."""
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise error(
                f"{key} holds NaN or infinite values. Training diverged before this: go back to an earlier checkpoint, "
                "and lower the learning rate or clip gradients."
            )
