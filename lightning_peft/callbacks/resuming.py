"""Going on in the middle of an epoch as if nothing had happened: the same batches, the same random numbers.

Lightning restarts a plain ``DataLoader`` at its first batch, and stores no random state. So a checkpoint keeps two
states of the generators: that before the Trainer went to the data of the epoch, from which its order follows, and that
at the time of saving, from which dropout follows. Generators that a loader or its sampler owns belong to both.
"""

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_peft.callbacks.instance_hooks import instead

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


def data_state(loaders: Iterable[Any]) -> State:
    """`random_state`, and the generators that belong to these loaders."""
    return random_state() | {"own": [g.get_state() for loader in loaders for g in _own_generators(loader)]}


def set_data_state(state: State, loaders: Iterable[Any]) -> None:
    """The inverse of `data_state`."""
    set_random_state(state)
    generators = [g for loader in loaders for g in _own_generators(loader)]
    for generator, own in zip(generators, state.get("own", ()), strict=False):
        generator.set_state(own)


def _own_generators(loader: Any) -> list[torch.Generator]:
    """Of the loader, and of what it samples with; each once."""
    batches = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


class Place:
    """Where a run is in its data and in its random numbers; told by the callback, under the names of its events."""

    def __init__(self) -> None:
        self.before_data: State | None = None  # of the epoch that has begun
        self._before_next: State | None = None  # of the epoch that will begin
        self._stored: State | None = None  # the state at the time of saving, of a run that goes on
        self._loaders: list[Any] = []
        self._handed_over: list[tuple[Any, State]] = []  # loaders, and the state before Lightning goes to them

    def state_dict(self) -> dict[str, State]:
        """Both states; nothing before the first epoch has begun."""
        if self.before_data is None:
            return {}
        return {"before_data": self.before_data, "now": data_state(self._loaders)}

    def load_state_dict(self, state: dict[str, State]) -> None:
        """The inverse."""
        self.before_data, self._stored = state.get("before_data"), state.get("now")

    def setup(self, trainer: L.Trainer) -> None:
        """Watch how loaders are handed over: for the first epoch that is as soon as somebody asks for its length."""

        def watched(strategy: Any, process: Callable[[Any], Any], loader: Any) -> Any:
            loader = process(loader)
            self._handed_over.append((loader, data_state([loader])))
            return loader

        instead(trainer.strategy, "process_dataloader", watched, once=lambda strategy: False, what=self)

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Go on, if there was a checkpoint."""
        self._loaders = _loaders(trainer)
        if self._stored is not None and self.before_data is not None:
            begun = _pass_over(trainer, self.before_data, self._stored)
            self._before_next, self._stored = None if begun else self._stored, None
        else:
            last = {id(loader): state for loader, state in self._handed_over}
            states = [last[id(loader)] for loader in self._loaders if id(loader) in last]
            own = [generator for state in states for generator in state["own"]]
            self._before_next = states[0] | {"own": own} if states else None

    def on_train_epoch_start(self, trainer: L.Trainer) -> None:
        """Not called for the rest of an epoch in which a run goes on."""
        self._loaders = _loaders(trainer)
        self._handed_over.clear()
        self.before_data, self._before_next = self._before_next or data_state(self._loaders), None


def _loaders(trainer: L.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


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
        set_data_state(before_data if done else now, loader.flattened)
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
        set_data_state(now, loader.flattened)
    return done
