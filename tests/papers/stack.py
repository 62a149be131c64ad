"""A small stack of blocks between an embedding and a head, and a plain loop that trains it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_peft.engine import notify


class Block(nn.Module):
    """Residual, with an attention-like and a feed-forward layer."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.attn, self.norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.attn(self.norm(x)))
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """``depth`` blocks."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.layers = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(depth: int = 4) -> Stack:
    """The same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Stack(depth)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Input and goal of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 3, generator=generator)
    return x, x[:, :2] * x[:, 1:]


def loss(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.mse_loss(model(x.to(next(model.parameters()))), y.to(next(model.parameters())))


def steps(model: nn.Module, optimizer: Optimizer, first: int, last: int, each: Any = None, epoch: int = 0) -> None:
    """Optimizer steps ``first`` to ``last - 1``; ``each(step)`` is called when the gradients are there."""
    for step in range(first, last):
        now = {"step": step, "epoch": epoch, "loss": lambda step=step: loss(model, step)}
        notify(model, "on_train_batch_start", optimizer, **now)
        loss(model, step).backward()
        notify(model, "on_before_optimizer_step", optimizer, **now)
        if each:
            each(step)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, **now)
        optimizer.zero_grad()


def trainable_blocks(model: nn.Module) -> list[int]:
    """Indices of the blocks of which something requires gradients."""
    return [i for i, layer in enumerate(model.layers) if any(p.requires_grad for p in layer.parameters())]
