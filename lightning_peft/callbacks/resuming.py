"""Going on in the middle of an epoch as if nothing had happened: the same batches, the same random numbers.

Lightning restarts a plain ``DataLoader`` at its first batch, and stores no random state. So a checkpoint keeps two
states of the generators: that before the data of the epoch was set up, from which its order follows, and that at the
time of saving, from which dropout follows.
"""

import random
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities.model_helpers import is_overridden

State = dict[str, Any]


def random_state() -> State:
    """The generators of torch, of Python and, where it is used, of CUDA; in primitives and tensors."""
    version, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(words), gauss]}


def set_random_state(state: State) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def go_on(trainer: L.Trainer, before_data: State, now: State) -> int:
    """Before the epoch in which a run goes on: pass over the batches that were trained on before; return how many.

    Data that keeps a state of its own (a loader, or a datamodule, with ``state_dict``) is left to itself. With several
    devices each has random numbers of its own, of which a checkpoint holds one: there they are not set.
    """
    fit = trainer.fit_loop
    loader, fetcher = fit._combined_loader, fit._data_fetcher
    if loader is None or fetcher is None:
        return 0
    done: int = fit.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    done = 0 if done >= trainer.num_training_batches else done
    alone = trainer.world_size == 1
    if alone:
        set_random_state(before_data if done else now)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not (loader._state_dicts() or (datamodule is not None and is_overridden("state_dict", datamodule))):
        for one in loader.flattened:
            _set_sampler_epoch(one, trainer.current_epoch)
        iter(fetcher)  # again: it draws random numbers
        for _ in range(done):
            next(fetcher)
        fetcher.fetched -= done  # Lightning adds them by itself
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    if alone and done:
        set_random_state(now)
    return done
