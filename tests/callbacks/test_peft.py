"""The callback in a real Trainer: wherever the model is built, whatever is resumed, the adapter alone is saved."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_peft import (
    PEFT,
    SSF,
    AdapterError,
    BitFit,
    FullFineTuning,
    LoRA,
    disabled,
    inject,
    merge,
    save_adapter,
)
from lightning_peft.engine import AdapterFileError, TargetError, adapters_of
from tests.callbacks.nets import Lit, LitConfigured, LitInTwo, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]

PLACES = [(Lit, "__init__"), (Lit, "setup"), (LitConfigured, "configure_model"), (LitConfigured, "__init__")]
in_every_place = pytest.mark.parametrize(("cls", "where"), PLACES, ids=lambda value: getattr(value, "__name__", value))


def lora(**kwargs: Any) -> PEFT:
    return PEFT(LoRA(r=2, modules_to_save="output-head"), **{"summary": False, **kwargs})


def fitted(folder: Path, module: L.LightningModule, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    torch.manual_seed(0)
    made = trainer(folder, *(callbacks or (lora(),)), **kwargs)
    made.fit(module, loader(), loader())
    return made


def answers(made: L.Trainer, module: L.LightningModule, **kwargs: Any) -> Tensor:
    return torch.cat(made.predict(module, loader(), **kwargs))


@in_every_place
def test_the_adapter_trains_and_the_base_stays_wherever_the_model_is_built(
    cls: type[Lit], where: str, tmp_path: Path
) -> None:
    module = cls(where)
    made = fitted(tmp_path, module, max_epochs=4)
    assert len(adapters_of(module)) == 2
    assert made.callback_metrics["val_loss"] < 0.9  # ln 3 = 1.1 is chance
    untouched = Lit().net
    for key in ("q_proj.weight", "q_proj.bias", "v_proj.weight", "norm.weight", "norm.running_mean"):
        assert torch.equal(module.net.state_dict()[key], untouched.state_dict()[key]), key
    assert not torch.equal(module.net["head"].weight, untouched["head"].weight)
    with disabled(module):
        torch.testing.assert_close(module.eval()(torch.ones(2, 7)), Lit().eval()(torch.ones(2, 7)), rtol=0, atol=0)


def test_a_model_built_in_two_places_is_adapted_in_both(tmp_path: Path) -> None:
    module = LitInTwo()
    fitted(tmp_path, module)
    assert [name for name, _, _ in adapters_of(module)] == ["net.q_proj", "net.v_proj", "net.late_proj"]
    assert not module.net["late_proj"].weight.requires_grad


@in_every_place
def test_a_checkpoint_holds_the_adapter_alone_and_every_stage_takes_it(
    cls: type[Lit], where: str, tmp_path: Path
) -> None:
    module = cls(where)
    made = fitted(tmp_path, module)
    path = tmp_path / "adapter.ckpt"
    made.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert all("adapters" in key or key.startswith("net.head") for key in stored)
    expected = answers(made, module)
    fresh = trainer(tmp_path, lora())
    assert torch.equal(answers(fresh, cls(where), ckpt_path=path), expected)
    scores = [trainer(tmp_path, lora()).test(cls(where), loader(), ckpt_path=path, verbose=False)[0]["test_loss"]]
    scores.append(made.test(module, loader(), verbose=False)[0]["test_loss"])
    scores.append(
        trainer(tmp_path, lora()).validate(cls(where), loader(), ckpt_path=path, verbose=False)[0]["val_loss"]
    )
    assert scores[0] == scores[1] == scores[2]


class Reseed(L.Callback):
    """The same dropout mask at a step, however the run came to it (Lightning does not store the generator)."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


@in_every_place
def test_resuming_equals_training_through(cls: type[Lit], where: str, tmp_path: Path) -> None:
    through, resumed = cls(where), cls(where)
    fitted(tmp_path, through, lora(), Reseed(), max_epochs=4)
    fitted(tmp_path, cls(where), lora(), Reseed(), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(tmp_path, lora(), Reseed(), max_epochs=4)
    second.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert second.global_step == 4 * len(loader())
    for key, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_model_checkpoint_and_weights_only_files_hold_no_base_key(tmp_path: Path) -> None:
    module = Lit()
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_weights_only=True)
    made = fitted(tmp_path, module, lora(), best, enable_checkpointing=True)
    stored = torch.load(best.best_model_path, weights_only=True)
    assert set(stored["state_dict"]) == {
        *(f"net.{layer}.adapters.default.lora_{x}" for layer in ("q_proj", "v_proj") for x in "AB"),
        "net.head.weight",
        "net.head.bias",
    }
    assert torch.equal(answers(trainer(tmp_path, lora()), Lit(), ckpt_path=best.best_model_path), answers(made, module))


