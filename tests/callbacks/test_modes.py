"""The ways in which people run a Trainer: adapters train in each of them, and the base stays bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.utils.checkpoint
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, AdapterError, LoRA, inject, load_adapter, save_adapter, set_active
from lightning_peft.engine import adapters_of
from tests.callbacks.nets import Lit, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    # torch says so of validation too, where nothing is to be differentiated
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]


def lora(**kwargs: Any) -> PEFT:
    return PEFT(LoRA(r=2, **kwargs), summary=False)


class Reseed(L.Callback):
    """The same dropout mask at a step, whatever ran before it."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Data(L.LightningDataModule):
    """The data of `loader`, in batches whose size can be searched."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def check(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Every adapter moved; of the base, what is frozen did not move."""
    assert adapters_of(module)
    for name, _, adapter in adapters_of(module):
        assert adapter.lora_B.any(), name
    for name, parameter in module.named_parameters():
        if name in before and not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name


def fitted(folder: Path, module: L.LightningModule, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    torch.manual_seed(0)
    before = copied(module)
    made = trainer(folder, *(callbacks or (lora(),)), **kwargs)
    made.fit(module, datamodule=Data())
    check(module, before)
    return made


# activation checkpointing


class Checkpointed(Lit):
    """The same net, its two halves recomputed in the backward pass."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        h = checkpoint(lambda x: torch.tanh(net["q_proj"](x)), x, use_reentrant=self.reentrant)
        h = checkpoint(lambda x: net["dropout"](net["norm"](net["v_proj"](x))), h, use_reentrant=self.reentrant)
        return net["head"](h)


@pytest.mark.parametrize("modules_to_save", ["head", ()], ids=["with a head", "adapters alone"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_number(reentrant: bool, modules_to_save: Any, tmp_path: Path) -> None:
    plain, module = Lit(), Checkpointed()
    module.reentrant = reentrant
    for m in (plain, module):
        fitted(tmp_path, m, lora(modules_to_save=modules_to_save), Reseed())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key


def test_a_block_without_adapters_may_be_checkpointed_too(tmp_path: Path) -> None:
    fitted(tmp_path, Checkpointed(), lora(target_modules="v_proj"))


def test_checkpointing_itself_is_as_before_when_training_ends_well_or_not(tmp_path: Path) -> None:
    class Fails(Checkpointed):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert torch.utils.checkpoint.CheckpointFunction is not CheckpointFunction
            super().training_step(batch, batch_idx)
            raise RuntimeError("no")

    failed, ended = Fails(), Checkpointed()
    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, lora()).fit(failed, datamodule=Data())
    fitted(tmp_path, ended, lora(), PEFT("bitfit", name="second", summary=False))
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction
    for module in (failed, ended):
        assert "training_step" not in vars(module)


def test_a_search_by_the_tuner_trains_inside_activation_checkpoints_too(tmp_path: Path) -> None:
    # it runs without callbacks; with nothing trainable outside of the checkpoints, backward would be an error
    module = Checkpointed()
    found = Tuner(trainer(tmp_path, lora())).lr_find(module, datamodule=Data(), num_training=6, update_attr=False)
    assert found is not None
    assert len(set(found.results["loss"])) > 1


def test_a_training_step_gets_the_arguments_that_it_asks_for(tmp_path: Path) -> None:
    class Brief(Lit):
        def training_step(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
            return F.cross_entropy(self(batch[0]), batch[1])

    module = Brief()
    fitted(tmp_path, module)
    module.training_step = module.training_step  # type: ignore[method-assign]  # somebody patched the instance
    mine = module.training_step
    fitted(tmp_path, module)
    assert vars(module)["training_step"] == mine


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*deprecated")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("architecture", ["Bert", "Llama"])
def test_transformers_train_with_activation_checkpointing(architecture: str, reentrant: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = getattr(transformers, f"{architecture}Config")(**sizes, vocab_size=29, num_labels=3, pad_token_id=0)
    net = getattr(transformers, f"{architecture}ForSequenceClassification")(config).train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    class Text(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(input_ids=batch[0], labels=batch[1]).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, before = Text(), copied(net)
    data = TensorDataset(torch.randint(1, 29, (12, 7)), torch.randint(0, 3, (12,)))
    trainer(tmp_path, lora(), max_epochs=1).fit(module, DataLoader(data, batch_size=4))
    check(net, before)


# compilation


def compiled_whole(module: Lit) -> Any:
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: Lit) -> Any:
    module.compile(backend="aot_eager")
    return module


def compiled_layers(module: Lit) -> Any:
    module.net["q_proj"] = torch.compile(module.net["q_proj"], backend="aot_eager")
    module.net["head"] = torch.compile(module.net["head"], backend="aot_eager")
    module.net["v_proj"].compile(backend="aot_eager")
    module.eval()(torch.randn(3, 7))  # they have been compiled as plain layers
    return module.train()


def adapted_and_compiled(module: Lit) -> Any:
    inject(module, LoRA(r=2, target_modules=("q_proj", "net.v_proj"), modules_to_save="output-head"))
    return torch.compile(module, backend="aot_eager")


@pytest.mark.filterwarnings("ignore:.*attribute of a Tensor that is not a leaf")  # dynamo looks at its inputs
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_layers, adapted_and_compiled])
def test_a_compiled_model_trains_and_its_files_are_those_of_a_plain_one(compiled: Any, tmp_path: Path) -> None:
    def peft() -> PEFT:
        return lora(target_modules=("q_proj", "net.v_proj"), modules_to_save="output-head")

    plain, module = Lit(), Lit()
    made = fitted(tmp_path, plain, peft(), Reseed())
    torch.manual_seed(0)
    given = compiled(module)
    before = copied(module)
    torch.manual_seed(0)
    with_compiled = trainer(tmp_path, peft(), Reseed())
    with_compiled.fit(given, datamodule=Data())
    check(module, before)
    expected = torch.cat(made.predict(plain, loader()))
    torch.testing.assert_close(torch.cat(with_compiled.predict(module, loader())), expected)
    # both ways: what was trained compiled loads into a plain model, and the other way round
    for name, source, target in (("a", with_compiled, Lit()), ("b", made, compiled(Lit()))):
        source.save_checkpoint(tmp_path / f"{name}.ckpt")
        keys = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"].keys()
        assert not [key for key in keys if "_orig_mod" in key]
        answers = trainer(tmp_path, peft()).predict(target, loader(), ckpt_path=tmp_path / f"{name}.ckpt")
        torch.testing.assert_close(torch.cat(answers), expected)
    for source, target in ((module, Lit()), (plain, compiled(Lit()))):
        load_adapter(getattr(target, "_orig_mod", target), save_adapter(source, tmp_path / "folder"))
        torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(target, loader())), expected)


def test_loading_scaling_and_switching_adapters_compile_nothing_anew(tmp_path: Path) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net, x = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)), torch.randn(5, 7)
    for i, name in enumerate(("first", "second"), start=1):
        inject(net, LoRA(r=2, target_modules="Linear"), name)
        for _, _, adapter in adapters_of(net, name):
            nn.init.constant_(adapter.lora_B, 0.1 * i)
        save_adapter(net, tmp_path / name, name)
    compiled = torch.compile(net, backend=backend)

    def cycle() -> int:
        answers = []
        for i, name in enumerate(("first", "second"), start=1):
            set_active(net, name)
            answers.append(compiled(x).detach())
            torch.testing.assert_close(answers[-1], net(x))
            load_adapter(net, tmp_path / ("second" if name == "first" else "first"), name)
            for _, _, adapter in adapters_of(net, name):
                adapter.scaling.mul_(i + 1)
            answers.append(compiled(x).detach())
            torch.testing.assert_close(answers[-1], net(x))
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(answers, 2))
        return len(graphs)

    assert cycle() == cycle() == cycle()


# stages, options and callbacks of the Trainer


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_another_stage_before_fit_does_no_harm(stage: str, inference_mode: bool, tmp_path: Path) -> None:
    module, plain = Lit(), Lit()
    torch.manual_seed(0)
    made = trainer(tmp_path, lora(), Reseed(), inference_mode=inference_mode)
    getattr(made, stage)(module, loader())
    before = copied(plain)
    made.fit(module, datamodule=Data())
    check(module, before)
    fitted(tmp_path, plain, lora(), Reseed())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key


@pytest.mark.filterwarnings("ignore:.*self.log.*barebones")
@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 1},
        {"fast_dev_run": True},
        {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"detect_anomaly": True},
        {"limit_train_batches": 2, "limit_val_batches": 0.5},
        {"reload_dataloaders_every_n_epochs": 1},
        {"deterministic": True},
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2},
        {"use_distributed_sampler": False, "max_epochs": -1, "max_steps": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    if "barebones" in options:
        options |= {"enable_model_summary": None}
    fitted(tmp_path, Lit(), **options)


def test_clipping_and_accumulation_act_on_the_adapters(tmp_path: Path) -> None:
    class Plain(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=1.0)

    module = Plain()
    clipped = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 3, "max_steps": 1}
    torch.manual_seed(0)
    start = inject(Plain(), LoRA(r=2))
    fitted(tmp_path, module, **clipped)
    moved = [(p - start.get_parameter(n)).flatten() for n, p in module.named_parameters() if p.requires_grad]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "callback",
    [
        GradientAccumulationScheduler({0: 2, 1: 3}),
        EarlyStopping("val_loss", patience=1),
        LearningRateFinder(num_training_steps=5, update_attr=False),
        BatchSizeFinder("power", max_trials=1, steps_per_trial=2),
        BatchSizeFinder("binsearch", max_trials=2, steps_per_trial=2),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_of_lightning(callback: L.Callback, tmp_path: Path) -> None:
    fitted(tmp_path, Lit(), lora(), callback)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_a_search_by_the_tuner_leaves_every_value_as_it_was(search: str, tmp_path: Path) -> None:
    module, data = Lit(), Data(2)
    made = trainer(tmp_path, lora())
    made.validate(module, datamodule=data, verbose=False)  # injects
    before = {key: value.clone() for key, value in module.state_dict().items()}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    options = {"num_training": 6} if search == "lr_find" else {"max_trials": 2, "steps_per_trial": 3}
    getattr(Tuner(made), search)(module, datamodule=data, **options)
    assert len(adapters_of(module)) == 2
    for key, value in before.items():
        assert torch.equal(value, module.state_dict()[key]), key
    assert frozen == {name for name, p in module.named_parameters() if not p.requires_grad}
    start = copied(Lit())
    made.fit(module, datamodule=data)
    check(module, start)


def test_a_callback_that_unfreezes_the_base_is_refused(tmp_path: Path) -> None:
    for callbacks in ((lora(), BackboneFinetuning()), (BackboneFinetuning(), lora())):
        module = Lit()
        module.backbone = module.net["q_proj"]  # type: ignore[assignment]
        with pytest.raises(AdapterError, match="BackboneFinetuning unfreezes the base.*modules_to_save"):
            trainer(tmp_path, *callbacks).fit(module, datamodule=Data())


# optimizers


class Adversarial(L.LightningModule):
    """A generator against a discriminator, each with an optimizer of its own."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.toggle = False, toggle
        self.generator = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7))
        self.discriminator = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        fake = self.generator(torch.randn(len(batch[0]), 4))
        judge = self.discriminator
        # the discriminator first: no gradient reaches the generator then
        losses = [lambda: (F.softplus(-judge(batch[0])) + F.softplus(judge(fake.detach()))).mean()]
        losses.append(lambda: F.softplus(-judge(self.generator(torch.randn(len(batch[0]), 4)))).mean())
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = (self.discriminator, self.generator)
        return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in parts], []


