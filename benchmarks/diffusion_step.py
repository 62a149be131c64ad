"""Time and memory of a training step of two denoisers with diffusion methods, and HF PEFT's same ones beside them.

A ``UNet2DConditionModel`` of 64, 128 and 256 channels with attention to text, and a ``DiTTransformer2DModel`` of six
blocks, 192 wide; both small, with random weights, in float32. A step is forward, backward and AdamW. Every method of
the family diffusion takes part with its defaults, and what is compared with it; one that asks for an input which these
models are not given is listed with what it says. LoRA, LoHa and LoKr act on all linear layers and convolutions, with
the same number of trained parameters here and in HF PEFT, or no figure is given. All sides take turns, on one thread.

``python -m benchmarks.diffusion_step`` measures, and writes benchmarks/results/diffusion_step.json, and table and
picture of docs/diffusion.md; ``--plot`` draws from what is there; ``--rounds 3`` is quicker and less sure.
"""

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import peft
import torch
from torch import Tensor, nn

from benchmarks.counted import PeakInside
from benchmarks.report import hardware, replace_between
from benchmarks.row import Row, alternate, saved_bytes
from lightning_peft import AdapterError, BitFit, DoRA, FullFineTuning, LoHa, LoKr, LoRA, inject, list_methods
from lightning_peft.callbacks.fused import fused
from lightning_peft.engine import Method

RESULTS, PICTURE, PAGE = (
    Path("benchmarks/results/diffusion_step.json"),
    Path("docs/images/diffusion_step.png"),
    Path("docs/diffusion.md"),
)
R, REFERENCE = 8, "HF PEFT LoRA"
# of losses in float32, where all methods start as the base
TOLERANCE = 1e-5

Loss = Callable[[nn.Module], Tensor]


def unet() -> tuple[nn.Module, Loss]:
    """Three levels, two of them with attention; batch 2, latents 4 x 32 x 32, 16 tokens of text."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    latents, times, text = torch.randn(2, 4, 32, 32), torch.tensor([10, 700]), torch.randn(2, 16, 128)
    noise = torch.randn_like(latents)
    given = {"encoder_hidden_states": text, "added_cond_kwargs": {"image_embeds": torch.randn(2, 1024)}}
    return model, lambda m: (m(latents, times, **given).sample - noise).square().mean()


def dit() -> tuple[nn.Module, Loss]:
    """Six blocks, 192 wide, ten classes; batch 4, latents 4 x 32 x 32 in patches of 2 x 2: 256 tokens."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=32,
        num_embeds_ada_norm=10,
    )
    for module in model.modules():
        if hasattr(module, "dropout_prob"):  # classes that are left out at random make another loss each time
            module.dropout_prob = 0.0
    latents, times, classes = torch.randn(4, 4, 32, 32), torch.tensor([10, 300, 600, 900]), torch.arange(4)
    noise = torch.randn_like(latents)
    return model, lambda m: (m(latents, times, class_labels=classes).sample - noise).square().mean()


MODELS: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {"UNet": unet, "DiT": dit}


class Side(NamedTuple):
    """A model that trains, what holds while it computes, and the line of HF PEFT's same method."""

    model: nn.Module
    within: Callable[[nn.Module], AbstractContextManager[Any]]
    same: str | None


def layers(model: nn.Module) -> tuple[str, ...]:
    """Names of all linear layers and convolutions that a low-rank product can change."""
    targets = LoRA(target_modules="all-layers").targets(model)
    return tuple(t.name for t in targets if t.site.kind in ("linear", "conv") and min(t.d_out, t.d_in) >= R)


def same_methods(names: tuple[str, ...]) -> dict[str, tuple[Method, Any]]:
    """Line -> the method here, and its configuration in HF PEFT."""
    here: dict[str, Any] = {"r": R, "target_modules": names}
    there: dict[str, Any] = {"r": R, "target_modules": list(names)}
    return {
        "LoRA": (LoRA(**here), peft.LoraConfig(**there)),
        "LoHa": (LoHa(**here), peft.LoHaConfig(**there)),
        "LoKr": (LoKr(**here), peft.LoKrConfig(**there)),
    }


def sides(base: nn.Module, loss: Loss) -> tuple[dict[str, Side], dict[str, str]]:
    """Line -> side, HF PEFT's first; and line -> why it has no figures."""
    found: dict[str, Side] = {}
    refused: dict[str, str] = {}
    names = layers(base)
    same = same_methods(names)
    for name, (_, config) in same.items():
        model = copy.deepcopy(base)
        peft.inject_adapter_in_model(config, model)
        found[f"HF PEFT {name}"] = Side(model.train(), nullcontext, None)
    # what trains is all that is compared: no head
    ours: dict[str, Callable[[], Method]] = {name: lambda method=pair[0]: method for name, pair in same.items()}
    ours |= {"DoRA": lambda: DoRA(r=R, target_modules=names), "BitFit": lambda: BitFit(modules_to_save=())}
    of_family = {row.cls.__name__: row.cls for row in list_methods() if row.family == "diffusion"}
    for name, make in (ours | of_family | {"FullFineTuning": FullFineTuning}).items():
        try:
            model = inject(copy.deepcopy(base), make()).train()
            loss(model)
        except AdapterError as error:
            if name not in of_family:
                raise
            refused[name] = str(error)
        else:
            found[name] = Side(model, fused, f"HF PEFT {name}" if name in same else None)
    return found, refused


