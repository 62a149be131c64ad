"""One line of the result, and the way to time two things fairly."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


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
