"""Memory of a training step of Stable Diffusion 1.5's UNet: SaRA beside LoRA of as many numbers, and all weights.

``UNet2DConditionModel`` in its size, 860 M random weights in float32; latents 4 x 64 x 64, 77 tokens, batch 4.

* *Kept*: bytes that the forward keeps for the backward pass, each storage once, parameters and buffers left out.
* *Peak of a step*: bytes of all tensors that a step of AdamW holds at a time, beyond the model and the batch.
* *Gradients*: the most bytes that live at a time in the backward pass without activations: gradients of what trains,
  and what is made of weights, gradients and places on the way, inside of our operations too. A batch of none leaves
  nothing else.
* *Places*: bytes of the index tensors, which are a part of the adapter.

The first two are counted on tensors without values (torch's ``FakeTensorMode``), the third on those with values: which
entries train depends on them. Nothing depends on the machine; SaRA's own count does on the random weights.

``python -m benchmarks.diffusion_memory`` counts (8 GB of memory, some minutes), and writes
benchmarks/results/diffusion_memory.json, and table and picture of docs/diffusion.md; ``--plot`` draws from what is
there.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.counted import PeakInside, step_bytes
from benchmarks.report import replace_between
from lightning_peft import FullFineTuning, LoRA, SaRA, inject
from lightning_peft.engine import Method

RESULTS, PICTURE, PAGE = (
    Path("benchmarks/results/diffusion_memory.json"),
    Path("docs/images/diffusion_memory.png"),
    Path("docs/diffusion.md"),
)
BATCH, RANKS = 4, (4, 16, 64)


def unet() -> nn.Module:
    """With the sizes of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(cross_attention_dim=768).train()


def methods(model: nn.Module) -> dict[str, Method]:
    """Line -> method. SaRA's share is what trains as many numbers as LoRA."""
    found: dict[str, Method] = {}
    for r in RANKS:
        lora = LoRA(r=r, target_modules="all-layers", clip_rank=True)  # four channels leave the model
        targets = lora.targets(model)
        share = lora.total_trainable(targets) / sum(target.shape.numel() for target in targets)
        found |= {f"LoRA r={r}": lora, f"SaRA like r={r}": SaRA(share=share)}
    return found | {"SaRA share=0.2": SaRA(), "full fine-tuning": FullFineTuning()}


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times, and what a text encoder answers."""
    return torch.randn(size, 4, 64, 64), torch.randint(1000, (size,)), torch.randn(size, 77, 768)


def loss(model: Any, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Of no noise in particular."""
    latents, times, text = given
    return model(latents, times, encoder_hidden_states=text).sample.square().sum()


def gradient_bytes(model: Any) -> int:
    """The most that live at a time in the backward pass of a batch of none."""
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())  # the other one knows no such batch
    of_none = loss(model, batch(0))
    with PeakInside() as peak:
        of_none.backward()
    model.zero_grad()
    return peak.peak


def measure(name: str) -> dict[str, Any]:
    """All figures of one line."""
    model = unet()
    inject(model, methods(model)[name])
    row: dict[str, Any] = step_bytes(model, lambda: batch(BATCH), loss)
    places = [buffer.nbytes for path, buffer in model.named_buffers() if path.endswith(".indices")]
    row |= {"places": sum(places), "gradients": gradient_bytes(model)}
    del model
    gc.collect()
    return row


def beside(name: str) -> str:
    """The line of LoRA that trains as many numbers, or what is nearest."""
    return f"LoRA r={name.rpartition('=')[2]}" if name.startswith("SaRA like") else f"LoRA r={RANKS[-1]}"


def markdown(results: dict[str, Any]) -> str:
    """The picture, and the table."""
    rows = results["rows"]
    lines = [
        "![Memory of gradients, and what is kept](images/diffusion_memory.png)",
        "",
        f"UNet of Stable Diffusion 1.5, batch {BATCH}, float32; {results['versions']}.",
        "",
        "| Method | Trained | Gradients | Places | LoRA's gradients and the places | Kept | Kept with our operations "
        "| Peak of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        cells = [row["gradients"], row["places"], None, row["kept"], row["kept_fused"], row["peak"]]
        if name.startswith("SaRA like"):
            cells[2] = rows[beside(name)]["gradients"] + row["places"]
        shown = ["" if cell is None else f"{cell / 2**20:,.0f} MiB" for cell in cells]
        lines.append(f"| {name} | {row['trainable']:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """Two panels: gradients and places; what is kept, and the peak of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    names = list(rows)[::-1]
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.4 + 0.35 * len(names)), sharey=True, layout="constrained")
    shown = (
        (("gradients", "gradients, and what is made on the way", "C0"), ("places", "places of entries", "C1")),
        (("kept", "kept for the backward pass", "C0"), ("peak", "peak of a step", "C7")),
    )
    for axes, bars in zip(panels, shown, strict=True):
        for offset, (key, label, colour) in zip((0.2, -0.2), bars, strict=True):
            sizes = [rows[name][key] / 2**20 for name in names]
            axes.barh([y + offset for y in range(len(names))], sizes, height=0.4, color=colour, label=label)
    panels[0].set(xlabel="MiB", xscale="log", xlim=(4, None), title="Backward pass without activations")
    panels[0].set_yticks(range(len(names)), names)
    panels[1].set(xlabel="MiB", title=f"A training step, batch {BATCH}")
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Count what is asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", action="store_true", help="draw from what is there")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for name in tqdm([] if options.plot else list(methods(unet())), desc="methods"):
        results["rows"][name] = measure(name)
        results["versions"] = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    replace_between("memory", markdown(results), PAGE)
    for name, row in results["rows"].items():
        if name.startswith("SaRA like"):
            goal = results["rows"][beside(name)]["gradients"] + row["places"]
            print(f"{name}: {row['gradients']:,} bytes of gradients, at most {goal:,}")


if __name__ == "__main__":
    main()
