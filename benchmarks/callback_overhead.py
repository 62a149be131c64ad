"""What the callback costs in each training step: a Trainer with ``PEFT(LoRA)``, beside one whose module did it by hand.

By hand means: ``inject`` in ``__init__`` and no callback. The step takes some 50 ms.
"""

import tempfile
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.row import Row
from lightning_peft import PEFT, LoRA, inject

_STEPS, _ROUNDS = 40, 5


class Net(L.LightningModule):
    """24 linear layers, wide enough for steps of some 50 ms on one core."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(512, 512) for _ in range(24)])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Mean square."""
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        """AdamW of what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


class Clock(L.Callback):
    """Seconds from the end of one batch to the end of the next."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: object) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def seconds(by_hand: bool, folder: str) -> list[float]:
    """Of each step of one run."""
    torch.manual_seed(0)
    module, clock = Net(), Clock()
    callbacks: list[L.Callback] = [clock]
    if by_hand:
        inject(module, LoRA(r=8))
    else:
        callbacks.append(PEFT(LoRA(r=8), summary=False))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": _STEPS, "accelerator": "cpu", "enable_checkpointing": False, **quiet}
    trainer = L.Trainer(default_root_dir=folder, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(_STEPS * 200, 512)), batch_size=200))
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def run() -> list[Row]:
    """Runs that take turns; the median of all steps behind the first five of each."""
    steps: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(_ROUNDS):
            for by_hand in (False, True):
                steps[by_hand] += seconds(by_hand, folder)[5:]
    ours, hand = (torch.tensor(steps[by_hand]).median().item() for by_hand in (False, True))
    return [
        Row("a training step with the callback; beside it adapters injected by hand", ours, hand, "s", "at most 1.01")
    ]
