"""Methods that measure their start on data, given the user's own training data before the first step."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from rich.progress import Progress
from torch import Tensor

from lightning_peft.callbacks.probe import batch_losses
from lightning_peft.callbacks.resuming import data_state, random_state, set_data_state
from lightning_peft.engine import AdapterError, Method, adapter_state, calibrate, load_adapter_state
from lightning_peft.engine.calibration import CALIBRATED
from lightning_peft.engine.errors import joined
from lightning_peft.engine.record import record_of
from lightning_peft.interop.files import adapted_root


def calibrate_on_training_data(
    trainer: Any, module: L.LightningModule, methods: Mapping[str, Method], batches: int
) -> None:
    """Calibrate the adapters that are not yet; those of a run that goes on, or of a file, are.

    This is before the strategy has set up: the module is moved to its device and precision first.

    Random numbers and the order of the data stay as they are. With several processes all get what the first measured.

    Raises:
        AdapterError: there is no training data, the base has no values yet, or what is measured is not finite.
    """
    root = adapted_root(module)
    injections = record_of(root).injections
    waiting = [n for n in methods if CALIBRATED in injections[n].state and not injections[n].state[CALIBRATED]]
    if not waiting:
        return
    if any(parameter.is_meta for parameter in root.parameters()):
        raise AdapterError(
            f"PEFT: the start of {joined(waiting)} is measured with the values of the base, which has none (meta "
            "device). Build the model with its weights, or start from an adapter that was measured: "
            "PEFT(init_from=...)."
        )
    before = random_state()
    source = _training_data(trainer, waiting)
    loaders = getattr(source, "flattened", [source])
    before |= {"own": data_state(loaders)["own"]}
    precision = trainer.precision_plugin
    if isinstance(precision, HalfPrecision | DoublePrecision):  # batches are converted, so the weights have to be
        precision.convert_module(module)
    module.to(trainer.strategy.root_device)
    try:
        data = list(itertools.islice(iter(source), batches))
        if not data:
            raise AdapterError(
                f"PEFT: the start of {joined(waiting)} is measured on training data, and there is no batch in it. Give "
                "fit a train_dataloader that has some."
            )
        with Progress(transient=True, disable=trainer.progress_bar_callback is None) as progress:
            task = progress.add_task("Calibrating", total=None)

            def loss(index: int, batch: Any) -> dict[str, Tensor]:
                progress.advance(task)
                batch = precision.convert_input(batch)
                moved = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                return batch_losses(trainer, module, moved, index)

            losses: list[Callable[[], dict[str, Tensor]]] = [
                functools.partial(loss, i, batch) for i, batch in enumerate(data)
            ]
            for name in waiting:
                calibrate(root, losses, name)
    finally:
        set_data_state(before, loaders)
    if trainer.world_size > 1:
        for name in waiting:
            whole = {key: value.detach().cpu() for key, value in adapter_state(root, name).items()}
            load_adapter_state(root, trainer.strategy.broadcast(whole), name)


def _training_data(trainer: L.Trainer, waiting: list[str]) -> Any:
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise AdapterError(
            f"PEFT: the start of {joined(waiting)} is measured on training data, and there is none. Give fit a "
            "train_dataloader."
        )
    loaders = source.dataloader()
    return loaders if not isinstance(loaders, list | tuple | dict) else L.pytorch.utilities.CombinedLoader(loaders)
