"""One line of the result, and the ways to measure two things fairly."""

import statistics
import time
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


def saved_bytes(compute: Callable[[], object], own: Iterable[Tensor]) -> int:
    """What ``compute`` saves for its backward pass, each storage once, less the storages of ``own``."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = compute()  # alive until all is counted: a storage that is freed may be used again
    beside = {t.untyped_storage().data_ptr() for t in own}
    del output
    return sum(n for storage, n in found.items() if storage not in beside)
