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


class Place:
    """Where a run is in its data and in its random numbers; told by the callback, under the names of its events."""

    def __init__(self) -> None:
        self.before_data: State | None = None  # of the epoch that has begun
        self._before_next: State | None = None  # of the epoch that will begin
        self._stored: State | None = None  # the state at the time of saving, of a run that goes on

    def state_dict(self) -> dict[str, State]:
        """Both states; nothing before the first epoch has begun."""
        return {} if self.before_data is None else {"before_data": self.before_data, "now": random_state()}

    def load_state_dict(self, state: dict[str, State]) -> None:
        """The inverse."""
        self.before_data, self._stored = state.get("before_data"), state.get("now")

    def on_fit_start(self) -> None:
        """The data of the first epoch is set up next."""
        self._before_next = random_state()

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Go on, if there was a checkpoint."""
        if self._stored is not None and self.before_data is not None:
            begun = _pass_over(trainer, self.before_data, self._stored)
            self._before_next, self._stored = None if begun else self._stored, None

    def on_train_epoch_start(self) -> None:
        """Not called for the rest of an epoch in which a run goes on."""
        self.before_data, self._before_next = self._before_next or random_state(), None


def _pass_over(trainer: L.Trainer, before_data: State, now: State) -> int:
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
