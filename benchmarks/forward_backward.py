"""24 linear layers of width 128 with LoRA r=8, batch 8: the overhead per layer is what shows."""

import copy
from functools import partial

import peft
import torch
from torch import nn

from benchmarks.row import Row, alternate
from lightning_peft import LoRA, inject


def run() -> list[Row]:
    """Forward with backward, and forward without gradients."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = nn.Sequential(*[nn.Linear(128, 128) for _ in range(24)])
    ours = inject(copy.deepcopy(base), LoRA(r=8))
    names = [str(i) for i in range(24)]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=names))
    x = torch.randn(8, 128)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    rows = []
    for what, function, goal in (
        ("forward + backward", step, "at most 0.95"),
        ("no-grad forward", forward, "at most 0.70"),
    ):
        mine, his = alternate(partial(function, ours), partial(function, theirs), rounds=40, repeats=10)
        rows.append(Row(f"{what}, 24 Linear(128), LoRA r=8", mine * 1e6, his * 1e6, "us", goal))
    torch.set_num_threads(threads)
    return rows
