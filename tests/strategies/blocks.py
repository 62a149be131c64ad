"""A stack of blocks, without anything random, and the same training in one process of plain torch."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import LISA, LoRA, inject
from lightning_peft.engine import Method
from tests.strategies.nets import data

METHOD = LoRA(r=2, target_modules=("up", "down"), modules_to_save="head")
SAMPLED = LISA(n_layers=1, interval_steps=2)


class Block(nn.Module):
    """A residual block of width 6."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(L.LightningModule):
    """Three blocks between an input layer and a head, in a module that is never called as a whole."""

    def __init__(self, adam: bool = False) -> None:
        super().__init__()
        self.adam = adam
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the pre-trained weights
            self.embed = nn.Linear(6, 6)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(6, 3)

    def answer(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.answer(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.answer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02) if self.adam else torch.optim.SGD(self.parameters(), lr=0.2)


class Smooth(Block):
    """A block of what is computed by our operations while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.act, self.behind = nn.LayerNorm(6), nn.GELU(), nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.behind(self.down(self.act(self.up(self.before(x)))))


class SmoothNet(Net):
    """The same net of such blocks."""

    def __init__(self, adam: bool = False) -> None:
        super().__init__(adam)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.blocks = nn.ModuleList(Smooth() for _ in range(3))


def adapters_by_turns(module: Any, step: int) -> None:
    """The adapters of one block are frozen; of which one depends on the step."""
    for i, block in enumerate(module.blocks):
        for layer in (block.up, block.down):
            set_trained(layer.adapters, i != step % 3)


def blocks_by_turns(module: Any, step: int) -> None:
    """One block of the base trains; which one depends on the step."""
    for i, block in enumerate(module.blocks):
        set_trained(block, i == step % 3)


def blocks_by_epoch(module: Any, step: int) -> None:
    """The same, but chosen at the first of each three steps alone."""
    if step % 3 == 0:
        blocks_by_turns(module, step // 3)


def set_trained(module: nn.Module, trained: bool) -> None:
    for p in module.parameters():
        p.requires_grad_(trained)
        p.grad = None


class ByTurns(L.Callback):
    """Calls a function of module and step before each batch, as methods that sample layers do."""

    def __init__(self, function: Callable[[Any, int], None]) -> None:
        self.function = function

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.function(pl_module, trainer.global_step)


def by_hand(
    method: Method = METHOD,
    batch_size: int = 8,
    epochs: int = 1,
    adam: bool = False,
    clip: float | None = None,
    before: Callable[..., None] | None = None,
    batches: int | None = None,
    net: type[Net] = Net,
) -> dict[str, Tensor]:
    """The state after the same training in one process, in a plain loop over the whole batches."""
    torch.manual_seed(0)
    module = inject(net(adam), method)
    optimizer = module.configure_optimizers()
    for step, batch in enumerate(list(b for _ in range(epochs) for b in data(batch_size))[:batches]):
        if before is not None:
            before(module, step)
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return module.state_dict()
