"""What PEFT logs of the layers, against values computed by hand; and the picture of it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LISA, PEFT, AdapterError, LoRA, PiSSA, inject
from lightning_peft.callbacks import TelemetryPicture
from lightning_peft.callbacks.telemetry import effective_rank
from lightning_peft.engine import Method
from tests.callbacks.nets import trainer
from tests.papers.stack import Stack, stack, trainable_blocks


class LitStack(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: Stack = stack()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data() -> DataLoader:
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :2]), batch_size=4)


class Spy(L.Callback):
    """The truth about each step, before and after it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.blocks: list[list[int]] = []
        self.grads: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.blocks.append(trainable_blocks(pl_module.net))
        grads = [p.grad.norm() for p in pl_module.net.layers[1].parameters() if p.grad is not None]
        self.grads.append(float(torch.stack(grads).norm()) if grads else 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.logged.append({k.removeprefix("peft/"): float(v) for k, v in trainer.callback_metrics.items()})


def fitted(folder: Path, method: Any, *callbacks: L.Callback, **options: Any) -> LitStack:
    module = LitStack()
    options = {"max_epochs": 2, "log_every_n_steps": 1, **options}
    trainer(folder, PEFT(method, summary=False, telemetry=True), *callbacks, **options).fit(module, data())
    return module


def test_lora_reports_the_norms_of_its_changes(tmp_path: Path) -> None:
    spy = Spy()
    fitted(tmp_path, LoRA(r=2), spy, max_epochs=1)
    again = fitted(tmp_path, LoRA(r=2), max_epochs=1, max_steps=5)  # the state before the sixth step
    norms, ranks = [], []
    for block in again.net.layers:
        deltas = [m.adapters["default"].delta().detach() for m in (block.attn, block.up, block.down)]
        norms.append(torch.cat([d.flatten() for d in deltas]).norm())
        shares = [s / s.sum() for s in (torch.linalg.svdvals(d.double())[:2] for d in deltas)]
        ranks.append(torch.stack([(-(s * s.log()).sum()).exp() for s in shares]).mean())
    last = spy.logged[5]
    for i in range(4):
        assert last[f"delta_norm/net.layers.{i}"] == pytest.approx(norms[i].item(), rel=1e-5)
        assert last[f"effective_rank/net.layers.{i}"] == pytest.approx(ranks[i].item(), rel=1e-4)
        assert last[f"trains/net.layers.{i}"] == 1
    everything = torch.stack([*norms, torch.tensor(last["delta_norm/net.embed"])])
    assert last["update_share/net.layers.2"] == pytest.approx(
        (norms[2] ** 2 / everything.square().sum()).item(), rel=1e-4
    )
    assert last["grad_norm/net.layers.1"] == pytest.approx(spy.grads[5], rel=1e-5)


def test_a_change_that_has_not_begun_has_no_rank() -> None:
    for method, expected in ((LoRA(r=2), 0.0), (PiSSA(r=2), 0.0)):
        model = inject(torch.nn.Sequential(torch.nn.Linear(6, 6)), method)
        adapter: Any = model[0].adapters["default"]  # type: ignore[union-attr]
        assert effective_rank(adapter) == expected
        adapter.lora_B.data[:, 0] += 1.0  # one direction
        assert effective_rank(adapter) == pytest.approx(1.0, abs=1e-3)


def test_lisa_reports_which_blocks_are_on_and_how_far_they_went(tmp_path: Path) -> None:
    spy = Spy()
    module = fitted(tmp_path, LISA(n_layers=1, interval_steps=2), spy)
    for logged, blocks in zip(spy.logged, spy.blocks, strict=True):
        assert [i for i in range(4) if logged[f"trains/net.layers.{i}"]] == blocks
        assert logged["trains/net.head"] == 1
    assert spy.logged[0]["delta_norm/net.layers.0"] == 0
    moved = [p - q for p, q in zip(module.net.head.parameters(), stack().head.parameters(), strict=True)]
    now = torch.cat([m.flatten() for m in moved]).norm().item()
    assert 0 < spy.logged[-1]["delta_norm/net.head"] < 1.5 * now


def test_it_reaches_the_logger_and_is_off_by_default(tmp_path: Path) -> None:
    fitted(tmp_path, LoRA(r=2), logger=CSVLogger(tmp_path, name="on"), log_every_n_steps=4)
    (table,) = tmp_path.rglob("metrics.csv")
    lines = table.read_text().splitlines()
    assert "peft/delta_norm/net.layers.0" in lines[0]
    module = LitStack()
    quiet = trainer(tmp_path, PEFT(LoRA(r=2), summary=False), max_epochs=1)
    quiet.fit(module, data())
    assert not any(key.startswith("peft") for key in quiet.callback_metrics)


@pytest.mark.parametrize("method", [LISA(n_layers=1, interval_steps=2), LoRA(r=2)], ids=repr)
def test_a_picture_is_drawn_at_the_end(method: Method, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = TelemetryPicture(str(tmp_path / "made" / "telemetry.png"))
    fitted(tmp_path, method, picture)
    assert picture.steps == list(range(1, 13))
    content = (tmp_path / "made" / "telemetry.png").read_bytes()
    assert content[:4] == b"\x89PNG"
    assert len(content) > 10_000, "an empty picture is smaller"


def test_a_picture_of_nothing_is_an_error(tmp_path: Path) -> None:
    module = LitStack()
    quiet = trainer(tmp_path, PEFT(LoRA(r=2), summary=False), TelemetryPicture(str(tmp_path / "p.png")), max_epochs=1)
    with pytest.raises(AdapterError, match=r"nothing to draw. .*telemetry=True"):
        quiet.fit(module, data())


def test_the_table_says_that_what_trains_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in (LISA(n_layers=1), LoRA(r=2)):
        trainer(tmp_path, PEFT(method), fast_dev_run=True).fit(LitStack(), data())
        assert ("changes from step to step" in capsys.readouterr().out) == method.switches
