"""LaMDA: where it starts, and when which column is frozen; against plain torch in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_peft import AdapterError, LaMDA, inject
from lightning_peft.engine import adapter_state, adapters_of, load_adapter_state, notify
from tests.papers.stack import batch, loss, stack

LAYERS = r"layers\.\d\.(up|down|attn)"
STEPS = 20


def adapted(**changed: Any) -> nn.Module:
    return inject(stack(2).double(), LaMDA(**{"r": 3, "freeze_until": 0.4, "target_modules": LAYERS, **changed}))


def optimizer_of(model: nn.Module) -> Optimizer:
    """One that moves a parameter whose gradient is zero: by momentum, and by weight decay."""
    return AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int, total_steps: int | None = STEPS) -> None:
    for step in range(first, last):
        now = {"step": step, "total_steps": total_steps}
        notify(model, "on_train_batch_start", optimizer, **now)
        loss(model, step).backward()
        notify(model, "on_before_optimizer_step", optimizer, **now)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, **now)
        optimizer.zero_grad()


def layers_of(model: nn.Module) -> list[Any]:
    return [adapter for _, _, adapter in adapters_of(model)]


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_start_is_the_leading_part_of_the_weight(alpha: float | None) -> None:
    s = 1.0 if alpha is None else 12 / 3
    for _, module, a in adapters_of(adapted(alpha=alpha)):
        eye, values = torch.eye(3, dtype=torch.float64), torch.linalg.svdvals(module.weight)
        torch.testing.assert_close(a.lora_A @ a.lora_A.T, eye)
        torch.testing.assert_close(a.lora_B.T @ a.lora_B, eye)
        torch.testing.assert_close(s * a.lora_N, values[:3].diag())
        rest = module.weight - s * a.lora_B @ a.lora_N @ a.lora_A
        torch.testing.assert_close(torch.linalg.svdvals(rest)[: len(values) - 3], values[3:])


def test_the_output_at_the_start_is_that_of_the_base_bit_for_bit() -> None:
    x = batch(0)[0]
    assert torch.equal(inject(stack(2), LaMDA(r=3, alpha=7.0, target_modules=LAYERS))(x), stack(2)(x))


def test_it_trains_as_a_product_taken_out_of_the_weight_whose_columns_leave_the_optimizer_one_by_one() -> None:
    model, plain = adapted(alpha=6.0), stack(2).double()
    rests, columns, cores, rows = {}, {}, {}, {}
    for path, module, a in adapters_of(model):
        rests[path] = (module.weight - 6 / 3 * a.lora_B @ a.lora_N @ a.lora_A).detach()
        columns[path] = [nn.Parameter(column.detach().clone()) for column in a.lora_B.T]
        cores[path], rows[path] = nn.Parameter(a.lora_N.detach().clone()), a.lora_A.clone()
    parameters = [*cores.values(), *(column for several in columns.values() for column in several)]
    theirs = AdamW(parameters, lr=0.02, weight_decay=0.1)
    # all of B in 0.4 * 20 = 8 steps, 3 columns: one more after each 8 / 3 steps
    frozen_from = {0: 3, 1: 6, 2: 8}
    for step in range(12):
        weights = {
            f"{path}.weight": rest + 6 / 3 * torch.stack(columns[path], 1) @ cores[path] @ rows[path]
            for path, rest in rests.items()
        }
        x, y = batch(step)
        (torch.func.functional_call(plain, weights, (x.double(),)) - y.double()).square().mean().backward()
        for several in columns.values():
            for i, column in enumerate(several):
                column.grad = None if step >= frozen_from[i] else column.grad
        theirs.step()
        theirs.zero_grad()
    train(model, optimizer_of(model), 0, 12)
    for path, _, a in adapters_of(model):
        torch.testing.assert_close(a.lora_B, torch.stack(columns[path], 1), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.lora_N, cores[path], rtol=1e-9, atol=1e-11)
        assert torch.equal(a.lora_A, rows[path])


def test_a_frozen_column_never_moves_again_and_the_others_do() -> None:
    model = adapted()
    optimizer, counts = optimizer_of(model), []
    for step in range(10):
        before = [a.lora_B.detach().clone() for a in layers_of(model)]
        train(model, optimizer, step, step + 1)
        still = [(a.lora_B == b).all(0) for a, b in zip(layers_of(model), before, strict=True)]
        counts.append([int(columns.sum()) for columns in still])
        assert all(bool(columns[:n].all()) for columns, n in zip(still, counts[-1], strict=True)), "from the left"
    assert [set(several) for several in counts] == [{n} for n in (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)]


def test_layers_of_different_ranks_are_done_at_the_same_step() -> None:
    model = adapted(rank_pattern={"up": 1})
    train(model, optimizer_of(model), 0, 7)
    assert all(a.lora_B.requires_grad for a in layers_of(model))
    before = [a.lora_B.detach().clone() for a in layers_of(model)]
    train(model, optimizer_of(model), 7, 8)
    moving = [(a.lora_B != b).any(0).tolist() for a, b in zip(layers_of(model), before, strict=True)]
    assert sorted(map(len, moving)) == [1, 1, 3, 3, 3, 3]
    assert all(columns == [False] * (len(columns) - 1) + [True] for columns in moving)
    train(model, optimizer_of(model), 8, 9)
    assert not any(a.lora_B.requires_grad for a in layers_of(model))


def test_gradients_of_frozen_columns_are_gone_before_they_are_clipped() -> None:
    model = adapted()
    for step, frozen in {0: 0, 4: 1, 7: 2}.items():
        loss(model, step).backward()
        notify(model, "on_before_optimizer_step", SGD(model.parameters()), step=step, total_steps=STEPS)
        for a in layers_of(model):
            assert a.lora_B.grad.any(0).tolist() == [False] * frozen + [True] * (3 - frozen)
        model.zero_grad()


@pytest.mark.parametrize("resumed", [False, True])
def test_in_the_end_the_cores_alone_train(resumed: bool) -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 9)
    if resumed:
        state, moments = copy.deepcopy((adapter_state(model), optimizer.state_dict()))
        model = adapted()
        load_adapter_state(model, state)
        optimizer = optimizer_of(model)
        optimizer.load_state_dict(moments)
    before = [a.lora_B.detach().clone() for a in layers_of(model)]
    train(model, optimizer, 9, 10)
    assert all(torch.equal(a.lora_B, b) for a, b in zip(layers_of(model), before, strict=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(a.lora_N) for a in layers_of(model)}
    assert sum(p.numel() for p in trained) == 6 * 3 * 3
    assert set(optimizer.state) == set(trained), "no moments are kept of what is frozen"
    assert not any("held" in vars(a) for a in layers_of(model)), "nor copies of it behind the step"


def test_no_input_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    layer = inject(nn.Sequential(nn.Linear(50, 40)), LaMDA(r=2))
    x = torch.randn(300, 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert max(t.numel() for t in kept) == 300 * 2, "the input seen through A, and nothing of its own size"


def test_a_run_of_unknown_length_is_refused() -> None:
    model = adapted()
    with pytest.raises(AdapterError, match="LaMDA has a schedule over the whole run, whose length is not known"):
        train(model, optimizer_of(model), 0, 1, total_steps=None)


@pytest.mark.parametrize("until", [0.0, 1.1])
def test_a_share_is_a_share(until: float) -> None:
    with pytest.raises(AdapterError, match=r"freeze_until must be a number in \(0, 1\], got"):
        LaMDA(freeze_until=until)
