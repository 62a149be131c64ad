"""Every registered method resumes in a Trainer as if it had never stopped. Adding a method adds no line here."""

import functools
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_peft import PEFT, LoRA
from lightning_peft.engine import METHODS, Method
from tests.callbacks.nets import Lit, LitBlocks, LitConditioned, StopAfterAnEpoch, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]

CASES = [
    pytest.param(example, id=f"{name}-{i}")
    for name, cls in sorted(METHODS.items())
    for i, example in enumerate(cls.examples())
]


class Scheduled(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 12), "interval": "step"}]


class ScheduledBlocks(Scheduled, LitBlocks):
    """The same for methods on blocks."""


class ScheduledConditioned(Scheduled, LitConditioned):
    """The same for methods on a condition."""


def module_for(method: Method) -> type[Lit]:
    return {"layers": Scheduled, "blocks": ScheduledBlocks, "condition": ScheduledConditioned}[method.acts_on]


def shuffled() -> DataLoader:
    return DataLoader(loader().dataset, batch_size=8, shuffle=True)


def run(
    folder: Path, method: Method, *callbacks: L.Callback, data: Any = None, cls: type[Lit] | None = None, **options: Any
) -> L.LightningModule:
    """Two epochs of six shuffled batches with dropout, two batches a step."""
    torch.manual_seed(0)
    random.seed(0)
    module = (cls or module_for(method))()
    resume = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
    defaults = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    peft = PEFT(method, summary=False)
    made = trainer(folder, peft, *callbacks, **{**defaults, **options}, enable_checkpointing=bool(callbacks))
    data = shuffled() if data is None and not is_overridden("train_dataloader", module) else data
    made.fit(module, data, loader(), **resume)
    return module


def assert_equal(one: L.LightningModule, other: L.LightningModule) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    assert [key for key, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[key])] == []


def every_batch(folder: Path) -> ModelCheckpoint:
    """One file for each optimizer step, also in the middle of an epoch."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)


@pytest.mark.parametrize("method", CASES)
def test_a_run_resumed_in_an_epoch_ends_where_an_uninterrupted_one_ends(method: Method, tmp_path: Path) -> None:
    through = run(tmp_path, method, every_batch(tmp_path))
    start = module_for(method)().state_dict()
    assert any(key not in start or not torch.equal(start[key], v) for key, v in through.state_dict().items())
    for k in (2, 4):  # in the first epoch, and in the second
        assert_equal(run(tmp_path, method, ckpt_path=tmp_path / f"step={k}.ckpt"), through)


@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumes_at_every_step(k: int, accumulate: int, tmp_path: Path) -> None:
    run_it = functools.partial(run, tmp_path, LoRA(r=2, dropout=0.3), accumulate_grad_batches=accumulate)
    through = run_it(every_batch(tmp_path))
    for step in (k, 6 + k) if accumulate == 1 else (k,):
        assert_equal(run_it(ckpt_path=tmp_path / f"step={step}.ckpt"), through)


@pytest.mark.parametrize("method", CASES)
def test_a_run_resumed_behind_an_epoch_ends_where_an_uninterrupted_one_ends(method: Method, tmp_path: Path) -> None:
    through = run(tmp_path, method, max_epochs=3)
    run(tmp_path, method, ModelCheckpoint(tmp_path, save_last=True), StopAfterAnEpoch(), max_epochs=3)
    assert_equal(run(tmp_path, method, max_epochs=3, ckpt_path=tmp_path / "last.ckpt"), through)


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        for _ in range(6):
            x = torch.randn(8, 7, generator=generator)
            yield [x, (x.sum(1) > 0).long()]


def test_a_stream_without_a_length_goes_on_where_it_was(tmp_path: Path) -> None:
    def data() -> DataLoader:
        return DataLoader(Stream(), batch_size=None)

    through = run(tmp_path, LoRA(r=2), every_batch(tmp_path), data=data())
    assert_equal(run(tmp_path, LoRA(r=2), data=data(), ckpt_path=tmp_path / "step=2.ckpt"), through)


class Augmented(TensorDataset):
    """Draws random numbers when it is read."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn_like(x) * random.random(), y


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentations_go_on_where_they_were(workers: int, tmp_path: Path) -> None:
    def data() -> DataLoader:
        dataset = Augmented(*loader().dataset.tensors)
        return DataLoader(dataset, batch_size=8, shuffle=True, num_workers=workers)

    through = run(tmp_path, LoRA(r=2), every_batch(tmp_path), data=data())
    for k in (1, 4):
        assert_equal(run(tmp_path, LoRA(r=2), data=data(), ckpt_path=tmp_path / f"step={k}.ckpt"), through)


