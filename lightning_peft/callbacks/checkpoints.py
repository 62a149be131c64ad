"""What a Lightning checkpoint holds when a model is adapted: the adapters, and nothing of the frozen base.

``checkpoint["peft"]`` says with which methods and on which base, in primitives only, so that the file loads with
``weights_only=True``. On loading, the base is filled in from the live module, and loading stays strict.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine import AdapterFileError, adapters_of, inject
from lightning_peft.engine.inject import has_record, record_of
from lightning_peft.engine.slots import base_parameters
from lightning_peft.engine.state import check_base, fingerprint
from lightning_peft.interop.files import FORMAT, adapted_root, describe, method_from


def keep_adapters(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Take the frozen base out of ``checkpoint``, and say how to get it back."""
    root = adapted_root(module)
    if not has_record(root) or record_of(root).merged is not None or "state_dict" not in checkpoint:
        return
    base = base_tensors(module)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in base}
    checkpoint["peft"] = {
        "format": FORMAT,
        "adapters": {name: describe(injection.method) for name, injection in record_of(root).injections.items()},
        "base": fingerprint(root),
    }


def fill_in_base(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put the tensors of the live base into an adapter checkpoint, so that it loads strictly.

    Raises:
        AdapterFileError: the checkpoint holds no adapter, one of another method, or one for another base.
    """
    root = adapted_root(module)
    if "state_dict" not in checkpoint or not has_record(root):
        return
    methods = {name: injection.method for name, injection in record_of(root).injections.items()}
    state = checkpoint["state_dict"]
    if "peft" not in checkpoint:
        own = {id(p) for _, _, adapter in adapters_of(root) for p in adapter.parameters()}
        if any(key in state for key, p in module.named_parameters() if id(p) in own):
            return  # an ordinary checkpoint of the adapted model: loading it is strict
        raise AdapterFileError(
            f"the checkpoint holds no adapter, but the model has {', '.join(map(repr, methods))}. Load a checkpoint of "
            "the base before PEFT adapts it: module.load_state_dict(torch.load(path)['state_dict']), then fit."
        )
    facts = checkpoint["peft"]
    stored = {name: method_from(adapter) for name, adapter in facts["adapters"].items()}
    if stored != methods:
        raise AdapterFileError(f"the checkpoint was made with {stored}, but the model has {methods}. Use the same.")
    check_base(fingerprint(root), facts.get("base"), "this checkpoint")
    buffers = {prefix_of(module, root) + name: value for name, value in record_of(root).buffers.items()}
    checkpoint["state_dict"] = {**base_tensors(module), **buffers, **state}  # buffers may have moved since


def inject_from(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Inject the methods that ``checkpoint`` was made with.

    Raises:
        AdapterFileError: there are none.
    """
    if "peft" not in checkpoint:
        raise AdapterFileError(
            f"the checkpoint holds no adapter. Load it with {type(module).__name__}.load_from_checkpoint(path)."
        )
    for name, adapter in checkpoint["peft"]["adapters"].items():
        inject(module, method_from(adapter), name)


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Key in ``state_dict`` -> value of each frozen base parameter, and of each base buffer that has not changed.

    What lies outside the adapted part of ``module``, or requires gradients all the same, is not base: it may train.
    """
    root = adapted_root(module)
    prefix, record = prefix_of(module, root), record_of(root)
    state = module.state_dict(keep_vars=True)  # first: a model that shards itself puts its shards in place here
    trained = {id(root.get_parameter(name)) for i in record.injections.values() for name in i.in_place}
    frozen = {id(p) for p in base_parameters(root).values() if not p.requires_grad} - trained
    base: dict[str, Tensor] = {}
    for key, value in state.items():
        before = record.buffers.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if id(value) in frozen or (before is not None and torch.equal(value, before.to(value.device))):
            base[key] = value.detach()
    return base


def prefix_of(module: nn.Module, root: nn.Module) -> str:
    """What the keys of ``root`` begin with in the ``state_dict`` of ``module``."""
    return next(f"{name}." if name else "" for name, m in module.named_modules() if m is root)
