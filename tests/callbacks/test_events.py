"""What a method is told in a Trainer, and when; the loss that it may measure on the side."""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lightning_peft import LISA, LPFT, PEFT, AdapterError, FullFineTuning, LoRA
from lightning_peft.engine import Training
from tests.callbacks.nets import Lit, loader, trainer
from tests.callbacks.test_telemetry import LitStack, data
from tests.papers.stack import trainable_blocks

Told = list[tuple[str, int, int]]


class Listening(LoRA):
    """Notes what it is told; not registered."""

    told: ClassVar[Told] = []
    name: ClassVar[str] = "listening"

    def on_train_batch_start(self, training: Training) -> None:
        self.told.append(("start", training.step, training.epoch))

    def on_before_optimizer_step(self, training: Training) -> None:
        grads = [p.grad is not None for name, p in training.parameters().items() if name.endswith("lora_B")]
        assert all(grads)
        self.told.append(("before", training.step, training.epoch))

    def on_after_optimizer_step(self, training: Training) -> None:
        self.told.append(("after", training.step, training.epoch))


@pytest.fixture
def told() -> Told:
    Listening.told.clear()
    return Listening.told


def steps(*of_epochs: range) -> Told:
    return [(event, i, e) for e, of in enumerate(of_epochs) for i in of for event in ("start", "before", "after")]


def test_a_method_is_told_of_each_step_once(told: Told, tmp_path: Path) -> None:
    trainer(tmp_path, PEFT(Listening(r=2), summary=False)).fit(Lit(), loader(), loader())
    assert told == steps(range(6), range(6, 12))


def test_accumulated_batches_are_one_step(told: Told, tmp_path: Path) -> None:
    made = trainer(tmp_path, PEFT(Listening(r=2), summary=False), accumulate_grad_batches=4)
    made.fit(Lit(), loader(), loader())  # four batches and two, in each epoch
    assert told == steps(range(2), range(2, 4))


class ByHand(Lit):
    """Manual optimization, an optimizer that is the same in every fit."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kept: Any = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        self.kept = self.kept or super().configure_optimizers()
        return self.kept


def test_an_optimizer_that_is_used_again_tells_once(told: Told, tmp_path: Path) -> None:
    module = ByHand()
    for _ in range(2):
        told.clear()
        trainer(tmp_path, PEFT(Listening(r=2), summary=False), max_epochs=1).fit(module, loader(), loader())
    assert told == steps(range(6))


class Logging(Lit):
    """Logs, counts in a metric, and has random numbers and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.logs = 0

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.logs += 1
        super().log(*args, **kwargs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noisy = [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]
        loss = super().training_step(noisy, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


class Measuring(FullFineTuning):
    """Measures the loss of every batch, and does nothing with it; not registered."""

    name: ClassVar[str] = "measuring"
    losses: ClassVar[list[float]] = []

    def on_train_batch_start(self, training: Training) -> None:
        self.losses.append(training.batch_loss())


def test_a_loss_is_measured_without_a_trace(tmp_path: Path) -> None:
    results = {}
    for method in (FullFineTuning(), Measuring()):
        torch.manual_seed(0)
        module = Logging()
        made = trainer(tmp_path, PEFT(method, summary=False))
        made.fit(module, loader(), loader())
        results[type(method)] = module.state_dict(), (module.logs, dict(made.callback_metrics))
    (state, logged), (measured, same) = results.values()
    assert [key for key, value in state.items() if not torch.equal(value, measured[key])] == []
    assert logged == same
    start, (x, y) = Lit().eval(), next(iter(loader()))
    # 0.1: the noise of the step
    assert Measuring.losses[0] == pytest.approx(F.cross_entropy(start(x), y).item(), abs=0.1)


def test_a_loss_cannot_be_measured_where_the_step_optimizes_by_itself(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="training_step optimizes by itself"):
        trainer(tmp_path, PEFT(Measuring(), summary=False)).fit(ByHand(), loader(), loader())


class Filtered(LitStack):
    """Only what requires gradients goes into the optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_after_training_all_may_train_again(tmp_path: Path) -> None:
    module = Filtered()
    for _ in range(2):
        made = trainer(tmp_path, PEFT(LISA(n_layers=1, interval_steps=2), summary=False), max_epochs=1)
        made.fit(module, data())
        assert all(p.requires_grad for p in module.parameters())
        assert len(made.optimizers[0].param_groups[0]["params"]) == len(list(module.parameters()))


class Fails(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 3:
            assert len(trainable_blocks(pl_module.net)) == 1
            raise KeyError("a callback of the user's")


def test_after_a_failure_all_may_train_again(tmp_path: Path) -> None:
    module = Filtered()
    with pytest.raises(KeyError):
        trainer(tmp_path, PEFT(LISA(n_layers=1), summary=False), Fails()).fit(module, data())
    assert all(p.requires_grad for p in module.parameters())


class Norms(L.Callback):
    def __init__(self) -> None:
        self.training: list[bool] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.training.append(pl_module.net["norm"].training)


def test_statistics_of_a_norm_that_is_frozen_for_a_while_stand_still(tmp_path: Path) -> None:
    module, seen = Lit(), Norms()
    start = module.net["norm"].running_mean.clone()
    made = trainer(tmp_path, PEFT(LPFT(lp_epochs=1, head="head"), summary=False), seen, max_epochs=1)
    made.fit(module, loader(), loader())
    assert torch.equal(module.net["norm"].running_mean, start)
    seen.training.clear()
    trainer(tmp_path, PEFT(LPFT(lp_epochs=1, head="head"), summary=False), seen, max_epochs=2).fit(
        Lit(), loader(), loader()
    )
    assert seen.training == [False] * 6 + [True] * 6


def test_a_norm_is_given_back_in_training_mode(tmp_path: Path) -> None:
    module = Lit()
    trainer(tmp_path, PEFT(LPFT(lp_epochs=1, head="head"), summary=False), max_epochs=1).fit(module, loader(), loader())
    assert all(m.training for m in module.modules() if isinstance(m, nn.BatchNorm1d))


class Penalized(LoRA):
    """Half the square of every trained number; not registered."""

    name: ClassVar[str] = "penalized"

    def penalties(self, training: Training) -> dict[str, Tensor]:
        return {"decay": 0.5 * sum(p.square().sum() for p in training.parameters().values())}  # type: ignore[dict-item]


class Gradients(L.Callback):
    """What the optimizer is given, and the parameters at the time."""

    def __init__(self) -> None:
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        trained = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        self.seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in trained})


@pytest.mark.parametrize("module", [Lit, ByHand])
def test_a_penalty_reaches_the_gradient_once_for_each_step_and_is_logged(module: type[Lit], tmp_path: Path) -> None:
    seen, logged = {}, {}
    accumulate = {} if module is ByHand else {"accumulate_grad_batches": 3}
    for method in (LoRA(r=2), Penalized(r=2)):
        torch.manual_seed(0)
        gradients = Gradients()
        made = trainer(tmp_path, PEFT(method, summary=False), gradients, max_steps=1, **accumulate)
        made.fit(module(), loader(), loader())
        seen[type(method)], logged = gradients.seen[0], made.callback_metrics
    for name, (value, plain) in seen[LoRA].items():
        torch.testing.assert_close(seen[Penalized][name][1], plain + value)
    whole = sum(value.square().sum() for value, _ in seen[LoRA].values())
    assert logged["peft/default/decay"] == pytest.approx(0.5 * float(whole))