class Stateful(DataLoader):
    """A loader that keeps its place by itself, as those of torchdata do."""

    at = 0

    def __iter__(self) -> Any:
        for i, batch in enumerate(super().__iter__()):
            if i >= self.at:
                self.at = (i + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Seen(L.Callback):
    """The batches that were trained on."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch[0])


def test_a_loader_that_keeps_its_place_is_left_to_itself(tmp_path: Path) -> None:
    def data() -> Stateful:
        return Stateful(loader().dataset, batch_size=8)

    first, second = Seen(), Seen()
    run(tmp_path, LoRA(r=2), every_batch(tmp_path), first, data=data())
    run(tmp_path, LoRA(r=2), second, data=data(), ckpt_path=tmp_path / "step=2.ckpt")
    assert len(second.batches) == 8
    assert all(torch.equal(a, b) for a, b in zip(first.batches[4:], second.batches, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_a_generator_of_its_own_goes_on_where_it_was(workers: int, tmp_path: Path) -> None:
    def data() -> list[DataLoader]:
        generators = (torch.Generator().manual_seed(seed) for seed in (7, 8))
        options = {"batch_size": 8, "shuffle": True, "num_workers": workers}
        return [DataLoader(loader().dataset, generator=g, **options) for g in generators]

    class OfTwo(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(super(OfTwo, self).training_step(one, batch_idx) for one in batch)

    run_it = functools.partial(run, tmp_path, LoRA(r=2), cls=OfTwo)
    through = run_it(every_batch(tmp_path), data=data())
    for k in (1, 3, 4):  # in the first epoch, at its end, and in the second
        assert_equal(run_it(data=data(), ckpt_path=tmp_path / f"step={k}.ckpt"), through)


class Reloading(Scheduled):
    """Makes a loader for each epoch, with a generator of its own."""

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(7 + self.current_epoch)
        return DataLoader(loader().dataset, batch_size=8, shuffle=True, generator=generator)


def test_loaders_that_are_made_for_each_epoch_go_on_where_they_were(tmp_path: Path) -> None:
    run_it = functools.partial(run, tmp_path, LoRA(r=2), cls=Reloading, reload_dataloaders_every_n_epochs=1)
    through = run_it(every_batch(tmp_path))
    for k in (1, 4):
        assert_equal(run_it(ckpt_path=tmp_path / f"step={k}.ckpt"), through)


class Estimating(Scheduled):
    """Asks for the number of steps when optimizers are made: Lightning goes to the data then, before ``fit`` starts."""

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.02)
        return [optimizer], [CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_asked_for_its_length_goes_on_where_it_was(workers: int, tmp_path: Path) -> None:
    def data() -> DataLoader:
        return DataLoader(loader().dataset, batch_size=8, shuffle=True, num_workers=workers)

    through = run(tmp_path, LoRA(r=2), every_batch(tmp_path), data=data(), cls=Estimating)
    for k in (1, 4):
        resumed = run(tmp_path, LoRA(r=2), data=data(), cls=Estimating, ckpt_path=tmp_path / f"step={k}.ckpt")
        assert_equal(resumed, through)