def check(found: dict[str, Side], base: nn.Module, loss: Loss) -> None:
    """Both sides of a pair train as many numbers, and all start as the base, but those that say that they do not."""
    others = {row.cls.__name__ for row in list_methods() if not row.cls.identity_at_init}
    with torch.no_grad():
        expected = loss(base.train())
        for name, side in found.items():
            if name not in others and (loss(side.model) - expected).abs() > TOLERANCE * expected:
                raise RuntimeError(
                    f"{name} does not start as the base: its loss is {loss(side.model)}, not {expected}."
                )
    for name, side in found.items():
        if side.same is not None and trainable(side.model) != trainable(found[side.same].model):
            counts = f"{trainable(side.model):,} here and {trainable(found[side.same].model):,} in HF PEFT"
            raise RuntimeError(f"{name}: {counts} train. Give both the same layers and ranks.")


def trainable(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stepping(side: Side, loss: Loss) -> Callable[[], None]:
    """A step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in side.model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with side.within(side.model):
            loss(side.model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, rounds: int, only: tuple[str, ...] | None = None) -> dict[str, Any]:
    """All lines of one model, or those that are named, as rows of numbers; and who was refused."""
    base, loss = MODELS[name]()
    found, refused = sides(base, loss)
    if only is not None:
        found = {line: side for line, side in found.items() if line.removeprefix("HF PEFT ") in only}
    check(found, base, loss)
    rows: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    for line, side in found.items():
        own = [*side.model.parameters(), *side.model.buffers()]
        with side.within(side.model):
            kept = saved_bytes(lambda side=side: loss(side.model), own)  # type: ignore[misc]
        step = steps[line] = stepping(side, loss)
        with PeakInside() as peak:
            step(), step()  # in the second, the moments are there
        rows[line] = {"trainable": trainable(side.model), "kept": kept, "peak": peak.peak, "same": side.same}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for line, seconds in zip(steps, alternate(*steps.values(), rounds=rounds, repeats=1), strict=True):
        rows[line]["seconds"] = seconds
    torch.set_num_threads(threads)
    return {"rows": rows, "refused": refused, "parameters": sum(p.numel() for p in base.parameters())}


def markdown(results: dict[str, Any]) -> str:
    """The picture, and a table for each model."""
    parts = ["![Time and memory of a step](images/diffusion_step.png)"]
    parts.append(f"{results['hardware']}, one thread, {results['rounds']} rounds; {results['versions']}.")
    for model, found in results["models"].items():
        rows, reference = found["rows"], found["rows"][REFERENCE]
        parts.append(
            f"### {model}\n\n{found['parameters']:,} parameters; a step with {REFERENCE} takes "
            f"{reference['seconds']:.3f} s, and {reference['peak'] / 2**20:,.0f} MiB at its peak."
        )
        lines = [
            f"| Method | Trained | Time, of {REFERENCE}'s | Kept, of it | Peak, of it | Time, of HF PEFT's same method "
            "| Kept, of it | Peak, of it |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for line, row in rows.items():
            cells = [f"{row[key] / reference[key]:.2f}" for key in ("seconds", "kept", "peak")]
            cells += [
                f"{row[key] / rows[row['same']][key]:.2f}" if row["same"] else "" for key in ("seconds", "kept", "peak")
            ]
            lines.append(f"| {line} | {row['trainable']:,} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
        parts += [f"No figures for {line}: {why}" for line, why in found["refused"].items()]
    return "\n\n".join(parts)


def draw(results: dict[str, Any]) -> None:
    """A panel for each model: time and peak of each line, in those of HF PEFT's LoRA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = list(dict.fromkeys(line for found in results["models"].values() for line in found["rows"]))[::-1]
    figure, panels = plt.subplots(
        1,
        len(results["models"]),
        figsize=(10, 1.4 + 0.3 * len(lines)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (model, found) in zip(panels[0], results["models"].items(), strict=True):
        reference = found["rows"][REFERENCE]
        for offset, key, label, colour in (
            (0.2, "seconds", "time of a step", "C0"),
            (-0.2, "peak", "peak memory", "C7"),
        ):
            there = [(y, found["rows"][line]) for y, line in enumerate(lines) if line in found["rows"]]
            shares = [row[key] / reference[key] for _, row in there]
            axes.barh([y + offset for y, _ in there], shares, height=0.4, color=colour, label=label)
        axes.axvline(1, color="black", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(lines)), lines, fontsize=8)
        axes.set(xlabel=f"of {REFERENCE}'s", title=model)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.savefig(PICTURE, dpi=130)


def run() -> list[Row]:
    """LoRA, LoHa and LoKr on the UNet, beside HF PEFT's."""
    rows = measure("UNet", rounds=7, only=("LoRA", "LoHa", "LoKr"))["rows"]
    found = []
    for line, row in rows.items():
        if row["same"]:
            other = rows[row["same"]]
            what = f"a step of a UNet of diffusers with {line}; beside it HF PEFT's"
            found.append(Row(what, row["seconds"], other["seconds"], "s", ""))
            found.append(Row("peak bytes of it", row["peak"], other["peak"], "bytes", ""))
    return found


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", action="store_true", help="draw from what is there")
    parser.add_argument("--rounds", type=int, default=11, help="how often each side has its turn")
    options = parser.parse_args()
    if not options.plot:
        models = {name: measure(name, options.rounds) for name in MODELS}
        versions = f"diffusers {diffusers.__version__}, peft {peft.__version__}"
        results = {"models": models, "rounds": options.rounds, "hardware": hardware(), "versions": versions}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    draw(results)
    replace_between("steps", markdown(results), PAGE)


if __name__ == "__main__":
    main()
