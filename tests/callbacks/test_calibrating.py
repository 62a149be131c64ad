"""Calibration in a Trainer: with nothing but the user's own training data, and without a trace in it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import EVA, PEFT, AdapterError, CorDA, LoRA, LoRAGA
from lightning_peft.engine import adapters_of, calibrate, inject
from tests.callbacks.nets import Lit, LitConfigured, loader, trainer
from tests.callbacks.test_resume import Seen, assert_equal, every_batch, run, shuffled

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]

METHODS = [CorDA(r=2), EVA(r=2), LoRAGA(r=1)]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader()


class First(L.Callback):
    """The factors with which training begins."""

    def __init__(self) -> None:
        self.factors: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.factors = [a.lora_A.detach().clone() for _, _, a in adapters_of(pl_module)]


@every_method
@pytest.mark.parametrize(("cls", "where"), [(Lit, "__init__"), (Lit, "setup"), (LitConfigured, "configure_model")])
def test_a_start_is_that_of_calibration_by_hand(method: Any, cls: type[Lit], where: str, tmp_path: Path) -> None:
    module = cls(where)
    first = First()
    peft = PEFT(method, summary=False, calibration_batches=3)
    trainer(tmp_path, peft, first, max_epochs=1).fit(module, datamodule=Data())
    by_hand = inject(Lit().eval(), method)
    batches = list(loader())[:3]
    by_hand.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    calibrate(by_hand, [lambda b=b: by_hand.training_step(b, 0) for b in batches])  # type: ignore[misc]
    for factor, (_, _, adapter) in zip(first.factors, adapters_of(by_hand), strict=True):
        torch.testing.assert_close(factor, adapter.lora_A, rtol=1e-4, atol=1e-5)


def owning() -> DataLoader:
    """With a generator of its own."""
    return DataLoader(loader().dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))


@every_method
@pytest.mark.parametrize("data", [shuffled, owning])
def test_the_order_of_the_data_is_that_of_a_run_without_calibration(method: Any, data: Any, tmp_path: Path) -> None:
    plain, measured = Seen(), Seen()
    run(tmp_path, LoRA(r=2), plain, data=data())
    run(tmp_path, method, measured, data=data())
    assert len(plain.batches) == len(measured.batches) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain.batches, measured.batches, strict=True))


def test_a_run_that_goes_on_is_not_calibrated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(CorDA, "calibrate", lambda self, calibration: calls.append(calibration.name))
    run(tmp_path, CorDA(r=2), every_batch(tmp_path))
    assert calls == ["default"]
    run(tmp_path, CorDA(r=2), ckpt_path=tmp_path / "step=2.ckpt")
    assert calls == ["default"]


def test_other_stages_and_a_second_fit_measure_nothing(tmp_path: Path) -> None:
    module = Lit()
    made = trainer(tmp_path, PEFT(CorDA(r=2), summary=False), max_epochs=1)
    made.validate(module, loader(), verbose=False)
    state = module.__dict__["_peft"].injections["default"].state
    assert not state["calibrated"]
    made.fit(module, loader(), loader())
    assert state["calibrated"]
    trained = [a.start_A.clone() for _, _, a in adapters_of(module)]
    trainer(tmp_path, PEFT(CorDA(r=2), summary=False), max_epochs=1).fit(module, shuffled(), loader())
    assert all(torch.equal(s, a.start_A) for s, (_, _, a) in zip(trained, adapters_of(module), strict=True))


def test_an_adapter_that_is_loaded_needs_no_data(tmp_path: Path) -> None:
    first = PEFT(CorDA(r=2), summary=False, save_to=str(tmp_path / "adapter"))
    trainer(tmp_path, first, max_epochs=1).fit(Lit(), loader(), loader())
    again, seen = Lit(), First()
    start = PEFT(init_from=str(tmp_path / "adapter"), summary=False)
    trainer(tmp_path, start, seen, max_epochs=1).fit(again, shuffled(), loader())
    assert all(factor.any() for factor in seen.factors)


def test_without_a_batch_it_is_an_error(tmp_path: Path) -> None:
    class Empty(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(AdapterError, match="'default' is measured on training data, and there is no batch in it"):
        trainer(tmp_path, PEFT(CorDA(r=2), summary=False)).fit(Lit(), DataLoader(Empty(), batch_size=None), loader())
    with pytest.raises(AdapterError, match="calibration_batches must be an integer >= 1, got 0"):
        PEFT(CorDA(), calibration_batches=0)


@pytest.mark.parametrize("stage", ["resume", "validate", "load"])
def test_ranks_that_data_chose_come_back_with_a_checkpoint(stage: str, tmp_path: Path) -> None:
    def ranks(module: L.LightningModule) -> list[int]:
        return [len(a.lora_A) for _, _, a in adapters_of(module)]

    method, (x, y) = EVA(r=2), shuffled().dataset.tensors  # type: ignore[attr-defined]
    # one direction alone in the first layer: the ranks go to the second
    data = DataLoader(TensorDataset(x * torch.tensor([9.0, *[1e-3] * 6]), y), batch_size=8)
    through = run(tmp_path, method, every_batch(tmp_path), data=data)
    file = str(tmp_path / "step=2.ckpt")
    assert len(set(ranks(through))) > 1
    if stage == "resume":
        assert_equal(run(tmp_path, method, data=data, ckpt_path=file), through)
    elif stage == "validate":
        module = type(through)()
        trainer(tmp_path, PEFT(method, summary=False)).validate(module, loader(), ckpt_path=file, verbose=False)
        assert ranks(module) == ranks(through)
    else:
        assert ranks(PEFT.load_from_checkpoint(type(through), file)) == ranks(through)
