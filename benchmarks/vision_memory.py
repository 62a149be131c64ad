"""Memory of a training step of a ViT-B with each vision method, beside LoRA, HF PEFT's LoRA and full fine-tuning.

``vit_base_patch16_224`` in float32, batch 16. *Kept* are the bytes of the tensors that the forward keeps for the
backward pass, each storage once, parameters and buffers left out. *Peak* are those of all tensors that a step of AdamW
holds at a time, beyond the model and the batch: activations, gradients, moments. Both are counted on tensors without
values (torch's ``FakeTensorMode``), so nothing is computed, and the figures do not depend on the machine.

``python -m benchmarks.vision_memory`` counts, and writes benchmarks/results/vision_memory.json and the picture and
table of docs/vision.md; ``--plot`` draws from what is there; ``--methods LoRA,VPT`` replaces these lines.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.counted import step_bytes
from benchmarks.report import replace_between
from lightning_peft import BitFit, FullFineTuning, LinearProbe, LoRA, inject, list_methods
from lightning_peft.engine import Method

RESULTS, PICTURE, PAGE = (
    Path("benchmarks/results/vision_memory.json"),
    Path("docs/images/vision_memory.png"),
    Path("docs/vision.md"),
)
MODEL, BATCH = "vit_base_patch16_224", 16
GOAL = 0.25  # of what LoRA keeps, for those that never go back through the backbone

Adapt = Callable[[nn.Module], nn.Module]


def _hf_lora(model: nn.Module) -> nn.Module:
    import peft

    targets = ["qkv", "proj", "fc1", "fc2"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=r"blocks\..*\.(" + "|".join(targets) + ")"), model)
    return model


def _ours(method: Method) -> Adapt:
    return lambda model: inject(model, method)


def methods() -> dict[str, Adapt]:
    """Line -> how a model is adapted: vision methods with their defaults, and what they are compared with."""
    found = [row.cls() for row in list_methods() if row.family in FAMILIES and "vision" in row.modalities]
    ours = {type(method).__name__: _ours(method) for method in (LoRA(r=8), BitFit(), LinearProbe(), *found)}
    return {"full fine-tuning": _ours(FullFineTuning()), "HF PEFT LoRA": _hf_lora, **ours}


FAMILIES = ("features", "prompts", "side")
SIDE = ("LadderSideTuning", "UniPT", "LEVI", "SideTuning")


def measure(name: str) -> dict[str, Any]:
    """Bytes kept and peak of one line, and its trainable parameters."""
    torch.manual_seed(0)
    adapted = methods()[name](timm.create_model(MODEL, num_classes=10)).train()
    return step_bytes(
        adapted,
        lambda: (torch.randn(BATCH, 3, 224, 224), torch.randint(10, (BATCH,))),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )


def markdown(results: dict[str, Any]) -> str:
    """The picture, and the table, the one that keeps least first."""
    rows = results["rows"]
    lora, hf = rows["LoRA"], rows["HF PEFT LoRA"]
    lines = [
        "![Bytes kept and peak memory of a step](images/vision_memory.png)",
        "",
        f"{MODEL}, batch {BATCH}, float32; {results['versions']}.",
        "",
        "| Method | Trained | Kept | of LoRA's | of HF PEFT's | Kept with our operations | Peak | of LoRA's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(rows, key=lambda name: rows[name]["kept"]):
        row = rows[name]
        shares = [row["kept"] / lora["kept"], row["kept"] / hf["kept"], row["peak"] / lora["peak"]]
        kept, light, peak = (f"{row[key] / 2**20:,.0f} MiB" for key in ("kept", "kept_fused", "peak"))
        cells = [name, f"{row['trainable']:,}", kept, f"{shares[0]:.2f}", f"{shares[1]:.2f}", light, peak]
        lines.append(f"| {' | '.join([*cells, f'{shares[2]:.2f}'])} |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """One bar for each method: what it keeps, and its peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    names = sorted(rows, key=lambda name: rows[name]["kept"], reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    for offset, key, label, colour in ((0.2, "kept", "kept for the backward pass", "C0"), (-0.2, "peak", "peak", "C7")):
        sizes = [rows[name][key] / 2**30 for name in names]
        axes.barh([y + offset for y in range(len(names))], sizes, height=0.4, color=colour, label=label)
    goal = GOAL * rows["LoRA"]["kept"] / 2**30
    axes.axvline(goal, color="black", linestyle=":", linewidth=1, label="a quarter of what LoRA keeps")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="GiB", title=f"A training step of {MODEL}, batch {BATCH}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Measure what is asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", help="lines to measure, with commas between; all by default")
    parser.add_argument("--plot", action="store_true", help="draw from what is there")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    names = [] if options.plot else options.methods.split(",") if options.methods else list(methods())
    for name in tqdm(names, desc="methods"):
        results["rows"][name] = measure(name)
        results["versions"] = f"torch {torch.__version__}, timm {timm.__version__}"
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    replace_between("memory", markdown(results), PAGE)
    shares = {
        name: results["rows"][name]["kept"] / results["rows"]["LoRA"]["kept"]
        for name in SIDE
        if name in results["rows"]
    }
    print({name: f"{share:.3f}, at most {GOAL}" for name, share in shares.items()})


if __name__ == "__main__":
    main()