@pytest.mark.parametrize("whole", [True, False], ids=["discriminator whole", "adapters on both"])
@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "not toggled"])
def test_manual_optimization_of_two_networks(toggle: bool, whole: bool, tmp_path: Path) -> None:
    module = Adversarial(toggle)
    before = copied(module)
    one = LoRA(r=1, target_modules=r"generator\.\d", modules_to_save="discriminator")
    made = trainer(tmp_path, PEFT(one if whole else LoRA(r=1, target_modules="Linear"), summary=False))
    made.fit(module, loader())
    assert len(adapters_of(module)) == (2 if whole else 4)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    in_place = {name for name in before if name.startswith("discriminator")} if whole else set()
    assert trained == in_place | {name for name in module.state_dict() if "lora" in name}
    for name, value in before.items():
        parameter = module.get_parameter(name)
        assert torch.equal(parameter, value) != (name in in_place), name
    assert all(adapter.lora_B.any() for _, _, adapter in adapters_of(module))
    made.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == trained


def test_an_optimizer_that_evaluates_the_loss_again_works(tmp_path: Path) -> None:
    class Repeats(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    fitted(tmp_path, Repeats())


def test_what_is_trained_in_place_without_a_gradient_is_reported(tmp_path: Path) -> None:
    class Headless(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net["second_head"] = nn.Linear(5, 3)

    names = (
        r"2 parameters that are trained in place got no gradient .*'net\.second_head\.weight', 'net\.second_head\.bias'"
    )
    with pytest.warns(UserWarning, match=names):
        trainer(tmp_path, lora(modules_to_save=("head", "second_head"))).fit(Headless(), datamodule=Data())
