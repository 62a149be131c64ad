"""What is in a checkpoint, what of it is refused, and what comes back, in a real Trainer."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, SequentialLR

from lightning_peft import PEFT, SSF, AdapterError, BitFit, LoRA, disabled, merge
from lightning_peft.engine import Adapter, AdapterFileError, MergeError, Method, Target, TargetedMethod, adapters_of
from tests.callbacks.nets import Lit, LitConfigured, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]

METHOD = LoRA(r=2, modules_to_save="output-head")
X = torch.linspace(-1, 1, 21).view(3, 7)


def peft(**kwargs: Any) -> PEFT:
    return PEFT(kwargs.pop("method", METHOD), **{"summary": False, **kwargs})


class Reseed(L.Callback):
    """The same dropout mask at a step, however the run came to it (Lightning does not store the generator)."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def fit(folder: Path, module: L.LightningModule, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    torch.manual_seed(0)
    resume = {"ckpt_path": kwargs.pop("ckpt_path")} if "ckpt_path" in kwargs else {}
    made = trainer(folder, *(callbacks or (peft(),)), Reseed(), **kwargs)
    made.fit(module, loader(), loader(), **resume)
    return made


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def rewrite(path: Path, **changes: Any) -> Path:
    checkpoint = read(path)
    for key, change in changes.items():
        change(checkpoint[key])
    torch.save(checkpoint, path)
    return path


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, theirs[key]), key


def assert_base_untouched(module: nn.Module, *but: str, base: nn.Module | None = None) -> None:
    after = module.state_dict()
    for key, value in (base or Lit()).state_dict().items():
        if not key.startswith(but):
            assert torch.equal(value, after[key]), key


# full and merged


def test_a_full_checkpoint_brings_its_base_along_and_resumes_exactly(tmp_path: Path) -> None:
    through, resumed = Lit(), Lit()
    fit(tmp_path, through, peft(save="full"), max_epochs=4)
    fit(tmp_path, Lit(), peft(save="full"), max_epochs=2).save_checkpoint(tmp_path / "full.ckpt")
    assert read(tmp_path / "full.ckpt")["state_dict"].keys() == through.state_dict().keys()
    nn.init.zeros_(resumed.net["q_proj"].weight)  # another base: that of the file counts
    nn.init.zeros_(resumed.net["head"].weight)
    fit(tmp_path, resumed, peft(save="full"), max_epochs=4, ckpt_path=tmp_path / "full.ckpt")
    assert_equal_states(through, resumed)
    with disabled(resumed):
        torch.testing.assert_close(resumed.eval()(X), Lit().eval()(X), rtol=0, atol=0)


def test_a_full_checkpoint_loads_as_a_module(tmp_path: Path) -> None:
    module = Lit()
    fit(tmp_path, module, peft(save="full")).save_checkpoint(tmp_path / "full.ckpt")
    loaded = PEFT.load_from_checkpoint(Lit, tmp_path / "full.ckpt")
    assert_equal_states(module, loaded)


@pytest.mark.parametrize(("cls", "where"), [(Lit, "__init__"), (LitConfigured, "configure_model")])
def test_a_merged_checkpoint_loads_into_the_plain_class(cls: type[Lit], where: str, tmp_path: Path) -> None:
    module = cls(where)
    best = ModelCheckpoint(tmp_path, filename="merged")
    fit(tmp_path, module, peft(save="merged"), best, enable_checkpointing=True)
    path = tmp_path / "merged.ckpt"
    plain = cls.load_from_checkpoint(path)
    stored = read(path)
    assert stored["peft"]["holds"] == "merged"
    assert {k: v.shape for k, v in stored["state_dict"].items()} == {k: v.shape for k, v in Lit().state_dict().items()}
    assert len(adapters_of(module)) == 2, "saving must leave the live model as it is"
    torch.testing.assert_close(plain.eval()(X), module.eval()(X))
    assert not torch.allclose(plain(X), Lit().eval()(X), atol=1e-3), "the adapters must have moved"
    merge(module)  # what merging the live model gives, bit for bit
    assert_equal_states(plain, module)


