"""LoRA+'s ratio of learning rates, inside the user's own optimizer and under the user's own scheduler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_peft import PEFT, LoRA, LoRAPlus
from tests.callbacks.nets import Lit, loader, trainer

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=40),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o), ExponentialLR(o, 0.5)], milestones=[4]),
}


class Scheduled(Lit):
    """Steps the scheduler named in ``scheduler`` with every batch."""

    scheduler: str = ""
    only_trainable = False

    def configure_optimizers(self) -> Any:
        chosen = [p for p in self.parameters() if p.requires_grad or not self.only_trainable]
        optimizer = SGD(chosen, lr=0.1)
        if not self.scheduler:
            return optimizer
        return [optimizer], [{"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": "step"}]


class Rates(L.Callback):
    """What the optimizer steps with, and what stands in its groups between the steps."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []
        self.between: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.used.append([float(group["lr"]) for group in optimizer.param_groups])

        trainer.optimizers[0].register_step_pre_hook(look)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.between.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])


def fitted(folder: Path, module: L.LightningModule, method: Any, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    torch.manual_seed(0)
    made = trainer(folder, PEFT(method, summary=False), *callbacks, **kwargs)
    made.fit(module, loader(), loader())
    return made


@pytest.mark.parametrize("only_trainable", [False, True])
def test_the_first_update_of_b_is_the_ratio_times_that_of_lora(only_trainable: bool, tmp_path: Path) -> None:
    moved = {}
    for ratio in (1.0, 8.0):
        module = Scheduled()
        module.only_trainable = only_trainable
        module.net["dropout"].p = 0.0
        fitted(tmp_path, module, LoRAPlus(r=2, lr_ratio=ratio), max_steps=1)
        # lora_B starts at zero, so what is there is the update of plain SGD: -lr * ratio * gradient
        moved[ratio] = module.net["v_proj"].adapters["default"].lora_B.detach().clone()  # type: ignore[union-attr]
    torch.testing.assert_close(moved[8.0], 8 * moved[1.0], rtol=1e-5, atol=0)
    assert moved[1.0].abs().sum() > 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_ratio_holds_at_every_step_and_schedulers_do_not_see_it(scheduler: str, tmp_path: Path) -> None:
    module, plain, rates, reference = Scheduled(), Scheduled(), Rates(), Rates()
    module.scheduler = plain.scheduler = scheduler
    fitted(tmp_path, module, LoRAPlus(r=2, lr_ratio=16), rates)
    fitted(tmp_path, plain, LoRA(r=2), reference)
    assert len({tuple(step) for step in reference.used}) > 3, "the schedule must move"
    for with_ratio, without in zip(rates.used, reference.used, strict=True):
        assert with_ratio == pytest.approx([without[0], 16 * without[0]])
    assert [step[0] for step in rates.between] == [step[0] for step in reference.between]
    assert all(a == b for a, b in rates.between)


def test_reduce_on_plateau_keeps_the_ratio(tmp_path: Path) -> None:
    class Plateau(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            watched = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": watched, "monitor": "val_loss"}}

    rates = Rates()
    fitted(tmp_path, Plateau(), LoRAPlus(r=2, lr_ratio=4), rates, max_epochs=3)
    assert rates.used[-1][0] < 0.05
    assert all(b == pytest.approx(4 * a) for a, b in rates.used)


def test_a_ratio_of_one_is_lora_bit_for_bit(tmp_path: Path) -> None:
    one, lora = Lit(), Lit()
    fitted(tmp_path, one, LoRAPlus(r=2, lr_ratio=1, modules_to_save="head"))
    fitted(tmp_path, lora, LoRA(r=2, modules_to_save="head"))
    for key, value in lora.state_dict().items():
        assert torch.equal(value, one.state_dict()[key]), key


def test_resuming_keeps_the_ratio_and_equals_training_through(tmp_path: Path) -> None:
    class Quiet(Scheduled):
        scheduler = "cosine"

        def __init__(self, where: str = "__init__", lr: float = 0.02) -> None:
            super().__init__(where, lr)
            self.net["dropout"].p = 0.0

    method = LoRAPlus(r=2, lr_ratio=2, modules_to_save="head")
    through, resumed = Quiet(), Quiet()
    fitted(tmp_path, through, method, max_epochs=4)
    fitted(tmp_path, Quiet(), method, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(tmp_path, PEFT(method, summary=False), max_epochs=4)
    second.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    for key, value in through.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_every_trainable_parameter_is_in_one_group(tmp_path: Path) -> None:
    class TwoGroups(Lit):
        def configure_optimizers(self) -> Optimizer:
            norms = [p for n, p in self.named_parameters() if "norm" in n]
            others = [(n, p) for n, p in self.named_parameters() if "norm" not in n]
            return AdamW([{"params": [p for _, p in others], "weight_decay": 0.1}, {"params": norms}], lr=0.01)

    module = TwoGroups()
    (optimizer,) = fitted(tmp_path, module, LoRAPlus(r=2, modules_to_save="head"), max_steps=1).optimizers
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(module.parameters()))
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.01, 0.1, 0.1]
    assert "add_param_group" in vars(Optimizer)
    assert Optimizer.add_param_group.__module__ == "torch.optim.optimizer", "the patch is taken off again"


def test_a_step_that_fails_leaves_the_rates_as_they_were_asked_for(tmp_path: Path) -> None:
    class Fails(Scheduled):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    made = trainer(tmp_path, PEFT(LoRAPlus(r=2), summary=False))
    with pytest.raises(RuntimeError, match="out of memory"):
        made.fit(Fails(), loader(), loader())
    assert [group["lr"] for group in made.optimizers[0].param_groups] == [0.1, 0.1]
