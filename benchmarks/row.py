"""One line of the result, and the ways to measure two things fairly."""

import gc
import logging
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """What was measured, ours and what it is compared with, in ``unit`` (s, us, bytes, lines, tokens), and the goal."""

    what: str
    ours: float
    beside: float
    unit: str
    goal: str

    def shown(self, value: float) -> str:
        """The value with its unit."""
        whole = self.unit in ("bytes", "us", "lines", "tokens")
        return f"{value:,.0f} {self.unit}" if whole else f"{value:.3f} {self.unit}"


def one_thread() -> None:
    """For a process of many small runs: one thread, and none of the hints that Lightning gives for them."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def alternate(*functions: Callable[[], object], rounds: int, repeats: int) -> list[float]:
    """Median seconds per call of each function; they take turns, so that a busy machine slows all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for measured, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            measured.append((time.perf_counter() - start) / repeats)
    return [statistics.median(measured) for measured in times]


class _Saved:
    """A tensor as long as somebody's backward pass needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def saved_bytes(compute: Callable[[], object], own: Iterable[Tensor]) -> int:
    """What the result of ``compute`` keeps for its backward pass, each storage once, less the storages of ``own``."""
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(t: Tensor) -> _Saved:
        kept.add(saved := _Saved(t))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = compute()
    gc.collect()  # what was saved for something that nobody kept
    # by the object, not by its address, which tensors without values do not have
    found = {s.tensor.untyped_storage()._cdata: s.tensor.untyped_storage().nbytes() for s in kept}
    beside = {t.untyped_storage()._cdata for t in own}
    del output
    return sum(n for storage, n in found.items() if storage not in beside)