def test_saving_after_fit_and_with_another_trainer_holds_the_adapter_alone_too(tmp_path: Path) -> None:
    module = Lit()
    fitted(tmp_path, module)
    other = trainer(tmp_path)
    other.validate(module, loader(), verbose=False)
    other.save_checkpoint(tmp_path / "other.ckpt", weights_only=True)
    stored = torch.load(tmp_path / "other.ckpt", weights_only=True)["state_dict"]
    assert "net.q_proj.weight" not in stored
    assert "net.q_proj.adapters.default.lora_A" in stored


@pytest.mark.parametrize(("cls", "where"), [PLACES[0], PLACES[2]])
def test_load_from_checkpoint_rebuilds_the_adapted_module(cls: type[Lit], where: str, tmp_path: Path) -> None:
    module = cls(where)
    made = fitted(tmp_path, module, lora(), max_epochs=1)
    made.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PEFT.load_from_checkpoint(cls, tmp_path / "a.ckpt", lr=0.5)
    assert loaded.hparams["lr"] == 0.5
    assert torch.equal(loaded.eval()(torch.ones(2, 7)), module.eval()(torch.ones(2, 7)))
    assert "on_load_checkpoint" not in vars(cls)
    merge(loaded)
    torch.testing.assert_close(loaded(torch.ones(2, 7)), module(torch.ones(2, 7)))


def test_load_from_checkpoint_says_what_to_do_for_a_model_built_in_setup(tmp_path: Path) -> None:
    fitted(tmp_path, Lit("setup")).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(TargetError, match="no parameters to adapt"):
        PEFT.load_from_checkpoint(Lit, tmp_path / "a.ckpt")


def test_an_adapter_folder_is_written_at_the_end_and_starts_another_run(tmp_path: Path) -> None:
    module = Lit()
    made = fitted(tmp_path, module, lora(save_to=str(tmp_path / "adapter")))
    start = PEFT(init_from=str(tmp_path / "adapter"), summary=False)
    assert start.methods == {"default": LoRA(r=2, modules_to_save="output-head")}
    again = Lit()
    runs = trainer(tmp_path, start, max_epochs=1)
    assert torch.equal(answers(runs, again), answers(made, module))
    runs.fit(again, loader(), loader())
    assert not torch.equal(answers(runs, again), answers(made, module)), "training on was without effect"


def test_a_second_fit_goes_on_with_the_same_adapter(tmp_path: Path) -> None:
    module = Lit()
    fitted(tmp_path, module, lora(init_from=None))
    before = module.net["q_proj"].adapters["default"].lora_B.clone()  # type: ignore[union-attr]
    assert module.net["norm"].training, "the modes are given back after training"
    fitted(tmp_path, module)
    assert len(adapters_of(module)) == 2
    assert not torch.equal(before, module.net["q_proj"].adapters["default"].lora_B)  # type: ignore[union-attr]


def test_several_methods_are_applied_in_order_and_saved_one_by_one(tmp_path: Path) -> None:
    module = Lit()
    both = PEFT([LoRA(r=2), BitFit()], save_to=str(tmp_path / "both"), summary=False)
    fitted(tmp_path, module, both)
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["default-bitfit", "default-lora"]
    assert {key for key in both.methods} == {"default-lora", "default-bitfit"}
    assert module.net["q_proj"].bias.requires_grad
    assert not module.net["q_proj"].weight.requires_grad


@pytest.mark.parametrize("method", [SSF(), BitFit(), "linearprobe", "fullfinetuning", "ia3"], ids=str)
def test_every_kind_of_method_trains_and_comes_back_from_its_checkpoint(method: Any, tmp_path: Path) -> None:
    module = Lit()
    made = fitted(tmp_path, module, PEFT(method, summary=False))
    made.save_checkpoint(tmp_path / "a.ckpt")
    other = trainer(tmp_path, PEFT(method, summary=False))
    assert torch.equal(answers(other, Lit(), ckpt_path=tmp_path / "a.ckpt"), answers(made, module))


def test_adapters_train_and_frozen_statistics_stay_in_a_model_left_in_eval(tmp_path: Path) -> None:
    # Lightning warns of modules in eval mode; a model from from_pretrained comes so
    warnings.filterwarnings("ignore", "Found .* in eval mode")
    module = Lit()
    module.net.eval()
    seen: dict[str, bool] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen["adapter"] = pl_module.net["q_proj"].adapters["default"].training
            seen["dropout"] = pl_module.net["dropout"].training
            seen["norm"] = pl_module.net["norm"].training

    fitted(tmp_path, module, PEFT(LoRA(r=2, dropout=0.1), summary=False), Look())
    assert seen == {"adapter": True, "dropout": False, "norm": False}
    whole = Lit()
    fitted(tmp_path, whole, PEFT(FullFineTuning(), summary=False))
    assert whole.net["norm"].running_mean.abs().sum() > 0, "full fine-tuning must update running statistics"


