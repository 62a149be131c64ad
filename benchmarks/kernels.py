"""Our operations beside others on one NVIDIA GPU: time, memory, distance from the floor, and whether they are right.

``python -m benchmarks.kernels`` measures all points; ``--part 1`` those of losses and linear layers, ``--part 2`` the
others, each in less than eight minutes: what has no time left is listed as such. Lines are written to
``benchmarks/results/<GPU>/kernels.jsonl`` as they are found. ``--table`` and ``--markdown`` show what such files hold.
``--tiny --device cpu`` runs every point in sizes that any machine can do, to see that the code works.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu import results
from benchmarks.gpu.case import Case, Line, Machine
from benchmarks.gpu.ceilings import Ceilings, ceilings
from benchmarks.gpu.measured import blank, guarded, measured

PARTS = {1: (1, 2, 3, 4, 5), 2: (6, 7, 8, 9)}
SECONDS = 440  # of a part; the rest of eight minutes is for imports and for what is under way then

Makers = dict[int, list[Callable[[], Case]]]


def makers(machine: Machine) -> Makers:
    """What makes the cases of each point, from the files that know them."""
    from benchmarks.gpu import dora, four_bits, linears, losses, rows, segments, steps

    found: Makers = {}
    for module in (losses, linears, rows, dora, four_bits, segments, steps):
        for point, made in module.points(machine).items():
            found[point] = [*found.get(point, []), *made]
    return found


def run(machine: Machine, points: tuple[int, ...], made: Makers, seconds: float = SECONDS) -> Iterator[Line]:
    """Measure the ceilings, and each case of these points; a case that fails becomes a line that says so."""
    deadline = time.monotonic() + seconds
    about = {"device": results.device_name(machine), "versions": results.versions()}
    ceiling, line = None, blank(1, "ceilings", "torch")
    with guarded(line):
        ceiling = ceilings(machine)
        line["remark"] = str(ceiling)
    about["ceilings"] = ceiling and ceiling._asdict()
    yield line | about
    for point in points:
        for make in made.get(point, []):
            for line in _tried(point, make, machine, ceiling, deadline):
                yield line | about
            _clear(machine)


def _tried(
    point: int, make: Callable[[], Case], machine: Machine, ceiling: Ceilings | None, deadline: float
) -> list[Line]:
    failed = blank(point, _described(make))
    if time.monotonic() > deadline:
        return [failed | {"skipped": "out of time"}]
    with guarded(failed):
        torch.manual_seed(0)
        case = make()
        failed["case"] = case.name
        return measured(point, case, machine, ceiling, deadline)
    return [failed]


def _described(make: Callable[[], Case]) -> str:
    """The function and its arguments, while there is no case that has a name."""
    if not isinstance(make, partial):
        return make.__name__
    options = (f"{key}={value}" for key, value in make.keywords.items())
    return " ".join([make.func.__name__, *map(str, make.args[1:]), *options])


def _clear(machine: Machine) -> None:
    """Nothing of a case is left for the next: no memory, and no compiled sizes."""
    torch.compiler.reset()
    if machine.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    """Measure, write and show; or show what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--part", type=int, choices=PARTS, help="1 or 2; both, if it is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for --tiny alone")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--table", action="store_true", help="show what was measured before")
    parser.add_argument("--markdown", action="store_true", help="the same, as it stands in a page")
    asked = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if asked.table or asked.markdown:
        paths = sorted(Path("benchmarks/results").glob("*/kernels.jsonl"))
        for path in paths:
            _show(console, path, asked.markdown)
        if not paths:
            sys.exit("benchmarks.kernels: no benchmarks/results/*/kernels.jsonl. Run make bench-gpu on a GPU first.")
        return
    _check(asked.device, asked.tiny)
    machine = Machine(torch.device(asked.device), asked.tiny)
    path, made = results.place(machine), makers(machine)
    for part in [asked.part] if asked.part else PARTS:
        results.begin(path, {1, *PARTS[part]})
        for line in run(machine, PARTS[part], made):
            results.append(path, line)
            console.print(" | ".join(filter(None, [line["case"], *results.cells(line)])), highlight=False, markup=False)
    _show(console, path, as_markdown=False)
    console.print(f"Written to {path}.")


def _check(device: str, tiny: bool) -> None:
    if device == "cpu" and not tiny:
        sys.exit("benchmarks.kernels: --device cpu needs --tiny: the sizes are those of a GPU.")
    if device == "cuda" and (not torch.cuda.is_available() or torch.version.hip):
        sys.exit(
            "benchmarks.kernels needs an NVIDIA GPU, and PyTorch finds none here: nothing was measured. To see that "
            "the code runs, without any figure: python -m benchmarks.kernels --tiny --device cpu."
        )


def _show(console: Console, path: Path, as_markdown: bool) -> None:
    lines = results.read(path)
    if as_markdown:
        print(f"{results.heading(lines)}\n\n{results.markdown(lines)}\n")
    else:
        console.print(f"[bold]{results.heading(lines)}[/bold]", highlight=False)
        console.print(*results.tables(lines), sep="\n")


if __name__ == "__main__":
    main()
