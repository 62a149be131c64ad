"""Accuracy per trainable parameter: a ViT that knows upright digits 0 to 6, adapted with each vision method.

The task of ``make demo``: inverted, rotated pictures of all ten digits, with a new head that always trains. Each method
has its defaults, tries the same learning rates on the first seed, keeps the one that is best on the validation images,
and is measured on the test images with three seeds; a seed draws the head, the adapters and the order of the images.

``python -m benchmarks.digits_transfer`` measures, and writes benchmarks/results/digits_transfer.json, the picture and
the table of docs/vision.md; ``--plot`` draws from what is there; ``--methods VPT,LoRA`` replaces these lines.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import lightning as L
from tqdm import tqdm

from benchmarks.report import hardware, replace_between
from benchmarks.row import one_thread
from lightning_peft import PEFT, FullFineTuning, LinearProbe, LoRA, list_methods
from lightning_peft.callbacks.table import trainable_share
from lightning_peft.engine import Method
from lightning_peft.recipes import DigitsData, ImageClassifier

RESULTS, PICTURE, PAGE = (
    Path("benchmarks/results/digits_transfer.json"),
    Path("docs/images/digits_transfer.png"),
    Path("docs/vision.md"),
)
FAMILIES = ("features", "prompts", "side")
RATES, SEEDS, EPOCHS = (2e-3, 1e-2, 5e-2), (0, 1, 2), 12
MODEL: dict[str, Any] = {
    "model_name": "vit_tiny_patch16_224",
    "num_classes": 10,
    "model_kwargs": {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "checkpoint": "tutorials/checkpoints/vit_digits.safetensors",
    "weight_decay": 0.0,
}


def methods() -> dict[str, Method]:
    """Vision methods with their defaults and the head, and what they are compared with."""
    found = [row.cls for row in list_methods() if row.family in FAMILIES and "vision" in row.modalities]
    made = [cls(**_head(cls)) for cls in found]
    return {type(m).__name__: m for m in (LoRA(r=8, **_head(LoRA)), LinearProbe(), FullFineTuning(), *made)}


def _head(cls: type[Method]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {"modules_to_save": "output-head"} if "modules_to_save" in fields else {}


def fit(method: Method, seed: int, lr: float) -> tuple[float, float, int]:
    """Accuracy on validation and test images, and the trainable parameters."""
    L.seed_everything(seed, verbose=False)
    module, data = ImageClassifier(lr=lr, **MODEL), DigitsData(half="second", invert=True, rotate=90, batch_size=32)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options: dict[str, Any] = {**quiet, "accelerator": "cpu", "limit_val_batches": 0}
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[PEFT(method, summary=False)], **options)
    trainer.fit(module, data)
    (val,) = L.Trainer(**quiet, accelerator="cpu").validate(module, data, verbose=False)  # type: ignore[arg-type]
    (test,) = L.Trainer(**quiet, accelerator="cpu").test(module, data, verbose=False)  # type: ignore[arg-type]
    return val["val_acc"], test["test_acc"], trainable_share(module)[0]


def measure(name: str) -> dict[str, Any]:
    """All runs of one method."""
    method = methods()[name]
    tried = {lr: fit(method, SEEDS[0], lr) for lr in RATES}
    best = max(tried, key=lambda lr: tried[lr][0])
    runs = [tried[best], *(fit(method, seed, best) for seed in SEEDS[1:])]
    return {"trainable": runs[0][2], "rate": best, "scores": [100 * test for _, test, _ in runs]}


def markdown(results: dict[str, Any]) -> str:
    """The picture and the table."""
    head = results["rows"]["LinearProbe"]["trainable"]
    lines = [
        "![Accuracy against trainable parameters](images/digits_transfer.png)",
        "",
        f"{results['hardware']}; {EPOCHS} epochs of 20 steps, {len(SEEDS)} seeds, learning rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)}. The head's {head} parameters are not counted.",
        "",
        "| Method | Trained beside the head | Rate | Accuracy (lowest to highest of the seeds) |",
        "| --- | ---: | ---: | ---: |",
    ]
    rows = results["rows"]
    for name in sorted(rows, key=lambda name: -statistics.mean(rows[name]["scores"])):
        row = rows[name]
        scores = f"{statistics.mean(row['scores']):.1f} ({min(row['scores']):.1f} to {max(row['scores']):.1f})"
        lines.append(f"| {name} | {row['trainable'] - head:,} | {row['rate']:g} | {scores} |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """One row for each method, those that train least at the top; a bar spans the seeds, a dot is their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = {row.cls.__name__: row.family for row in list_methods()}
    head = results["rows"]["LinearProbe"]["trainable"]
    rows = sorted(results["rows"].items(), key=lambda item: item[1]["trainable"], reverse=True)
    colours = {family: f"C{i}" for i, family in enumerate(dict.fromkeys(families[name] for name, _ in rows))}
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.26 * len(rows)), layout="constrained")
    for y, (name, row) in enumerate(rows):
        colour = colours[families[name]]
        axes.plot([min(row["scores"]), max(row["scores"])], [y, y], color=colour, linewidth=2, alpha=0.5)
        axes.plot(statistics.mean(row["scores"]), y, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [f"{name}  {row['trainable'] - head:,}" for name, row in rows], fontsize=8)
    for family, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=family)
    axes.set(xlabel="accuracy on held-out images [%]", ylabel="method, and what it trains beside the head")
    axes.set_title("From upright digits 0-6 to inverted, rotated digits 0-9", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Measure what is asked for, two methods at a time, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", help="methods to measure, with commas between; all by default")
    parser.add_argument("--plot", action="store_true", help="draw from what is there")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    names = [] if options.plot else options.methods.split(",") if options.methods else list(methods())
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), one_thread) as pool:
        todo = {pool.submit(measure, name): name for name in names}
        for done in tqdm(as_completed(todo), total=len(todo), desc="methods"):
            results["rows"][todo[done]] = done.result()
            results["hardware"] = hardware()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    replace_between("accuracy", markdown(results), PAGE)


if __name__ == "__main__":
    main()
