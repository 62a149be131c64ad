"""New looks of digits: denoisers that know upright digits 0 to 6, adapted by each method, judged by their pictures.

Three tasks: inverted pictures, thick strokes (both of the digits that the base knows), and upright digits 7 to 9, where
the pictures of 0 to 6 afterwards say what was forgotten. A judge (tutorials/judge.py) that has seen all looks tells in
which share of the pictures it sees the digit that was asked for, and the Frechet distance of its features between 140
pictures and the real ones of that look. Each method tries the same learning rates on the first task and seed, keeps
the one with the lowest error on validation images, and is measured with three seeds (the UNet with one); a seed draws
the adapters, the order of the images and all noise in training. LoRA and SaRA train the same number of parameters.
IPAdapter is shown real pictures, in training the one that it takes the noise off; SoftREPA trains by the denoising
loss, as all do.

``python -m benchmarks.digits_looks`` measures, and writes benchmarks/results/digits_looks.json, the picture and
the table of docs/diffusion.md; ``--plot`` draws from what is there; ``--models`` and ``--methods`` replace these
lines.
"""

import argparse
import base64
import json
import multiprocessing
import statistics
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.__main__ import hardware
from benchmarks.report import replace_between
from benchmarks.row import one_thread
from lightning_peft import (
    PEFT,
    BitFit,
    DiffFit,
    DiffuseKronA,
    DoRA,
    FullFineTuning,
    IPAdapter,
    LoHa,
    LoKr,
    LoRA,
    SaRA,
    SoftREPA,
)
from lightning_peft.callbacks import image_grid
from lightning_peft.callbacks.table import trainable_share
from lightning_peft.engine import Method
from lightning_peft.recipes import Denoiser, DigitsData
from tutorials.judge import LOOKS, Judge, pictures, quality

RESULTS, PICTURE, PAGE = (
    Path("benchmarks/results/digits_looks.json"),
    Path("docs/images/digits_looks.png"),
    Path("docs/diffusion.md"),
)
STEPS = 200
RATES = {"dit": (1e-3, 3e-3, 1e-2, 3e-2), "unet": (3e-3, 1e-2)}
SEEDS: dict[str, tuple[int, ...]] = {"dit": (0, 1, 2), "unet": (0,)}  # a step of the UNet takes four times as long
KNOWN, NEW = tuple(range(7)), (7, 8, 9)
MODELS = {"dit": "FlowMatchEulerDiscreteScheduler", "unet": "DDPMScheduler"}
TASKS = {"inverted": ("inverted", KNOWN), "thick": ("thick", KNOWN), "new digits": ("upright", NEW)}


class Prompted(Denoiser):
    """Shows the picture itself to the model, pixel by pixel."""

    def image_embeds(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def methods(model: str) -> dict[str, Method | None]:
    """Line -> method with its defaults; None is HF PEFT's LoRA. The last two need a model that looks at a text."""
    ours: list[Method] = [FullFineTuning(), LoRA(r=4), DoRA(r=4), LoHa(r=4), LoKr(r=4)]
    ours += [DiffuseKronA(), DiffFit(), SaRA(), BitFit()]
    ours += [IPAdapter(image_embed_dim=256), SoftREPA()] if model == "unet" else []
    return {"HF PEFT LoRA": None, **{type(method).__name__: method for method in ours}}


def denoiser(model: str, lr: float = 1e-3, kind: type[Denoiser] = Denoiser) -> Denoiser:
    """A fresh copy of the pre-trained base."""
    return kind(num_classes=10, pretrained=f"tutorials/checkpoints/{model}_digits", scheduler=MODELS[model], lr=lr)


def sized(method: Method, base: torch.nn.Module) -> Method:
    """SaRA with the share that trains as many parameters as LoRA does."""
    if not isinstance(method, SaRA):
        return method
    lora = LoRA(r=4)
    weights = sum(target.module.weight.numel() for target in method.targets(base))  # type: ignore[union-attr, operator]
    return SaRA(share=lora.total_trainable(lora.targets(base)) / weights)


def fit(model: str, task: str, name: str, seed: int, lr: float) -> tuple[Denoiser, float]:
    """The adapted model, and its error on validation images."""
    L.seed_everything(seed, verbose=False)
    look, digits = TASKS[task]
    method, callbacks = methods(model)[name], []
    module = denoiser(model, lr, Prompted if isinstance(method, IPAdapter) else Denoiser)
    if method is None:
        targets = [target.name.removeprefix("model.") for target in LoRA(r=4).targets(module)]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets), module.model)
    else:
        callbacks = [PEFT(sized(method, module), summary=False)]
    data = DigitsData(digits=digits, half="second", size=16, signed=True, batch_size=32, **LOOKS[look])  # type: ignore[arg-type]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options: dict[str, Any] = {**quiet, "accelerator": "cpu", "limit_val_batches": 0}
    L.Trainer(max_steps=STEPS, callbacks=callbacks, **options).fit(module, data)
    (val,) = L.Trainer(**quiet, accelerator="cpu").validate(module, data, verbose=False)  # type: ignore[arg-type]
    return module, val["val_loss"]


