"""A net without anything random, data in a fixed order, and the same training in one process of plain torch."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_peft import LoRA, inject
from lightning_peft.engine import METHODS, Method

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


class Projections(Net):
    """With the names that the examples of methods go by."""

    def __init__(self) -> None:
        super().__init__(adam=True)
        self.net = nn.ModuleDict({"q_proj": self.net["a"], "v_proj": self.net["b"], "head": self.net["head"]})

    def forward(self, x: Tensor) -> Tensor:
        for name in ("q_proj", "v_proj"):
            x = x + torch.tanh(self.net[name](x))
        return self.net["head"](x)


def switching() -> dict[str, Method]:
    """An example of each method that changes what trains."""
    return {name: cls.examples()[0] for name, cls in METHODS.items() if cls.switches}


class Normed(Net):
    """With a BatchNorm that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


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


def client_data(client: int) -> DataLoader:
    """Client 0 has 8 samples, client 1 has 12 others; batches of 4, never shuffled."""
    generator = torch.Generator().manual_seed(10 + client)
    samples = TensorDataset(*(torch.randn(8 + 4 * client, d, generator=generator) for d in (6, 3)))
    return DataLoader(samples, batch_size=4)


def federated_by_hand(
    server: Callable[[list[dict[str, Tensor]], int], dict[str, Tensor]],
    *,
    local_steps: int,
    steps: int,
    adam: bool = False,
    keep: bool = False,
    freeze: str = "-",
) -> tuple[list[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Two clients in one process, two batches to an epoch.

    Args:
        server: (what each client has trained, number of the round) -> what all of them go on from.
        local_steps: optimizer steps in a round.
        steps: optimizer steps in all.
        adam: as for `Net`.
        keep: the optimizers outlive a round.
        freeze: parameters whose names end so do not train.

    Returns:
        What each client had trained at the end of each round, and the result.
    """
    torch.manual_seed(0)
    clients = [inject(Net(adam), METHOD) for _ in range(2)]
    for client in clients:
        for name, p in client.named_parameters():
            p.requires_grad_(p.requires_grad and not name.endswith(freeze))
    optimizers = [client.configure_optimizers() for client in clients]
    batches = [[b for _ in range(steps) for b in list(client_data(k))[:2]] for k in range(2)]
    rounds = []
    for step in range(steps):
        for client, optimizer, own in zip(clients, optimizers, batches, strict=True):
            optimizer.zero_grad()
            client.training_step(own[step], 0).backward()
            optimizer.step()
        if (step + 1) % local_steps == 0 or step + 1 == steps:
            trained = [{n: p.detach().clone() for n, p in c.named_parameters() if p.requires_grad} for c in clients]
            rounds.append(trained)
            result = server(trained, step // local_steps)
            for client in clients:
                client.load_state_dict(result, strict=False)
            if not keep:
                optimizers = [client.configure_optimizers() for client in clients]
    return rounds, clients[0].state_dict()
