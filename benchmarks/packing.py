"""Padding in the training batches of the functions of the standard library: packed, and beside it padded.

Functions are cut at 512 bytes, a token is a byte. Counts depend on the version of Python alone.

``python -m benchmarks.packing`` prints other batch sizes too.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.row import Row
from lightning_peft.recipes import PackedData, SourceFunctionsData

LENGTH = 512


def tokens(loader: Any) -> tuple[int, int]:
    """Over an epoch, of all rows, padding included; and of these, those of a row that is filled up to 512."""
    shapes = [batch["input_ids"].shape for batch in loader]
    return sum(shape.numel() for shape in shapes), sum(shape[0] * LENGTH for shape in shapes)


def measured(batch_size: int) -> tuple[int, int, int, int]:
    """Tokens of the functions; in rows filled up to 512; to the longest of a batch; packed."""
    data = SourceFunctionsData(max_length=LENGTH, batch_size=batch_size)
    data.setup()
    own = sum(len(sample["input_ids"]) for sample in data.splits["train"])
    longest, filled = tokens(data.train_dataloader())
    packed, _ = tokens(PackedData(data, max_length=LENGTH, attention="positions").train_dataloader())
    return own, filled, longest, packed


def run() -> list[Row]:
    """Batches of 32."""
    _, _, longest, packed = measured(32)
    what = (
        f"tokens of an epoch over the functions of the standard library, packed in rows of {LENGTH}; beside it padded"
    )
    return [Row(what, packed, longest, "tokens", "at most 0.65")]


def main() -> None:
    """The share of padding, for each batch size."""
    table = Table(title=f"Padding, functions of the standard library cut at {LENGTH} bytes", title_justify="left")
    for column in ("Batch size", f"filled to {LENGTH}", "to the longest", "packed", "tokens packed / to the longest"):
        table.add_column(column, justify="right")
    for batch_size in (4, 8, 16, 32, 64, 128):
        own, filled, longest, packed = measured(batch_size)
        shares = [f"{1 - own / total:.1%}" for total in (filled, longest, packed)]
        table.add_row(str(batch_size), *shares, f"{packed / longest:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
