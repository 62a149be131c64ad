"""One training step on two CPU processes (gloo): ``peft_ddp`` beside plain ``ddp``, and the bytes that it sends.

The model is 32 linear layers of width 1024 with LoRA r=8, one thread for each process. The two strategies take turns
of twelve steps, of which the first two are not counted.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.row import Row
from lightning_peft import PEFT, LoRA

STEPS, TURNS = 12, 8


class Deep(L.LightningModule):
    """33.6 million parameters, and nothing else in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(32)])

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        for layer in self.net:
            x = x + torch.tanh(layer(x))
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


class Clock(L.Callback):
    """Seconds of each step, and bytes of each ``all_reduce``."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.sent: list[int] = []

    def on_train_start(self, *args: Any) -> None:
        self._own = dist.all_reduce
        dist.all_reduce = self._all_reduce

    def _all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(tensor.nbytes)
        return self._own(tensor, *args, **kwargs)

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_train_end(self, *args: Any) -> None:
        dist.all_reduce = self._own


def measure(path: str) -> None:
    """What each of the two processes runs; the first writes medians and bytes to ``path``."""
    torch.set_num_threads(1)
    data = DataLoader(torch.randn(16 * STEPS, 1024), batch_size=8)
    seconds: dict[str, list[float]] = {"peft_ddp": [], "ddp": []}
    for _ in range(TURNS):
        for strategy, found in seconds.items():
            torch.manual_seed(0)
            clock, module = Clock(), Deep()
            trainer = L.Trainer(
                strategy=strategy,
                devices=2,
                accelerator="cpu",
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[PEFT(LoRA(r=8, target_modules="all-layers"), summary=False), clock],
            )
            trainer.fit(module, data)
            found += clock.seconds[2:]
            if strategy == "peft_ddp":
                sent, trained = sum(clock.sent) / STEPS, sum(p.nbytes for p in module.parameters() if p.requires_grad)
    if os.environ["RANK"] == "0":
        medians = {strategy: statistics.median(found) for strategy, found in seconds.items()}
        Path(path).write_text(json.dumps({**medians, "sent": sent, "trained": trained}))


def run() -> list[Row]:
    """Launch the two processes, and read what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/measured.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run([*launch, "-m", "benchmarks.ddp_step", path], check=True, capture_output=True, env=quiet)
        found = json.loads(Path(path).read_text())
    return [
        Row("step on 2 CPU processes, peft_ddp beside ddp", found["peft_ddp"], found["ddp"], "s", "at most 1"),
        Row("bytes sent in it, beside its trained bytes", found["sent"], found["trained"], "bytes", "at most 1.01"),
    ]


if __name__ == "__main__":
    measure(sys.argv[1])
