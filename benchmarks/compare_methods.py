"""Every method on two real tasks, with the same number of trainable parameters, the same steps and the same batches.

* **Parameters.** What LoRA of rank 8 trains on all linear layers is the budget. The size argument of each method (the
  rank, mostly) is the one that comes nearest to it without going over; methods without one run as they are.
* **Learning rate.** Each method tries the same rates, and keeps the one with the lowest loss on the validation split.
* **Everything else** is the default of the method, and the same for all: AdamW, a cosine, the steps, the batches, the
  learning rate of a head that is new.

``python -m benchmarks.compare_methods`` runs all and writes benchmarks/results/compare_methods.json, after each method
anew; ``--methods lora,dora`` replaces the results of these; ``--plot`` draws the picture and the table of the
documentation from what is there; ``--quick`` shows in a few minutes whether everything runs, and writes to ``runs``.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.comparison_report import write_report
from benchmarks.comparison_tasks import CACHE, TASKS, Batch, Split, Task, task
from benchmarks.report import hardware
from benchmarks.row import one_thread
from lightning_peft import PEFT, AdapterError, LoRA, get_method, inject, list_methods
from lightning_peft.engine import Method, TargetedMethod

RESULTS = Path("benchmarks/results/compare_methods.json")
LEFT_OUT = ("sampling",)  # methods of this family save memory: they train in turn what others train at once
ENDS = ("fullfinetuning", "linearprobe")
RATES = (1e-4, 1e-3, 1e-2)
BUDGET = LoRA(r=8)
# without it there is nothing to train where no layer has a bias, as in Llama
NEEDED: dict[str, dict[str, Any]] = {"bitfit": {"create_missing": True}}


class Settings(NamedTuple):
    """How much is run."""

    epochs: int = 4
    steps: int = 15  # in an epoch
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = RATES
    held_out: int | None = None  # batches of a split to look at


QUICK = Settings(epochs=2, steps=3, seeds=(0, 1), rates=RATES[1:], held_out=3)


class Batches(L.LightningDataModule):
    """Other batches in each epoch."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        super().__init__()
        self.batches, self.steps = batches, steps

    def train_dataloader(self) -> DataLoader[Batch]:
        """Those of the epoch that begins."""
        first = self.trainer.current_epoch * self.steps  # type: ignore[union-attr]
        return DataLoader(self.batches[first : first + self.steps], batch_size=None)  # type: ignore[arg-type]


