"""Averaging callbacks beside PEFT: they average what trains, and leave the frozen base bit for bit as it is.

Lightning averages all weights of a module, also those that do not change: rounding moves them, at a cost in time that
grows with the base. And it copies the module before every hook that may build a part of it has run.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_peft.callbacks.checkpoints import frozen_base
from lightning_peft.engine import AdapterError
from lightning_peft.engine.slots import base_parameters
from lightning_peft.interop.files import adapted_root


def average_what_trains(trainer: Any, module: L.LightningModule) -> None:
    """Let the averaging callbacks of ``trainer`` leave the frozen base of ``module`` alone.

    Raises:
        AdapterError: one of them has copied the module before it was complete.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            average: Any = callback._average_model
            frozen = _same_base(callback, average.module, module)
            _average_weights(average, frozen)
        elif isinstance(callback, StochasticWeightAveraging):
            frozen = _same_base(callback, callback._average_model, module)
            _average_stochastic_weights(callback, frozen, frozen_norms(adapted_root(module)))


def frozen_norms(root: nn.Module) -> list[nn.Module]:
    """The batch normalisations whose running statistics belong to the base: their weights do not train now."""
    parameters = base_parameters(root)
    if all(parameter.requires_grad for parameter in parameters.values()):
        return []
    norms = [(n, m) for n, m in root.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return [norm for name, norm in norms if f"{name}.weight".lstrip(".") not in trained]


def _same_base(callback: L.Callback, average: Any, module: nn.Module) -> set[str]:
    """Give ``average`` the frozen parameters of ``module``; return their names."""
    theirs, ours = dict(average.named_parameters()), dict(module.named_parameters())
    if list(theirs) != list(ours):
        raise AdapterError(
            f"{type(callback).__name__} copied {type(module).__name__} before it was complete, with {len(theirs)} of "
            f"{len(ours)} parameters, so it would average nothing or the wrong ones. Build the model in __init__."
        )
    frozen = frozen_base(module)
    names = {name for name, parameter in ours.items() if id(parameter) in frozen}
    with torch.no_grad():
        for name in names:
            theirs[name].copy_(ours[name])
    return names


def _average_weights(average: Any, frozen: set[str]) -> None:
    def update_parameters(model: nn.Module) -> None:
        whole = average.module
        average.module, trained = _trained(whole, model, frozen)
        try:
            type(average).update_parameters(average, trained)
        finally:
            average.module = whole

    average.update_parameters = update_parameters


def _average_stochastic_weights(callback: Any, frozen: set[str], norms: list[nn.Module]) -> None:
    def update_parameters(average: nn.Module, model: nn.Module, *args: Any) -> None:
        type(callback).update_parameters(*_trained(average, model, frozen), *args)

    def contains_batch_norm(module: nn.Module) -> bool:
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in norms for m in module.modules())

    def reset_batch_norm(module: nn.Module) -> None:
        kept = [{name: b.clone() for name, b in norm._buffers.items() if b is not None} for norm in norms]
        type(callback).reset_batch_norm_and_save_state(callback, module)
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)

    callback.update_parameters = update_parameters
    # after training, statistics are computed anew for the averaged weights: only of the norms that trained
    callback.pl_module_contains_batch_norm = contains_batch_norm
    callback.reset_batch_norm_and_save_state = reset_batch_norm


def _trained(average: nn.Module, model: nn.Module, frozen: set[str]) -> tuple[nn.Module, nn.Module]:
    """Two modules that hold alone what is to be averaged: parameters that train, and buffers that are not equal."""
    theirs, ours = nn.Module(), nn.Module()
    pairs = zip(average.named_parameters(), model.parameters(), strict=True)
    for i, ((name, a), b) in enumerate(pairs):
        if name not in frozen:
            theirs.register_parameter(f"p{i}", a)
            ours.register_parameter(f"p{i}", b)
    for i, (c, d) in enumerate(zip(average.buffers(), model.buffers(), strict=True)):
        if not torch.equal(c, d.to(c.device)):
            theirs.register_buffer(f"b{i}", c)
            ours.register_buffer(f"b{i}", d)
    return theirs, ours
