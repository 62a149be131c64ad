"""Runs every benchmark and prints one table: ours, HF PEFT's, the ratio, and the goal for it.

``python -m benchmarks twins`` runs those that are named.
"""

import sys

from rich.console import Console
from rich.table import Table

from benchmarks import (
    beside_peft,
    callback_overhead,
    checkpoint_size,
    ddp_step,
    diffusion_step,
    forward_backward,
    fused_step,
    import_time,
    injection_time,
    lines_per_method,
    many_adapters,
    packing,
    sampling_memory,
    spectral_start,
    twins,
)
from benchmarks.report import hardware
from benchmarks.row import Row


def main() -> None:
    """Measure, and print as the table that is kept in benchmarks/README.md."""
    small = (import_time, injection_time, forward_backward, callback_overhead)
    large = (
        fused_step,
        twins,
        beside_peft,
        diffusion_step,
        spectral_start,
        checkpoint_size,
        sampling_memory,
        ddp_step,
        packing,
        many_adapters,
        lines_per_method,
    )
    every = {benchmark.__name__.rpartition(".")[2]: benchmark for benchmark in (*small, *large)}
    asked = sys.argv[1:] or list(every)
    if unknown := [name for name in asked if name not in every]:
        sys.exit(f"There is no benchmark {unknown[0]!r}: {', '.join(every)}.")
    rows: list[Row] = [row for name in asked for row in every[name].run()]
    table = Table(title=hardware(), title_justify="left")
    for column in ("What", "Ours", "Beside it", "Ratio", "Goal"):
        table.add_column(column, justify="left" if column == "What" else "right")
    for row in rows:
        table.add_row(row.what, row.shown(row.ours), row.shown(row.beside), f"{row.ours / row.beside:.2f}", row.goal)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