def test_a_merged_checkpoint_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    module = Lit()
    module.net["q_proj"].to(torch.bfloat16)

    class Mixed(Lit):
        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            return net["head"](net["v_proj"](net["q_proj"](x.to(torch.bfloat16)).float()))

    module = Mixed()
    module.net["q_proj"].to(torch.bfloat16)
    fit(tmp_path, module, peft(save="merged")).save_checkpoint(tmp_path / "merged.ckpt")
    stored = read(tmp_path / "merged.ckpt")["state_dict"]
    adapter: Any = module.net["q_proj"].adapters["default"]  # type: ignore[union-attr]
    exact = module.net["q_proj"].weight.float() + adapter.scaling * adapter.lora_B @ adapter.lora_A
    assert stored["net.q_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["net.q_proj.weight"], exact.to(torch.bfloat16))
    assert stored["net.v_proj.weight"].dtype == torch.float32


def test_a_module_that_is_used_twice_is_merged_under_both_names(tmp_path: Path) -> None:
    class Twice(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.net["q_proj"]

    module = Twice()
    fit(tmp_path, module, peft(save="merged")).save_checkpoint(tmp_path / "merged.ckpt")
    stored = read(tmp_path / "merged.ckpt")["state_dict"]
    assert torch.equal(stored["again.weight"], stored["net.q_proj.weight"])
    assert not torch.equal(stored["again.weight"], module.again.weight)


def test_a_merged_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    fit(tmp_path, Lit(), peft(save="merged")).save_checkpoint(tmp_path / "merged.ckpt")
    for save in ("adapter", "merged"):
        with pytest.raises(AdapterFileError, match=r"merged weights.*Lit\.load_from_checkpoint.*save='adapter'"):
            fit(tmp_path, Lit(), peft(save=save), ckpt_path=tmp_path / "merged.ckpt")
    with pytest.raises(AdapterFileError, match="merged weights"):
        PEFT.load_from_checkpoint(Lit, tmp_path / "merged.ckpt")


class Gate(Adapter):
    """No change of weights."""

    def __init__(self, target: Target, method: Method) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, layer: Any) -> Tensor:
        return layer(x) * (self.gate * x.mean())


class Gated(TargetedMethod):
    adapter_types = {"linear": Gate}

    @classmethod
    def examples(cls) -> tuple["Gated", ...]:
        return (cls(),)


class TiedHead(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net["tied"] = nn.Linear(7, 11)
        self.net["tied"].weight = self.net["q_proj"].weight


@pytest.mark.parametrize(
    ("module", "method", "message"),
    [
        (Lit, Gated(), "cannot be merged: Gate is not a change of weights"),
        (Lit, SSF(target_modules="v_proj"), "adds a bias to 'net.v_proj'.*exclude_modules"),
        (TiedHead, LoRA(r=2, target_modules="q_proj"), "weight of 'net.q_proj' is tied to 'net.tied.weight'"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_training(
    module: type[Lit], method: Method, message: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, peft(method=method, save="merged"))
    with pytest.raises(MergeError, match=message):
        made.fit(module(), loader(), loader())
    assert made.global_step == 0


def test_callbacks_that_ask_for_different_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="save='adapter' and save='full'. Give all the same"):
        fit(tmp_path, Lit(), peft(), peft(method=BitFit(), name="second", save="full"))
    with pytest.raises(AdapterError, match="save must be one of 'adapter', 'full', 'merged', got 'all'"):
        peft(save="all")


# optimizer state by name


def groups_all(module: Lit) -> Any:
    return module.parameters()


def groups_trainable(module: Lit) -> Any:
    return [p for p in module.parameters() if p.requires_grad]


def groups_reversed(module: Lit) -> Any:
    return list(module.parameters())[::-1]


def groups_split(module: Lit) -> Any:
    named = list(module.named_parameters())
    return [
        {"params": [p for n, p in named if "head" not in n]},
        {"params": [p for n, p in named if "head" in n], "weight_decay": 0.0},
    ]


def tenth_less(step: int) -> float:
    return 0.9**step


class Grouped(Lit):
    """Its groups are made by ``grouping``; the rate falls by a tenth with each step."""

    grouping: Any = staticmethod(groups_all)

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(type(self).grouping(self), lr=0.02)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, tenth_less), "interval": "step"}]


def grouped(grouping: Any) -> Lit:
    return type("Grouped", (Grouped,), {"grouping": staticmethod(grouping)})()


def moments(module: L.LightningModule, optimizer: Any) -> dict[str, Tensor]:
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: state["exp_avg"] for p, state in optimizer.state.items()}


