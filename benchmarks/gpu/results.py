"""Where lines of the result are kept, one in JSON for each peer of a case, and the table that is made of them."""

import functools
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu.case import Line, Machine

# above what bfloat16 sums in another order differ by, below what a wrong formula does
TOLERANCE = 0.05
# of a step: the worst of some hundred gradients behind 16 layers in bfloat16, where HF PEFT itself is at 0.15
STEP_TOLERANCE = 0.25
COLUMNS = ("", "Forward", "/ floor", "Both", "/ floor", "Above inputs", "Saved", "Tokens/s", "Error", "Remark")
PACKAGES = ("triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "bitsandbytes")


def place(machine: Machine) -> Path:
    """The file for this GPU; what shows only that everything runs goes to where nothing is kept."""
    folder = "runs/bench-gpu" if machine.tiny else "benchmarks/results"
    return Path(folder, re.sub(r"[^a-z0-9]+", "-", device_name(machine).lower()).strip("-"), "kernels.jsonl")


def device_name(machine: Machine) -> str:
    """Of the GPU, or the processor's architecture."""
    return torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else platform.machine()


@functools.cache
def versions() -> dict[str, str | None]:
    """Of what takes part; None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "driver": _driver()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def begin(path: Path, points: Collection[int]) -> None:
    """Forget what is kept of these points, which are measured anew."""
    kept = [line for line in read(path) if line["point"] not in points]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def append(path: Path, line: Line) -> None:
    """Write a line at once: a run that is cut short has left what it measured."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Line]:
    """All lines of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(lines: list[Line]) -> Iterator[Table]:
    """For the terminal, one for each case."""
    for name, peers in _cases(lines):
        shown = Table(title=name, title_justify="left", title_style="bold")
        for i, column in enumerate(COLUMNS):
            shown.add_column(column, justify="left" if i in (0, len(COLUMNS) - 1) else "right", overflow="fold")
        for line in peers:
            shown.add_row(*map(escape, cells(line)))
        yield shown


def markdown(lines: list[Line]) -> str:
    """For a page."""
    parts = []
    for name, peers in _cases(lines):
        rows = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 2), "---"], *map(cells, peers)]
        parts.append(f"### {name}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def heading(lines: list[Line]) -> str:
    """The GPU, and the versions of what took part."""
    found = ", ".join(f"{name} {version}" for name, version in lines[-1]["versions"].items() if version)
    return f"{lines[-1]['device']}; {found}"


def cells(line: Line) -> list[str]:
    """One peer. What computes something else than it should, or has no gradient, gets no figures."""
    errors = [e for e in (line["output_error"], line["grad_error"]) if e is not None]
    tolerance = STEP_TOLERANCE if line["tokens"] else TOLERANCE
    wrong = any(not e <= tolerance for e in errors) or (line["grad_norm"] is not None and not line["grad_norm"] > 0)
    error = f"{max(errors):.1e}" if errors else ""
    if wrong or line["error"] or line["skipped"]:
        remark = line["error"] or line["skipped"] or f"wrong, gradient norm {line['grad_norm']}"
        return [line["peer"], *[""] * 7, error, remark.replace("|", "/")]
    both = statistics.mean(line["both"]) if line["both"] else None
    return [
        line["peer"],
        *_timed(line["forward"], line["forward_floor"]),
        *_timed(line["both"], line["both_floor"]),
        _size(line["peak_bytes"]),
        _size(line["saved_bytes"]),
        f"{line['tokens'] / both:,.0f}" if line["tokens"] and both else "",
        error,
        line["remark"],
    ]


def _cases(lines: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    for key in dict.fromkeys((line["point"], line["case"]) for line in sorted(lines, key=lambda line: line["point"])):
        yield f"{key[0]}. {key[1]}", [line for line in lines if (line["point"], line["case"]) == key]


def _timed(times: list[float], floor: float | None) -> tuple[str, str]:
    """Milliseconds with half the distance of the two measurements, and the ratio to the floor."""
    if not times:
        return "", ""
    mean, spread = statistics.mean(times), (max(times) - min(times)) / 2
    return f"{1e3 * mean:.3f} ± {1e3 * spread:.3f} ms", f"{mean / floor:.2f}" if floor else ""


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:,.1f} MiB"
