"""Every registered method resumes in a Trainer as if it had never stopped. Adding a method adds no line here."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_peft import PEFT
from lightning_peft.engine import METHODS, Method
from tests.callbacks.nets import Lit, loader, trainer

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


class Reseed(L.Callback):
    """The same dropout mask for a batch, however the run came to it (Lightning does not store the generator)."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def run(folder: Path, method: Method, epochs: int, *callbacks: L.Callback, **resume: Any) -> L.LightningModule:
    torch.manual_seed(0)
    module = Scheduled()
    options = {"max_epochs": epochs, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    made = trainer(
        folder, PEFT(method, summary=False), Reseed(), *callbacks, **options, enable_checkpointing=bool(callbacks)
    )
    made.fit(module, loader(), loader(), **resume)
    return module


@pytest.mark.parametrize("method", CASES)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(method: Method, tmp_path: Path) -> None:
    through = run(tmp_path, method, 3).state_dict()
    start = Scheduled().state_dict()
    run(tmp_path, method, 1, ModelCheckpoint(tmp_path, save_last=True))
    resumed = run(tmp_path, method, 3, ckpt_path=tmp_path / "last.ckpt").state_dict()
    assert through.keys() == resumed.keys()
    for key, value in through.items():
        assert torch.equal(value, resumed[key]), key
    assert any(key not in start or not torch.equal(start[key], value) for key, value in through.items())
