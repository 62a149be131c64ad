"""A process that is killed while it writes leaves a file that loads."""

import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LoRA, inject, load_adapter, save_adapter
from lightning_peft.callbacks.checkpoint_io import AtomicCheckpointIO
from tests.callbacks.nets import trainer

KILLS = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


class Wide(L.LightningModule):
    """One wide layer, so that adapter and optimizer state take a while to write."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layer = nn.Linear(1024, 1024)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(10_000, 1024), batch_size=1)  # type: ignore[arg-type]


@pytest.fixture
def temporary_files_on_another_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a cluster, where the folder for temporary files is local and checkpoints are not."""
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev:
        monkeypatch.setattr(tempfile, "tempdir", str(memory))


def killed_while_writing(work: Callable[[Connection], None], delay: float) -> None:
    """Run ``work`` in a process; kill it ``delay`` seconds after the third time it says that it begins to write."""
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    heard, says = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(says,), daemon=True)
    process.start()
    says.close()  # if the process fails, hearing ends at once
    for _ in range(3):
        assert heard.poll(60), "the process never wrote"
        heard.recv_bytes()
    time.sleep(delay)
    assert process.is_alive()
    process.kill()
    process.join()


def training(folder: Path, says: Connection | None = None, **kwargs: Any) -> L.Trainer:
    class Often(ModelCheckpoint):
        def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
            if says is not None:
                says.send_bytes(b"w")
            super()._save_checkpoint(trainer, filepath)

    often = Often(folder, every_n_train_steps=1, save_last=True, save_top_k=1, enable_version_counter=False)
    return trainer(folder, PEFT(LoRA(r=256), summary=False), often, enable_checkpointing=True, **kwargs)


@pytest.mark.usefixtures("temporary_files_on_another_disk")
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    last, draw, step = tmp_path / "last.ckpt", random.Random(0), 0

    def work(says: Connection) -> None:
        training(tmp_path, says, max_steps=10_000).fit(Wide(), ckpt_path=last if last.exists() else None)

    for _ in range(KILLS):
        killed_while_writing(work, delay=draw.uniform(0, 0.08))
        stored = torch.load(last, weights_only=True)
        assert stored["global_step"] > step, "each run had got further before it was killed"
        step = stored["global_step"]
        best = [path for path in tmp_path.glob("*.ckpt") if path != last]
        assert best
        for path in best:  # whichever were there are whole
            torch.load(path, weights_only=True)
    resumed = training(tmp_path, max_steps=step + 2)
    resumed.fit(Wide(), ckpt_path=last)
    assert resumed.global_step == step + 2


def test_a_process_that_is_killed_while_it_writes_an_adapter_leaves_the_one_before(tmp_path: Path) -> None:
    folder, draw, seen = tmp_path / "adapter", random.Random(0), -1.0

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2048, 2048))

    def work(says: Connection) -> None:
        model: Any = inject(net(), LoRA(r=1024, target_modules="0"))
        value = seen
        while True:
            value += 1
            for parameter in model[0].adapters.parameters():
                nn.init.constant_(parameter, value)
            says.send_bytes(b"w")
            save_adapter(model, folder)

    for _ in range(KILLS):
        killed_while_writing(work, delay=draw.uniform(0, 0.2))
        loaded: Any = load_adapter(net(), folder)
        parameters = [p.detach() for p in loaded[0].adapters.parameters()]
        values = {float(value) for p in parameters for value in (p.min(), p.max())}
        assert len(values) == 1, "the file is of one moment"
        assert min(values) > seen
        seen = min(values)


def test_another_way_to_write_checkpoints_is_left_as_it_is(tmp_path: Path) -> None:
    class Own(AtomicCheckpointIO):
        pass

    own, default = training(tmp_path, plugins=[Own()], max_steps=1), training(tmp_path, max_steps=1)
    for made in (own, default):
        made.fit(Wide())
    assert type(own.strategy.checkpoint_io) is Own
    assert type(default.strategy.checkpoint_io) is AtomicCheckpointIO


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_no_litter(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"value": 1}, tmp_path / "a" / "x.ckpt")
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"value": lambda: 2}, tmp_path / "a" / "x.ckpt")
    assert torch.load(tmp_path / "a" / "x.ckpt", weights_only=True) == {"value": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.ckpt"]


def test_remote_paths_are_left_to_lightning() -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"value": 1}, "memory://x.ckpt")
    assert io.load_checkpoint("memory://x.ckpt") == {"value": 1}
