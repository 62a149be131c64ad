"""What becomes of each Triton kernel when it is compiled for accelerators that need not be there.

``python -m benchmarks.compiled`` prints, for every kernel and every configuration that is launched, the registers of a
thread, shared memory, and which instructions multiply; ``--markdown`` gives the widest of each kernel as a table.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs

from tests.kernels.ahead_of_time import SHARED_LIMIT, build
from tests.kernels.test_ahead_of_time import VARIANTS, name_of

COLUMNS = ("Kernel", "Target", "Registers", "Spilled bytes", "Shared bytes", "Products by")


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Compile all anew, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def rows() -> Iterator[tuple[Any, ...]]:
    """One for each kernel, configuration and target."""
    for case in track(VARIANTS, "compiling", console=Console(stderr=True)):
        _, (kernel, types, constants, options) = case
        for target in SHARED_LIMIT:
            built = build(kernel, types, constants, options, target)
            by = next((word for word in ("wgmma", "mma.sync", "v_mfma") if word in built.assembly), "")
            yield name_of(case), target, built.registers, built.spills, built.shared, by


def widest(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Of each kernel and target the configuration with the most registers."""
    best: dict[tuple[str, str], tuple[Any, ...]] = {}
    for row in found:
        key = (row[0].split("-")[0], row[1])
        if key not in best or row[2] > best[key][2]:
            best[key] = row
    return list(best.values())


def main() -> None:
    """Compile all of them."""
    with fresh_cache():
        found = list(rows())
    if "--markdown" in sys.argv:
        print("| " + " | ".join(COLUMNS) + " |\n| --- | --- | ---: | ---: | ---: | --- |")
        for row in widest(found):
            print("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in row) + " |")
        return
    table = Table()
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if 2 <= i <= 4 else "left")
    for row in found:
        table.add_row(*map(str, row))
    Console().print(table)


if __name__ == "__main__":
    main()
