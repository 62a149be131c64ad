"""``method=`` of a strategy: as if PEFT stood in front of all callbacks."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_peft import PEFT, AdapterError, LoRA
from lightning_peft.engine import adapters_of
from lightning_peft.strategies import InjectingStrategy
from tests.callbacks.nets import Lit, LitConfigured, loader, trainer


class OneDevice(InjectingStrategy, SingleDeviceStrategy):
    """The smallest strategy that takes a method."""


METHOD = LoRA(r=2, modules_to_save="output-head")


@pytest.mark.parametrize(
    ("cls", "where"),
    [(Lit, "__init__"), (Lit, "setup"), (LitConfigured, "configure_model")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_method_given_to_the_strategy_trains_and_fills_checkpoints_as_the_callback_does(
    cls: type[Lit], where: str, tmp_path: Path
) -> None:
    states = []
    for strategy, callbacks in ((OneDevice("cpu", method=METHOD), ()), ("auto", (PEFT(METHOD),))):
        torch.manual_seed(0)
        module, made = cls(where), trainer(tmp_path, *callbacks, strategy=strategy)
        made.fit(module, loader(), loader())
        made.save_checkpoint(tmp_path / "adapter.ckpt")
        states.append(torch.load(tmp_path / "adapter.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all("adapters" in key or key.startswith("net.head") for key in states[0])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


class Watch(EMAWeightAveraging):
    """Remembers what it found when it copied the model."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.found = adapters_of(self._average_model)


def test_averaging_finds_the_model_adapted_wherever_it_stands_in_the_list(tmp_path: Path) -> None:
    averaging = Watch(decay=0.5)
    made = trainer(
        tmp_path, averaging, LearningRateFinder(num_training_steps=2), strategy=OneDevice("cpu", method=METHOD)
    )
    made.fit(Lit(), loader(), loader())
    assert len(averaging.found) == 2
    assert isinstance(made.callbacks[0], PEFT)


def test_fit_and_then_test_use_one_callback(tmp_path: Path) -> None:
    module, made = Lit(), trainer(tmp_path, strategy=OneDevice("cpu", method=METHOD))
    made.fit(module, loader(), loader())
    made.test(module, loader(), verbose=False)
    assert [type(c) for c in made.callbacks].count(PEFT) == 1
    assert len(adapters_of(module)) == 2


class WithCallback(Lit):
    """Brings its own PEFT."""

    def configure_callbacks(self) -> PEFT:
        return PEFT(METHOD)


@pytest.mark.parametrize("own", [False, True], ids=["in the Trainer", "of the module"])
def test_a_method_and_a_peft_callback_are_one_too_many(own: bool, tmp_path: Path) -> None:
    module = WithCallback() if own else Lit()
    made = trainer(tmp_path, *(() if own else [PEFT(METHOD)]), strategy=OneDevice("cpu", method=LoRA(r=2)))
    with pytest.raises(AdapterError, match=r"method=LoRA\(r=2\), and the Trainer has a PEFT callback too. Keep one"):
        made.fit(module, loader(), loader())
    assert adapters_of(module) == []


def test_what_is_no_method_is_refused_when_the_strategy_is_made() -> None:
    with pytest.raises(AdapterError, match="unknown method 'lroa'"):
        OneDevice("cpu", method="lroa")