class LastLosses(L.Callback):
    """The training loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Remember it."""
        self.losses.append(float(outputs["loss"]))

    def mean(self) -> float:
        """Of the last sixth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 6) :]
        return sum(last) / len(last)


def fit(name: str, method: Method, seed: int, lr: float, settings: Settings) -> tuple[L.LightningModule, float]:
    """Adapt the model of a task with a method, as a user would; returns it and its last training loss."""
    todo = task(name)
    module, losses = todo.module(seed, lr), LastLosses()
    batches = todo.batches(seed, settings.epochs * settings.steps)
    trainer = L.Trainer(
        **_quiet(),
        max_epochs=settings.epochs,
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[PEFT(method, summary=False), losses],
    )
    trainer.fit(module, Batches(batches, settings.steps))
    return module, losses.mean()


def measure(name: str, module: L.LightningModule, split: Split, settings: Settings) -> dict[str, float]:
    """What the module logs on a split."""
    batches = task(name).held_out(split)[: settings.held_out]
    (metrics,) = L.Trainer(**_quiet()).test(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return metrics  # type: ignore[return-value]


def compare(name: str, method_name: str, settings: Settings) -> dict[str, Any]:
    """All runs of one method on one task; what went wrong, if it cannot be run."""
    start, todo = time.perf_counter(), task(name)
    try:
        method, size = fitted(get_method(method_name), todo)
        validation, runs = {}, {}
        for lr in settings.rates:
            runs[lr] = fit(name, method, settings.seeds[0], lr, settings)
            loss = measure(name, runs[lr][0], "val", settings)["test_loss"]
            validation[lr] = loss if math.isfinite(loss) else 1e9
        best = min(validation, key=lambda lr: validation[lr])
        chosen = [runs[best], *(fit(name, method, seed, best, settings) for seed in settings.seeds[1:])]
        return {
            "method": repr(method),
            "size": size,
            "trainable": trainable(todo, method),
            "rate": best,
            "validation": {str(lr): value for lr, value in validation.items()},
            "scores": [todo.score(measure(name, module, "test", settings)) for module, _ in chosen],
            "losses": [loss for _, loss in chosen],
            "seconds": round(time.perf_counter() - start, 1),
        }
    except Exception as error:  # a method that cannot be run here must not end the comparison: it is shown
        return {"error": f"{type(error).__name__}: {error}"}


def fitted(cls: type[Method], todo: Task) -> tuple[Method, dict[str, int]]:
    """The method with the size that is nearest to the budget but not over it, and its size argument, if it has one.

    The size argument is the whole number on which the count depends, ``r`` before others.
    """
    model, budget = _meta(todo), trainable(todo, BUDGET)
    fixed = dict(NEEDED.get(cls.name, {}))
    if issubclass(cls, TargetedMethod):
        fixed["modules_to_save"] = todo.head  # what is new trains with every method, and nothing else does
    method = cls(**fixed)
    targets = method.targets(model)
    numbers = [f.name for f in dataclasses.fields(cls) if type(f.default) is int]  # type: ignore[arg-type]
    for field in sorted(numbers, key=lambda field: field != "r"):
        counts = {}
        for value in _candidates(field, budget, max((min(t.d_in, t.d_out) for t in targets), default=1)):
            try:
                candidate = cls(**fixed, **{field: value})
                counts[value] = sum(candidate.num_trainable(target) for target in targets)
            except AdapterError:
                continue
        if len(set(counts.values())) > 1:
            # nearest below the budget first, then nearest above it
            order = sorted(counts, key=lambda value: (counts[value] > budget, abs(budget - counts[value]), value))
            for value in order:
                candidate = cls(**fixed, **{field: value})
                try:
                    trainable(todo, candidate)
                except AdapterError:  # more than a layer can use
                    continue
                return candidate, {field: value}
    return method, {}


def _candidates(field: str, budget: int, widest: int) -> list[int]:
    """Every rank that some layer can use; of other sizes every small one, and larger ones in steps of two percent."""
    if field == "r":
        return list(range(1, widest + 1))
    larger = (round(64 * 1.02**k) for k in range(1000))
    return [*range(1, 64), *dict.fromkeys(value for value in larger if value <= budget)]


def trainable(todo: Task, method: Method) -> int:
    """Trainable parameters of a method on the model of a task, less those that are new."""
    if isinstance(method, TargetedMethod):
        method = dataclasses.replace(method, modules_to_save=todo.head)
    try:
        model = inject(_meta(todo), method)
    except AdapterError:  # perhaps for want of values, which some methods look at
        model = inject(deepcopy(todo.module(0, RATES[0])), method)
    new = sum(p.numel() for head in todo.head for p in model.get_submodule(head).parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - new


def _meta(todo: Task) -> nn.Module:
    """The model of a task, without values."""
    return deepcopy(todo.module(0, RATES[0])).to("meta")


def _before(name: str, settings: Settings) -> float:
    """The score of the model as it comes."""
    return task(name).score(measure(name, task(name).module(0, 0.0), "test", settings))


def _quiet() -> dict[str, Any]:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return {"accelerator": "cpu", **dict.fromkeys(off, False)}


def run(names: list[str], settings: Settings, file: Path, processes: int) -> dict[str, Any]:
    """Compare these methods on both tasks, keep what is in ``file`` of others, and write it after each one."""
    results = json.loads(file.read_text()) if file.exists() else {"tasks": {name: {} for name in TASKS}}
    results |= {"hardware": hardware(), "settings": settings._asdict()}
    results["budget"] = {name: trainable(task(name), BUDGET) for name in TASKS}
    results["before"] = {"topics": _before("topics", settings)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), one_thread) as pool,
        tqdm(total=len(names) * len(TASKS), unit="run") as bar,
    ):
        jobs = {pool.submit(compare, on, name, settings): (on, name) for name in names for on in TASKS}
        for job in as_completed(jobs):
            on, name = jobs[job]
            results["tasks"][on][name] = job.result()
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            temporary.replace(file)
            bar.set_postfix_str(f"{name} on {on}")
            bar.update()
    return results


def show(results: dict[str, Any], names: list[str]) -> None:
    """Print what came of these methods."""
    table = Table(title=results["hardware"], title_justify="left")
    table.add_column("Method")
    for column in ("Trainable", "Size", "Rate", "Score", "Loss", "Seconds"):
        table.add_column(column, justify="right")
    for on, methods in results["tasks"].items():
        table.add_section()
        table.add_row(f"{on}: {TASKS[on].score_name}", f"{results['budget'][on]:,}", style="bold")
        for name in names:
            row = methods.get(name, {"error": "not run"})
            if "error" in row:
                table.add_row(name, "", "", "", row["error"][:60])
                continue
            size = ", ".join(f"{key}={value}" for key, value in row["size"].items())
            means = [f"{sum(row[key]) / len(row[key]):.3f}" for key in ("scores", "losses")]
            table.add_row(name, f"{row['trainable']:,}", size, f"{row['rate']:g}", *means, f"{row['seconds']:.0f}")
    Console(width=120).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_methods", description="Compare the methods.")
    parser.add_argument("--methods", help="registry names, separated by commas; all by default")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that everything runs")
    parser.add_argument("--plot", action="store_true", help="run nothing: draw the picture, write the table")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="of one thread each")
    args = parser.parse_args()
    file = CACHE / "quick.json" if args.quick else RESULTS
    if args.plot:
        write_report(json.loads(file.read_text()), Path("runs/compare_methods" if args.quick else "docs"))
        return
    everything = [row.name for row in list_methods() if row.family not in LEFT_OUT]
    names = [get_method(name).name for name in args.methods.split(",")] if args.methods else everything
    names.sort(key=lambda name: name not in ENDS)  # what takes longest comes first, so that no core waits at the end
    one_thread()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    start = time.perf_counter()
    results = run(names, QUICK if args.quick else Settings(), file, args.processes)
    show(results, names)
    failed = [f"{name} on {on}" for on in TASKS for name in names if "error" in results["tasks"][on][name]]
    print(f"{time.perf_counter() - start:.0f} s, written to {file}; not run: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
