"""What every registered method must satisfy. Adding a method adds no line here."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_peft import disabled, load_adapter, merge, save_adapter, set_active, set_trainable, unload, unmerge
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import (
    METHODS,
    AdapterError,
    MergeError,
    Method,
    adapter_state,
    adapters_of,
    calibrate,
    inject,
    load_adapter_state,
    notify,
    total_loss,
)
from lightning_peft.interop import read_adapter
from tests.methods.backbones import assert_unchanged, kept, moved, snapshot, tiny, trainable

CASES = [
    pytest.param(example, id=f"{name}-{i}")
    for name, cls in sorted(METHODS.items())
    for i, example in enumerate(cls.examples())
]
every_example = pytest.mark.parametrize("method", CASES)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 13, 7)


def adapted(method: Method, seed: int = 2) -> nn.Module:
    """Off the initial point."""
    return moved(inject(tiny(method), method), seed)


def ready(method: Method, x: Tensor, base: nn.Module | None = None) -> nn.Module:
    """At the start of training; calibrated, if the method measures its start on data."""
    model = inject(tiny(method) if base is None else base, method).train()
    if method.calibrated:
        calibrate(model, [lambda: model(x).square().mean(), lambda: (model(2 * x) - 1).square().mean()])
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Over every parameter, with weight decay: a frozen one must stay for want of a gradient."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(
    model: nn.Module, x: Tensor, steps: int, optimizer: torch.optim.Optimizer | None = None, first: int = 0
) -> list[float]:
    """Some steps towards a model of the same form, as any plain loop makes them."""
    optimizer = optimizer or optimizer_of(model)
    goal = torch.linspace(-1, 1, 3, dtype=x.dtype).expand(2, 13, 3)
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        now = {"step": step, "epoch": step // 2, "total_steps": 8, "loss": lambda: F.mse_loss(model(x), goal)}
        notify(model, "on_train_batch_start", optimizer, **now)
        loss, _ = total_loss(model, lambda: F.mse_loss(model(x), goal))
        loss.backward()
        notify(model, "on_before_optimizer_step", optimizer, **now)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, **now)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())
def test_the_start_is_as_declared(cls: type[Method], x: Tensor) -> None:
    same = [
        torch.allclose(inject(tiny(method), method)(x), tiny(method)(x), rtol=1e-6, atol=1e-6)
        for method in cls.examples()
    ]
    assert all(same) if cls.identity_at_init else not all(same)


@every_example
def test_moving_the_adapter_changes_the_output(method: Method, x: Tensor) -> None:
    assert not torch.allclose(adapted(method)(x), tiny(method)(x), atol=1e-4)


@every_example
def test_the_loss_falls(method: Method, x: Tensor) -> None:
    losses = train(ready(method, x), x, steps=20)
    assert losses[-1] < 0.99 * losses[0]


@every_example
def test_every_trainable_parameter_gets_a_gradient(method: Method, x: Tensor) -> None:
    model = adapted(method).train()
    model(x).square().mean().backward()
    assert trainable(model)
    assert [name for name, p in trainable(model).items() if p.grad is None or not p.grad.any()] == []


@every_example
def test_frozen_parameters_do_not_move(method: Method, x: Tensor) -> None:
    model = ready(method, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, x, steps=3)
    after = dict(model.named_parameters())
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


@every_example
def test_unload_gives_the_base_back_after_training(method: Method, x: Tensor) -> None:
    model = ready(method, x)
    train(model, x, steps=3)
    if method.keeps_base:
        assert_unchanged(unload(model), snapshot(kept(tiny(method), method)))
    else:
        with pytest.raises(AdapterError, match="no base to go back to"):
            unload(model)


@every_example
def test_disabled_answers_as_the_base(method: Method, x: Tensor) -> None:
    model = adapted(method)
    before, y = snapshot(model), model(x)
    if method.keeps_base:
        with disabled(model):
            assert torch.equal(model(x), kept(tiny(method), method)(x))
    else:
        with pytest.raises(AdapterError, match="no base to go back to"), disabled(model):
            pass
    assert torch.equal(model(x), y)
    assert_unchanged(model, before)


@every_example
def test_a_weight_that_is_stored_the_other_way_round_trains_the_same(method: Method, x: Tensor) -> None:
    if method.acts_on != "layers" or method.changes_base:
        return
    losses = []
    for transposed in (False, True):
        base = tiny(method).double()
        if transposed:
            given, base.q_proj = base.q_proj, Conv1D(11, 7)
            base.q_proj.weight = nn.Parameter(given.weight.detach().T.contiguous())
            base.q_proj.bias = given.bias
        losses.append(train(ready(method, x.double(), base), x.double(), steps=5))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@every_example
def test_merged_equals_unmerged(method: Method, x: Tensor) -> None:
    model = moved(inject(tiny(method).double(), method))
    expected, before = model(x.double()), snapshot(model)
    if not method.mergeable:
        with pytest.raises(MergeError):
            merge(model)
        assert_unchanged(model, before)
        return
    # in float64 nothing but the order of the sums differs
    torch.testing.assert_close(merge(model)(x.double()), expected, rtol=1e-10, atol=1e-10)


@every_example
def test_merged_model_is_plain(method: Method) -> None:
    if method.mergeable:
        merged, base = merge(adapted(method)), tiny(method)
        assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
        created = merged.state_dict().keys() - base.state_dict().keys()
        assert base.state_dict().keys() <= merged.state_dict().keys()
        assert all(key.endswith(".bias") for key in created)
        assert all(p.dtype == torch.float32 for p in merged.parameters())
        assert {type(p) for p in merged.parameters()} == {nn.Parameter}


@every_example
def test_unmerge_undoes_merge(method: Method, x: Tensor) -> None:
    if method.mergeable:
        model = adapted(method)
        before, y = snapshot(model), model(x)
        merge(model)
        assert_unchanged(unmerge(model), before)
        assert torch.equal(model(x), y)


@every_example
def test_files_carry_the_whole_adapter(method: Method, x: Tensor, tmp_path: Path) -> None:
    model = adapted(method)
    loaded = load_adapter(tiny(method), save_adapter(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert_unchanged(loaded, snapshot(model))


@every_example
def test_a_low_rank_change_is_saved_as_plain_lora(method: Method, x: Tensor, tmp_path: Path) -> None:
    model = adapted(method)
    found = [adapter for _, _, adapter in adapters_of(model)]
    low_rank = all(isinstance(a, LowRank) and type(a).merged is LowRank.merged for a in found)
    if not found or not low_rank or not method.keeps_base:
        if found:
            with pytest.raises(AdapterError, match="cannot be saved as LoRA"):
                save_adapter(model, tmp_path, as_lora=True)
        return
    loaded = load_adapter(kept(tiny(method), method), save_adapter(model, tmp_path, as_lora=True))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@every_example
def test_files_hold_nothing_but_the_adapter(method: Method, tmp_path: Path) -> None:
    model = adapted(method)
    folder = save_adapter(model, tmp_path)
    size = sum(file.stat().st_size for file in folder.iterdir())
    _, _, tensors = read_adapter(folder)
    shared = sum(t.nbytes for key, t in tensors.items() if key.startswith("base_model.vera_"))  # which HF PEFT needs
    assert size <= sum(p.nbytes for p in trainable(model).values()) + shared + 16 * 1024


@every_example
def test_trainable_count_follows_the_formula(method: Method) -> None:
    base = tiny(method)
    whole = dict(base.named_parameters())
    expected = method.total_trainable(method.targets(base))
    expected += sum(whole[name].numel() for name in method.trained_in_place(base))
    assert sum(p.numel() for p in trainable(inject(base, method)).values()) == expected


@every_example
def test_a_deep_copy_is_equal_and_apart(method: Method, x: Tensor) -> None:
    model = adapted(method)
    y, copied = model(x), copy.deepcopy(model)
    assert torch.equal(copied(x), y)
    moved(copied)
    assert not torch.equal(copied(x), y)
    assert torch.equal(model(x), y)


@every_example
def test_pickle_keeps_the_model(method: Method, x: Tensor) -> None:
    model = adapted(method)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), model(x))
    assert_unchanged(loaded, snapshot(model))


@every_example
def test_adapters_keep_their_precision_in_bfloat16(method: Method, x: Tensor) -> None:
    model = adapted(method).to(torch.bfloat16)
    assert {p.dtype for _, _, adapter in adapters_of(model) for p in adapter.parameters()} <= {torch.float32}
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: three layers of them may differ by some 2 %
    torch.testing.assert_close(y.float(), adapted(method)(x), rtol=0.05, atol=0.05)
    late = inject(tiny(method).to(torch.bfloat16), method)
    assert {p.dtype for _, _, adapter in adapters_of(late) for p in adapter.parameters()} <= {torch.float32}


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())  # one example each: compiling takes its time
def test_a_compiled_model_computes_the_same(cls: type[Method], x: Tensor) -> None:
    torch._dynamo.reset()
    model = adapted(cls.examples()[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@every_example
def test_autocast_computes_nearly_the_same(method: Method, x: Tensor) -> None:
    model = adapted(method)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    # bfloat16 keeps 8 bits: some layers of products in it may differ by some 2 %
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().square().mean().backward()
    assert {p.grad.dtype for p in trainable(model).values() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("method", [case for case in CASES if case.values[0].acts_on != "layers"])
def test_activation_checkpoints_change_no_gradient(method: Method, x: Tensor) -> None:
    models = [adapted(method), adapted(method)]
    models[1].checkpointed = True  # type: ignore[assignment]  # mypy takes every attribute of a module for a child
    for model in models:
        torch.manual_seed(0)
        model(x).square().mean().backward()
    plain, again = (trainable(model) for model in models)
    for name, parameter in plain.items():
        torch.testing.assert_close(again[name].grad, parameter.grad)


@every_example
def test_injecting_twice_adds_nothing(method: Method) -> None:
    model = adapted(method)
    before = snapshot(model)
    assert_unchanged(inject(model, method), before)


@every_example
def test_two_names_take_turns(method: Method, x: Tensor) -> None:
    if method.trained_in_place(tiny(method)):
        model = adapted(method)
        before = snapshot(model)
        with pytest.raises(AdapterError, match="two cannot share it"):
            inject(model, method, name="second")
        assert_unchanged(model, before)
        return
    model = adapted(method)
    first = model(x)
    inject(model, method, name="second")
    if method.identity_at_init:  # above the first, which has moved
        torch.testing.assert_close(model(x), first)
    set_active(model, "second")
    set_trainable(model, "second")
    assert {name.partition("adapters.")[2].partition(".")[0] for name in trainable(model)} == {"second"}
    second = moved(model, seed=5)(x)
    set_active(model, "default")
    assert torch.equal(model(x), first)
    set_active(model, ["default", "second"])
    assert not torch.allclose(model(x), first)
    assert not torch.allclose(model(x), second)
    set_active(model, "second")
    assert torch.equal(model(x), second)
    assert torch.equal(unload(model, "default")(x), second)
    assert_unchanged(unload(model), snapshot(kept(tiny(method), method)))


@every_example
def test_injection_draws_no_global_random_numbers(method: Method) -> None:
    model, before = tiny(method), torch.get_rng_state()
    inject(model, method)
    assert torch.equal(torch.get_rng_state(), before)


@every_example
def test_the_representation_rebuilds_the_method(method: Method) -> None:
    assert eval(repr(method), {cls.__name__: cls for cls in METHODS.values()}) == method


@every_example
@pytest.mark.parametrize("k", range(1, 6))
def test_a_resumed_run_equals_an_uninterrupted_one(method: Method, k: int, x: Tensor) -> None:
    through = ready(method, x)
    train(through, x, steps=6)

    first = ready(method, x)
    optimizer = optimizer_of(first)
    train(first, x, steps=k, optimizer=optimizer)
    saved = copy.deepcopy((adapter_state(first), optimizer.state_dict()))
    resumed = ready(method, x)
    load_adapter_state(resumed, saved[0])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(saved[1])
    train(resumed, x, steps=6 - k, optimizer=optimizer, first=k)
    assert_unchanged(resumed, snapshot(through))