def test_the_optimizer_may_be_given_all_parameters_or_the_trainable_ones(tmp_path: Path) -> None:
    class Filtered(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["lr"])

    everything, filtered = Lit(), Filtered()
    fitted(tmp_path, everything, lora(), Reseed())
    fitted(tmp_path, filtered, lora(), Reseed())
    for key, value in everything.state_dict().items():
        assert torch.equal(value, filtered.state_dict()[key]), key


def test_an_optimizer_without_the_adapters_is_an_error(tmp_path: Path) -> None:
    class Early(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.chosen = list(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.chosen, lr=0.1)

    with pytest.raises(
        AdapterError, match=r"are in no optimizer \('net\.q_proj\.adapters\.default\.lora_A'.*configure_opt"
    ):
        fitted(tmp_path, Early())


def test_frozen_adapters_are_an_error(tmp_path: Path) -> None:
    class Freezes(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.requires_grad_(False)

    with pytest.raises(AdapterError, match="no parameter of Lit requires gradients"):
        fitted(tmp_path, Lit(), lora(), Freezes())


def test_processes_that_are_forked_need_a_module_adapted_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, module = trainer(tmp_path, callback := lora(), strategy="ddp_fork", devices=2), Lit()
    with pytest.raises(AdapterError, match=r"starts its processes by fork.*inject\(module, method\)"):
        callback.setup(made, module, "fit")
    inject(module, callback.methods["default"])
    callback.setup(made, module, "fit")


def test_a_trainer_of_the_other_package_is_an_error() -> None:
    class Trainer:
        callbacks: ClassVar[list[L.Callback]] = []

    Trainer.__module__ = "pytorch_lightning.trainer.trainer"
    with pytest.raises(AdapterError, match="the Trainer to pytorch_lightning.*import lightning as L"):
        lora().setup(Trainer(), Lit(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "averaging", [EMAWeightAveraging(), StochasticWeightAveraging(0.01)], ids=lambda c: type(c).__name__
)
def test_averaging_before_the_adapters_is_an_error(averaging: L.Callback, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"comes before PEFT.*callbacks=\[PEFT\(...\), "):
        fitted(tmp_path, Lit(), averaging, lora())


def test_statistics_that_moved_are_given_back_by_a_checkpoint_from_before(tmp_path: Path) -> None:
    module = Lit()
    fitted(tmp_path, module).save_checkpoint(tmp_path / "a.ckpt")
    x = torch.ones(2, 7)
    expected = module.eval()(x)
    module.train()(torch.randn(9, 7))  # moves the running statistics, as the learning rate finder does
    assert not torch.equal(module.eval()(x), expected)
    trainer(tmp_path, lora()).test(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(module.eval()(x), expected)


def test_the_learning_rate_finder_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    module = Lit()
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    fitted(tmp_path, module, lora(), finder, Reseed())
    without = Lit()
    fitted(tmp_path, without, lora(), Reseed())
    for key, value in without.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key


def test_the_same_callback_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        (AdapterError, RuntimeError), match="PEFT: the Trainer has 2 callbacks|more than one stateful callback"
    ):
        fitted(tmp_path, Lit(), lora(), lora())
    module = Lit()
    second = PEFT(BitFit(modules_to_save=()), name="second", summary=False)
    fitted(tmp_path, module, PEFT(LoRA(r=2), summary=False), second)
    assert {key.rpartition(".")[2] for key, p in module.named_parameters() if p.requires_grad} >= {"lora_A", "bias"}


@in_every_place
def test_a_target_that_matches_nothing_is_an_error_once_the_model_is_complete(
    cls: type[Lit], where: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="q_porj.*Did you mean 'q_proj'"):
        fitted(tmp_path, cls(where), PEFT(LoRA(r=2, target_modules=("v_proj", "q_porj"))))


def test_a_module_without_any_model_is_an_error(tmp_path: Path) -> None:
    class Empty(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(TargetError, match="Empty has no parameters to adapt"):
        trainer(tmp_path, lora()).fit(Empty(), loader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PEFT(), "give a method such as LoRA"),
        (lambda: PEFT("lroa"), "unknown method 'lroa'. Did you mean 'lora'"),
        (lambda: PEFT(nn.Linear(2, 2)), "expected a method such as LoRA"),  # type: ignore[arg-type]
        (lambda: PEFT([]), "one or more methods"),
        (lambda: PEFT([LoRA(), LoRA(r=2)]), "methods of different kinds"),
        (lambda: PEFT(init_from="nowhere"), "there is no adapter_model.safetensors in nowhere"),
    ],
)
def test_wrong_arguments_say_what_is_right(make: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path, Lit()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(AdapterFileError, match=r"made with .*r=2.* but the model has .*r=3"):
        trainer(tmp_path, PEFT(LoRA(r=3, modules_to_save="output-head"))).test(
            Lit(), loader(), ckpt_path=tmp_path / "a.ckpt"
        )
    other = Lit()
    nn.init.ones_(other.net["q_proj"].weight)
    with pytest.raises(AdapterFileError, match="the same model with other weights"):
        trainer(tmp_path, lora()).test(other, loader(), ckpt_path=tmp_path / "a.ckpt")
    plain = trainer(tmp_path)
    plain.fit(Lit(), loader(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        trainer(tmp_path, lora()).test(Lit(), loader(), ckpt_path=tmp_path / "plain.ckpt")
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        PEFT.load_from_checkpoint(Lit, tmp_path / "plain.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del stored["state_dict"]["net.q_proj.adapters.default.lora_A"]
    torch.save(stored, tmp_path / "a.ckpt")
    with pytest.raises(AdapterFileError, match=r"1 tensors are missing: net\.q_proj\.adapters\.default\.lora_A"):
        trainer(tmp_path, lora()).test(Lit(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_model_adapted_by_hand_before_is_used_as_it_is(tmp_path: Path) -> None:
    module = Lit()
    inject(module.net, LoRA(r=2, modules_to_save="output-head"))
    fitted(tmp_path, module)
    assert len(adapters_of(module)) == 2
    save_adapter(module, tmp_path / "folder")
    assert (tmp_path / "folder" / "adapter_model.safetensors").is_file()


def test_what_trains_beside_a_part_that_was_adapted_by_hand_is_saved_too(tmp_path: Path) -> None:
    module = Lit()
    inject(module.net["q_proj"], LoRA(r=2))
    fitted(tmp_path, module, PEFT(LoRA(r=2), summary=False)).save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["net.head.weight"], module.net["head"].weight)
    assert "net.q_proj.weight" not in stored


def test_an_adapter_that_no_gradient_reaches_is_reported(tmp_path: Path) -> None:
    def hidden_read(layer: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)

    class Hides(Lit):
        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            return net["head"](net["v_proj"](torch.tanh(hidden_read(net["q_proj"], x))))

    with pytest.warns(UserWarning, match=r"1 adapters got no gradient .*'net\.q_proj \(LowRank\)'"):
        fitted(tmp_path, Hides())


def test_a_module_of_the_users_that_is_called_adapters_is_base_like_any_other(tmp_path: Path) -> None:
    class Named(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net["adapters"] = nn.ModuleDict({"default": nn.Linear(5, 5), "norm": nn.BatchNorm1d(5)})

        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            inner = net["adapters"]
            return net["head"](inner["norm"](inner["default"](net["v_proj"](torch.tanh(net["q_proj"](x))))))

    torch.manual_seed(5)
    module = Named()
    made = fitted(tmp_path, module, PEFT(LoRA(r=2, target_modules="q_proj"), summary=False))
    made.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {f"net.q_proj.adapters.default.lora_{x}" for x in "AB"}
    torch.manual_seed(6)  # its own module "adapters" starts elsewhere: another base
    with pytest.raises(AdapterFileError, match="other weights"):
        trainer(tmp_path, PEFT(LoRA(r=2, target_modules="q_proj"), summary=False)).test(
            Named(), loader(), ckpt_path=tmp_path / "a.ckpt"
        )


def test_the_users_own_checkpoint_hooks_still_run(tmp_path: Path) -> None:
    class Hooked(Lit):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = sorted(checkpoint["state_dict"])

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint["mine"]

    fitted(tmp_path, Hooked()).save_checkpoint(tmp_path / "a.ckpt")
    assert "net.q_proj.weight" in torch.load(tmp_path / "a.ckpt", weights_only=True)["mine"]
    module = Hooked()
    trainer(tmp_path, lora()).test(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert "net.q_proj.weight" in module.loaded


def test_an_adapted_module_can_be_copied_and_pickled(tmp_path: Path) -> None:
    module = Lit()
    fitted(tmp_path, module)
    x = torch.ones(2, 7)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x), module.eval()(x))


def test_the_table_counts_what_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Lit()
    fitted(tmp_path, module, PEFT(LoRA(r=2, modules_to_save="output-head")), max_steps=1)
    shown = capsys.readouterr().out
    assert "LoRA(modules_to_save='output-head', r=2)" in shown
    trained = 2 * (7 + 11) + 2 * (11 + 5) + (5 * 3 + 3)
    assert f" {trained} " in shown
    assert "trained in place" in shown


def test_the_trainable_count_is_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    fitted(tmp_path, Lit(), logger=CSVLogger(tmp_path, name="", version=""), max_steps=1, log_every_n_steps=1)
    header, first = (tmp_path / "metrics.csv").read_text().splitlines()[:2]
    assert dict(zip(header.split(","), first.split(","), strict=True))["trainable_parameters"] == "86"