class Held(L.Callback):
    """The optimizer states as they were when training started."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.moments = {n: m.clone() for o in trainer.optimizers for n, m in moments(pl_module, o).items()}
        self.groups = [
            {k: v for k, v in g.items() if k != "params"} for o in trainer.optimizers for g in o.param_groups
        ]


@pytest.mark.parametrize("after", [groups_trainable, groups_reversed, groups_split], ids=lambda f: f.__name__)
@pytest.mark.parametrize("before", [groups_all, groups_split, groups_trainable], ids=lambda f: f.__name__)
def test_optimizer_state_follows_the_names_of_parameters(before: Any, after: Any, tmp_path: Path) -> None:
    first = grouped(before)
    made = fit(tmp_path, first, max_epochs=2)
    made.save_checkpoint(tmp_path / "a.ckpt")
    held, second = Held(), grouped(after)
    resumed = fit(tmp_path, second, peft(), held, max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    expected = moments(first, made.optimizers[0])
    assert held.moments.keys() == expected.keys()
    for name, moment in expected.items():
        assert torch.equal(held.moments[name], moment), name
    reached = 0.02 * 0.9**12
    assert [group["lr"] for group in held.groups] == [pytest.approx(reached)] * len(held.groups)
    decays = [0.01, 0.0] if after is groups_split else [0.01]
    assert [group["weight_decay"] for group in held.groups] == decays
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.9**24)


def test_splitting_groups_that_mean_the_same_changes_nothing(tmp_path: Path) -> None:
    through, resumed = grouped(groups_all), grouped(groups_trainable)
    fit(tmp_path, through, max_epochs=4)
    fit(tmp_path, grouped(groups_reversed), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, resumed, max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert_equal_states(through, resumed)


def test_rates_that_tell_split_groups_apart_stay_as_configured(tmp_path: Path) -> None:
    def two_rates(module: Lit) -> Any:
        groups = groups_split(module)
        groups[1] |= {"lr": 0.005, "weight_decay": 0.01}
        return groups

    fit(tmp_path, grouped(groups_all), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    held = Held()
    fit(tmp_path, grouped(two_rates), peft(), held, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert [group["lr"] for group in held.groups] == [0.02, 0.005]
    assert [group["weight_decay"] for group in held.groups] == [0.01, 0.01]


def test_values_that_told_joined_groups_apart_become_those_configured_now(tmp_path: Path) -> None:
    fit(tmp_path, grouped(groups_split), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")

    def joined(module: Lit) -> Any:
        return [{"params": groups_trainable(module), "weight_decay": 0.3, "betas": (0.5, 0.9)}]

    held = Held()
    fit(tmp_path, grouped(joined), peft(), held, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    (group,) = held.groups
    assert group["weight_decay"] == 0.3  # two values before
    assert group["betas"] == (0.9, 0.999)  # one value before: resuming goes on with it, as always
    assert group["lr"] == pytest.approx(0.02 * 0.9**12)


def test_optimizers_that_are_given_names_keep_the_names_of_now(tmp_path: Path) -> None:
    def named(module: Lit) -> Any:
        return [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    fit(tmp_path, grouped(lambda module: module.named_parameters()), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    held, module = Held(), grouped(named)
    fit(tmp_path, module, peft(), held, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert held.groups[0]["param_names"] == [name for name, _ in named(module)]


def test_schedulers_inside_schedulers_follow_the_groups(tmp_path: Path) -> None:
    class Sequence(Grouped):
        def configure_optimizers(self) -> Any:
            optimizer = AdamW(type(self).grouping(self), lr=0.02)
            parts = [ExponentialLR(optimizer, 0.9), LambdaLR(optimizer, tenth_less)]
            return [optimizer], [{"scheduler": SequentialLR(optimizer, parts, milestones=[6]), "interval": "step"}]

    class Split(Sequence):
        grouping = staticmethod(groups_split)

    through, split = Sequence(), Split()
    end = fit(tmp_path, through, max_epochs=3).optimizers[0].param_groups[0]["lr"]
    fit(tmp_path, Sequence(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    made = fit(tmp_path, split, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert [group["lr"] for group in made.optimizers[0].param_groups] == [pytest.approx(end)] * 2


class TwoOptimizers(Lit):
    """One for the head, one for the rest; stepped by hand. ``swap`` changes the order within each."""

    def __init__(self, swap: bool = False) -> None:
        super().__init__()
        self.swap, self.automatic_optimization = swap, False

    def configure_optimizers(self) -> Any:
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        named = named[::-1] if self.swap else named
        return [
            AdamW([p for n, p in named if "head" not in n], lr=0.02),
            SGD([p for n, p in named if "head" in n], lr=0.02, momentum=0.9),
        ]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()


def test_each_of_two_optimizers_is_put_in_order_by_itself(tmp_path: Path) -> None:
    through, resumed = TwoOptimizers(), TwoOptimizers(swap=True)
    fit(tmp_path, through, max_epochs=4)
    fit(tmp_path, TwoOptimizers(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, resumed, max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert_equal_states(through, resumed)
    with pytest.raises(AdapterFileError, match="state of 2 optimizers, but configure_optimizers makes 1"):
        fit(tmp_path, Lit(), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")


def test_parameters_that_are_new_in_the_optimizer_start_afresh_with_a_warning(tmp_path: Path) -> None:
    class HeadAlone(Lit):
        def configure_optimizers(self) -> Any:
            self.net["q_proj"].adapters["default"].requires_grad_(self.everything)  # type: ignore[union-attr]
            return AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)

        everything = False

    class Everything(HeadAlone):
        everything = True

    fit(tmp_path, HeadAlone(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"no optimizer state for 2 parameters.*lora_A, net\.q_proj.*lora_B\."):
        fit(tmp_path, Everything(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")


def test_without_the_names_the_error_is_that_of_torch(tmp_path: Path) -> None:
    fit(tmp_path, grouped(groups_all), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    rewrite(tmp_path / "a.ckpt", peft=lambda facts: facts.pop("optimizer_param_names"))
    with pytest.raises(ValueError, match="doesn't match the size"):
        fit(tmp_path, grouped(groups_trainable), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")


# averaging


class Pretrained(Lit):
    """With running statistics that are not those of a new layer, and that rounding would move."""

    def __init__(self) -> None:
        super().__init__()
        self.net["norm"].running_mean.copy_(torch.linspace(1, 2, 5) / 7)  # type: ignore[operator, union-attr]
        self.net["norm"].running_var.copy_(torch.linspace(1.1, 1.7, 5))  # type: ignore[operator, union-attr]


def ema(**kwargs: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.7, **kwargs)


@pytest.mark.parametrize(
    "make", [ema, lambda: ema(use_buffers=False), WeightAveraging], ids=["ema", "no-buffers", "mean"]
)
@pytest.mark.parametrize("where", ["__init__", "configure_model"])
def test_averaging_leaves_the_base_bit_for_bit_and_averages_the_rest(make: Any, where: str, tmp_path: Path) -> None:
    class Follow(L.Callback):
        """Averages one adapter matrix by hand."""

        seen: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append(pl_module.net["q_proj"].adapters["default"].lora_B.detach().clone())

    averaging, follow = make(), Follow()
    follow.seen = []
    module = Pretrained() if where == "__init__" else LitConfigured(where)
    base = Pretrained() if where == "__init__" else Lit()
    fit(tmp_path, module, peft(), averaging, follow, max_epochs=3)
    assert_base_untouched(module, "net.head", base=base)
    assert_base_untouched(averaging._average_model.module, "net.head", base=base)
    expected = follow.seen[0]
    for step, value in enumerate(follow.seen[1:], start=1):
        share = 1 / (step + 1) if type(averaging) is WeightAveraging else 0.3
        expected = (1 - share) * expected + share * value
    torch.testing.assert_close(module.net["q_proj"].adapters["default"].lora_B, expected)  # type: ignore[union-attr]


def test_a_checkpoint_with_averaged_weights_holds_no_base_and_resumes_exactly(tmp_path: Path) -> None:
    through, resumed = Lit(), Lit()
    averages = [ema(), ema()]
    fit(tmp_path, through, peft(), averages[0], max_epochs=4)
    last = ModelCheckpoint(tmp_path, filename="half")
    fit(tmp_path, Lit(), peft(), ema(), last, max_epochs=2, enable_checkpointing=True)
    stored = read(tmp_path / "half.ckpt")
    own = {key for key in through.state_dict() if "adapters" in key or "head" in key}
    assert set(stored["state_dict"]) == set(stored["current_model_state"]) == own
    assert not torch.equal(stored["state_dict"]["net.head.bias"], stored["current_model_state"]["net.head.bias"])
    fit(tmp_path, resumed, peft(), averages[1], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal_states(through, resumed)
    assert_equal_states(averages[0]._average_model, averages[1]._average_model)


def test_averages_start_from_a_base_that_was_loaded_late(tmp_path: Path) -> None:
    class LoadsInSetup(Lit):
        def setup(self, stage: str) -> None:
            nn.init.constant_(self.net["q_proj"].weight, 0.1)

    averaging, module = ema(), LoadsInSetup()
    fit(tmp_path, module, peft(), averaging)
    assert module.net["q_proj"].weight.eq(0.1).all()
    assert averaging._average_model.module.net["q_proj"].weight.eq(0.1).all()  # type: ignore[union-attr]


def test_a_merged_checkpoint_holds_the_averaged_weights(tmp_path: Path) -> None:
    module = Lit()
    merged = ModelCheckpoint(tmp_path, filename="merged")
    fit(tmp_path, module, peft(save="merged"), ema(), merged, enable_checkpointing=True)
    plain = Lit.load_from_checkpoint(tmp_path / "merged.ckpt")
    torch.testing.assert_close(plain.eval()(X), module.eval()(X))  # at the end the module has the averaged ones
    assert "current_model_state" not in read(tmp_path / "merged.ckpt")


def test_stochastic_weight_averaging_leaves_base_and_statistics_and_resumes_exactly(tmp_path: Path) -> None:
    def swa() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(0.01, 1, annealing_epochs=2, avg_fn=lambda a, b, n: 0.7 * a + 0.3 * b)

    through, resumed = Pretrained(), Pretrained()
    made = fit(tmp_path, through, peft(), swa(), max_epochs=4)
    assert made.current_epoch == 4, "without statistics that train there is no epoch to compute them"
    assert_base_untouched(through, "net.head", base=Pretrained())
    half = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, Pretrained(), peft(), swa(), half, max_epochs=4, enable_checkpointing=True)
    (average,) = [s for s in read(tmp_path / "epoch=1.ckpt")["callbacks"].values() if "average_model_state" in s]
    assert average["average_model_state"].keys() == {k for k in through.state_dict() if "adapters" in k or "head" in k}
    fit(tmp_path, resumed, peft(), swa(), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal_states(through, resumed)


def test_of_two_norms_that_which_trains_gets_new_statistics_from_stochastic_weight_averaging(tmp_path: Path) -> None:
    class TwoNorms(Pretrained):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.first(x))

    module = TwoNorms()
    fit(tmp_path, module, peft(method=LoRA(r=2, modules_to_save="first")), StochasticWeightAveraging(0.01, 1))
    data = torch.cat([x for x, _ in loader()])
    torch.testing.assert_close(module.first.running_mean, data.mean(0), rtol=1e-4, atol=1e-4)
    assert module.first.num_batches_tracked == len(loader())
    assert torch.equal(module.net["norm"].running_mean, Pretrained().net["norm"].running_mean)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "averaging"),
    [
        (lambda: Lit("setup"), ema),
        (lambda: LitConfigured("configure_model"), lambda: StochasticWeightAveraging(0.01, 1)),
    ],
    ids=["ema", "swa"],
)
def test_averaging_a_module_that_is_built_too_late_is_refused(module: Any, averaging: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, peft(), averaging())
    with pytest.raises(AdapterError, match=r"copied Lit.* before it was complete, with 0 of 11 parameters"):
        made.fit(module(), loader(), loader())
    assert made.global_step == 0


# what is refused


def test_a_diverged_run_is_told_of_once_when_it_saves_and_refused_when_it_loads(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class Diverges(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            nn.init.constant_(pl_module.net["v_proj"].adapters["default"].lora_B, torch.nan)

    warnings.simplefilter("always")
    every = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    fit(tmp_path, Lit(), peft(), Diverges(), every, max_epochs=3, enable_checkpointing=True)
    told = [str(w.message) for w in recwarn if "NaN" in str(w.message)]
    assert len(told) == 1
    assert "checkpoint of step 6 " in told[0]
    assert "net.q_proj.adapters.default.lora_A holds NaN" in told[0] or "lora_B holds NaN" in told[0]
    with pytest.raises(AdapterFileError, match=r"tensors are NaN or infinite: net\..*lora_"):
        fit(tmp_path, Lit(), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        PEFT.load_from_checkpoint(Lit, tmp_path / "last.ckpt")


class Lenient(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False


def rename(state: dict[str, Any]) -> None:
    state["net.q_prj.adapters.default.lora_A"] = state.pop("net.q_proj.adapters.default.lora_A")


def cut(state: dict[str, Any]) -> None:
    state["net.head.bias"] = state["net.head.bias"][:2]


@pytest.mark.parametrize("cls", [Lit, Lenient])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"1 tensors are missing: net\.q_proj\..*lora_A; 1 tensors are unexpected: net\.q_prj\..*lora_A"),
        (cut, r"1 tensors are of the wrong shape: net\.head\.bias"),
        (lambda state: state.clear(), r"6 tensors are missing: (net\S+, ){5}\.\.\."),
    ],
    ids=["renamed", "cut", "empty"],
)
def test_keys_that_do_not_fit_are_refused_also_by_lenient_modules(
    cls: type[Lit], change: Any, message: str, tmp_path: Path
) -> None:
    fit(tmp_path, Lit()).save_checkpoint(tmp_path / "a.ckpt")
    rewrite(tmp_path / "a.ckpt", state_dict=change)
    module = cls()
    with pytest.raises(AdapterFileError, match=message):
        fit(tmp_path, module, ckpt_path=tmp_path / "a.ckpt")
    assert_base_untouched(module)


def test_a_lenient_module_may_lack_what_is_not_the_adapters(tmp_path: Path) -> None:
    class Extra(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.ones(2))

    module = Lit()
    fit(tmp_path, module).save_checkpoint(tmp_path / "a.ckpt")
    rewrite(tmp_path / "a.ckpt", state_dict=lambda state: state.update(extra=torch.ones(2)))
    lenient = Lenient()
    trainer(tmp_path, peft()).test(lenient, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert_equal_states(module, lenient)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Lit()).save_checkpoint(tmp_path / "a.ckpt")
    rewrite(tmp_path / "a.ckpt", peft=lambda facts: facts.update(format=99, version="7.0"))
    message = "has format 99, this library reads up to 1: it was written by lightning_peft 7.0. Upgrade"
    with pytest.raises(AdapterFileError, match=message):
        fit(tmp_path, Lit(), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(AdapterFileError, match=message):
        PEFT.load_from_checkpoint(Lit, tmp_path / "a.ckpt")


def test_nothing_but_tensors_and_primitives_is_stored(tmp_path: Path) -> None:
    for save in ("adapter", "full", "merged"):
        fit(tmp_path, Lit(), peft(save=save)).save_checkpoint(tmp_path / f"{save}.ckpt")
        assert read(tmp_path / f"{save}.ckpt")["peft"]["holds"] == save