def judged(module: Denoiser, look: str, digits: tuple[int, ...]) -> tuple[float, float]:
    """Accuracy in percent and Frechet distance of its pictures of ``digits``, beside real ones of ``look``."""
    labels = [digit for digit in digits for _ in range(140 // len(digits))]
    real, classes = pictures(look, "second", digits)
    shown = torch.cat([real[classes == digit][: labels.count(digit)] for digit in digits])
    accuracy, distance = quality(
        Judge.trained(), module.sample(labels, images=shown, seed=100), torch.tensor(labels), real
    )
    return 100 * accuracy, distance


def measure(model: str, name: str) -> dict[str, Any]:
    """Task -> all runs of one method."""
    tried = {lr: fit(model, next(iter(TASKS)), name, SEEDS[model][0], lr)[1] for lr in RATES[model]}
    best = min(tried, key=lambda lr: tried[lr])
    rows: dict[str, Any] = {}
    for task in TASKS:
        runs = [fit(model, task, name, seed, best)[0] for seed in SEEDS[model]]
        row: dict[str, Any] = {"trainable": trainable_share(runs[0])[0], "rate": best}
        row["accuracy"], row["distance"] = zip(*(judged(run, *TASKS[task]) for run in runs), strict=True)
        if task == "new digits":
            known = [judged(run, "upright", KNOWN) for run in runs]
            row["known accuracy"], row["known distance"] = zip(*known, strict=True)
        look, digits = TASKS[task]
        real, classes = pictures(look, "second", digits)
        shown = torch.stack([real[classes == digit][-1] for digit in digits])
        row["pictures"] = _packed(runs[0].sample(digits, images=shown, seed=7))
        rows[task] = row
    return rows


def floors(model: str) -> dict[str, Any]:
    """What there is without training: the base itself, and real pictures of the other half of the data."""
    base, judge = denoiser(model), Judge.trained()
    rows: dict[str, Any] = {"the base, before": {}, "real pictures": {}}
    for task, (look, digits) in TASKS.items():
        accuracy, distance = judged(base, look, digits)
        rows["the base, before"][task] = {"accuracy": [accuracy], "distance": [distance]}
        (images, labels), (real, _) = pictures(look, "first", digits), pictures(look, "second", digits)
        accuracy, distance = quality(judge, images, labels, real)
        rows["real pictures"][task] = {"accuracy": [100 * accuracy], "distance": [distance]}
    accuracy, distance = judged(base, "upright", KNOWN)
    rows["the base, before"]["new digits"] |= {"known accuracy": [accuracy], "known distance": [distance]}
    return rows


def _packed(images: Tensor) -> str:
    bytes_ = ((images + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()
    return base64.b85encode(zlib.compress(bytes_, 9)).decode()


def _unpacked(text: str) -> Tensor:
    flat = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=torch.uint8)
    return flat.view(-1, 1, 16, 16) / 127.5 - 1


def markdown(results: dict[str, Any]) -> str:
    """The picture, and one table for each model."""
    lines = [
        "![Pictures of each method](images/digits_looks.png)",
        "",
        f"{results['hardware']}; {STEPS} steps of 32 images. Each cell: share of pictures in which the judge sees the "
        "digit that was asked for, and the Frechet distance to real ones (less is better; lowest to highest of the "
        "seeds).",
    ]
    for model, rows in results["models"].items():
        kind = type(denoiser(model).model).__name__
        rates = ", ".join(f"{rate:g}" for rate in RATES[model])
        lines += [
            "",
            f"**{kind}**; seeds: {len(SEEDS[model])}, learning rates: {rates}",
            "",
            f"| Method | Trained | {' | '.join(TASKS)} | 0 to 6, after new digits |",
        ]
        lines += ["| --- | ---: |" + " ---: |" * (len(TASKS) + 1)]
        for name, row in rows.items():
            trained = next((f"{r['trainable']:,}" for r in row.values() if "trainable" in r), "")
            cells = [_cell(row.get(task), "") for task in TASKS] + [_cell(row.get("new digits"), "known ")]
            lines.append(f"| {name} | {trained} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, of: str) -> str:
    if row is None or of + "accuracy" not in row:
        return ""
    accuracy, distance = statistics.mean(row[of + "accuracy"]), row[of + "distance"]
    spread = f" ({min(distance):.0f} to {max(distance):.0f})" if len(distance) > 1 else ""
    return f"{accuracy:.0f} %, {statistics.mean(distance):.0f}{spread}"


def draw(results: dict[str, Any]) -> None:
    """One row of pictures for each method and model, one column for each task; real pictures at the top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [(m, n, row) for m, rows in results["models"].items() for n, row in rows.items() if n in methods(m)]
    figure, axes = plt.subplots(
        len(lines) + 1, len(TASKS), figsize=(9, 0.5 * len(lines) + 0.9), layout="constrained", squeeze=False
    )
    for column, (task, (look, digits)) in enumerate(TASKS.items()):
        images, labels = pictures(look, "second", digits)
        real = torch.stack([images[labels == digit][0] for digit in digits])
        shown = [real, *(_unpacked(row[task]["pictures"]) for _, _, row in lines)]
        for axis, pixels in zip(axes[:, column], shown, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.imshow(image_grid(pixels, len(digits)).permute(1, 2, 0).numpy())
        axes[0, column].set_title(task, fontsize=10)
    for axis, (model, name) in zip(axes[:, 0], [("", "real"), *((m, n) for m, n, _ in lines)], strict=True):
        axis.set_ylabel(f"{name} {model}".strip(), rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measure what is asked for, some runs at a time, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="with commas between; all by default", default=",".join(MODELS))
    parser.add_argument("--methods", help="with commas between; all by default")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--plot", action="store_true", help="draw from what is there")
    options = parser.parse_args()
    one_thread()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    chosen = {model: methods(model) for model in options.models.split(",")}
    lines = [(m, n) for m, known in chosen.items() for n in (options.methods.split(",") if options.methods else known)]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), one_thread) as pool:
        todo = {} if options.plot else {pool.submit(measure, *line): line for line in lines}
        for done in tqdm(as_completed(todo), total=len(todo), desc="runs"):
            model, name = todo[done]
            results["models"].setdefault(model, {})[name] = done.result()
            results["hardware"] = hardware()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for model, rows in results["models"].items():
        order = [name for name in methods(model) if name in rows]
        results["models"][model] = floors(model) | {name: rows[name] for name in order}
    draw(results)
    replace_between("looks", markdown(results), PAGE)


if __name__ == "__main__":
    main()
