"""A net without anything random, data in a fixed order, and the same training in one process of plain torch."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_peft import LoRA, inject

BLOCKS = ("a", "b", "c")
METHOD = LoRA(r=2, target_modules=BLOCKS, modules_to_save="head")


class Net(L.LightningModule):
    """Three residual blocks of width 6 and a head."""

    def __init__(self, adam: bool = False) -> None:
        super().__init__()
        self.adam = adam
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the pre-trained weights
            self.net = nn.ModuleDict({**{name: nn.Linear(6, 6) for name in BLOCKS}, "head": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for name in BLOCKS:
            x = x + torch.tanh(self.net[name](x))
        return self.net["head"](x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02) if self.adam else torch.optim.SGD(self.parameters(), lr=0.2)


class Manual(Net):
    """Accumulates two batches by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer, last = self.optimizers(), batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=last):
            self.manual_backward(F.mse_loss(self(batch[0]), batch[1]) / 2)
        if last:
            optimizer.step()
            optimizer.zero_grad()


def let_train(module: Any, step: int) -> None:
    """All blocks but one train; which one depends on the step."""
    for i, name in enumerate(BLOCKS):
        for p in module.net[name].adapters.parameters():
            p.requires_grad_(i != step % 3)
            p.grad = None


class Toggle(L.Callback):
    """Freezes another block at each step, as methods that sample layers do."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        let_train(pl_module, trainer.global_step)


def data(batch_size: int, ranks: int = 1, rank: int = 0) -> DataLoader:
    """24 samples that are never shuffled (Lightning's own sampler would); of these every ``ranks``-th."""
    generator = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(24, 6, generator=generator), torch.randn(24, 3, generator=generator))
    return DataLoader(samples, batch_size, sampler=DistributedSampler(samples, ranks, rank, shuffle=False))


def by_hand(
    batch_size: int,
    epochs: int = 1,
    adam: bool = False,
    clip: float | None = None,
    before: Callable[..., None] | None = None,
) -> dict[str, Tensor]:
    """The state after the same training in one process, in a plain loop over the whole batches."""
    torch.manual_seed(0)
    module = inject(Net(adam), METHOD)
    optimizer = module.configure_optimizers()
    for step, batch in enumerate(b for _ in range(epochs) for b in data(batch_size)):
        if before is not None:
            before(module, step)
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return module.state_dict()
