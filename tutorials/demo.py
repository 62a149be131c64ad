"""The demo: one pre-trained vision transformer, five ways to adapt it to digits it has never seen.

Each run is the real command line, ``lightning-peft fit --config tutorials/configs/digits.yaml ...``; the adapters are
then loaded again in a fresh process and must score the same. Run from the top of the repository.
"""

import contextlib
import io
import json
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from lightning_peft import disabled
from lightning_peft.callbacks.table import show, trainable_share
from lightning_peft.cli import lightning_cli

CONFIG = "tutorials/configs/digits.yaml"
FOLDER = Path("runs/demo")
METHODS = {
    "linear probe": ["LinearProbe", "--model.lr=0.1"],
    "BitFit": ["BitFit", "--model.lr=0.03"],
    "LoRA": ["LoRA", "--trainer.callbacks.method.r=8", "--model.lr=0.005"],
    "SSF": ["SSF", "--model.lr=0.02"],
    "full fine-tuning": ["FullFineTuning", "--model.lr=0.002"],
}


def arguments(name: str) -> list[str]:
    """What is typed after ``lightning-peft fit`` for this method."""
    method, *options = METHODS[name]
    return ["--config", CONFIG, f"--trainer.callbacks.method={method}", *options]


def adapter_folder(name: str) -> str:
    """Where the adapter of this method goes."""
    return str(FOLDER / name.replace(" ", "_"))


def accuracy(cli: Any) -> float:
    """Share of the held-out images that the model of ``cli`` gets right."""
    with contextlib.redirect_stdout(io.StringIO()):  # Lightning prints a table of its own here
        return cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]["test_acc"]


def adapt(name: str) -> dict[str, Any]:
    """Fit with one method; returns the row of the table."""
    command = ["fit", *arguments(name), f"--trainer.callbacks.save_to={adapter_folder(name)}"]
    Console().print(f"\n[bold]lightning-peft {' '.join(command)}", highlight=False)
    start = time.perf_counter()
    cli = lightning_cli(command)
    seconds = time.perf_counter() - start
    trainable, total = trainable_share(cli.model)
    row = {"trainable": trainable, "total": total, "seconds": seconds, "after": accuracy(cli)}
    if name == "linear probe":
        with disabled(cli.model):
            row["before"] = accuracy(cli)
    row["bytes"] = sum(file.stat().st_size for file in Path(adapter_folder(name)).iterdir())
    return row


def check() -> None:
    """In a fresh process: load each adapter into a fresh base, and print its accuracy."""
    scores = {}
    for name in METHODS:
        args = [*arguments(name), f"--trainer.callbacks.init_from={adapter_folder(name)}"]
        scores[name] = accuracy(lightning_cli(args, run=False))
    print(json.dumps(scores))


def prepare() -> None:
    """Leave the progress bars and tables without the hints around them; one thread, for so small a model."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def picture(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against trainable parameters."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in rows.items():
        axes.scatter(row["trainable"], 100 * row["after"], s=70)
        axes.annotate(name, (row["trainable"], 100 * row["after"]), textcoords="offset points", xytext=(8, -4))
    before = next(row["before"] for row in rows.values() if "before" in row)
    axes.axhline(100 * before, color="gray", linestyle="--", linewidth=1)
    axes.text(0.01, 100 * before + 1.5, "before, with a fresh head", transform=axes.get_yaxis_transform(), color="gray")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy on held-out images [%]", ylim=(0, 102))
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    axes.set_title("From upright digits 0-6 to inverted, rotated digits 0-9")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Adapt with every method, check the files, and show what came of it."""
    rows = {name: adapt(name) for name in METHODS}
    before = rows["linear probe"]["before"]
    console = Console()
    console.print("\nLoading the adapters again in a fresh process ...")
    run = subprocess.run([sys.executable, __file__, "--check"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    again = json.loads(run.stdout.splitlines()[-1])
    table = Table(title="From upright digits 0-6 to inverted, rotated digits 0-9", title_justify="left")
    table.add_column("Method")
    for column in ("Trainable", "%", "Before", "After", "Reloaded", "Seconds", "Adapter KiB"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['trainable']:,}",
            f"{100 * row['trainable'] / row['total']:.1f}",
            f"{100 * before:.1f}",
            f"{100 * row['after']:.1f}",
            f"{100 * again[name]:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['bytes'] / 1024:.0f}",
        )
    show(table)
    different = [name for name, row in rows.items() if row["after"] != again[name]]
    if different:
        sys.exit(f"the reloaded adapters of {', '.join(different)} do not score the same")
    console.print("All five adapters were loaded again in a fresh process and score exactly the same.")
    path = FOLDER / "accuracy.png"
    picture(rows, path)
    console.print(f"The picture: {path}")


if __name__ == "__main__":
    prepare()
    check() if "--check" in sys.argv else main()
