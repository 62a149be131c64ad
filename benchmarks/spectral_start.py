"""Seconds that PiSSA takes to find its start in one Linear(4096): a randomised decomposition beside the exact one."""

import torch
from torch import nn

from benchmarks.row import Row, alternate
from lightning_peft import PiSSA, inject, unload


def run() -> list[Row]:
    """Once each; the exact one takes long enough."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))

    def start(niter: int | None) -> None:
        unload(inject(model, PiSSA(r=16, niter=niter)))

    random, exact = alternate(lambda: start(4), lambda: start(None), rounds=1, repeats=1)
    return [Row("start of PiSSA r=16 in Linear(4096), niter=4; beside it exact", random, exact, "s", "at most 0.10")]
