"""LISA: the draws, what is frozen, what the optimizer holds."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_peft import LISA, AdapterError, FullFineTuning, inject
from lightning_peft.engine import TargetError, notify
from tests.papers.stack import loss, stack, steps, trainable_blocks


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def active_sets(method: LISA, n: int, first: int = 0) -> list[list[int]]:
    """Trainable blocks in each of the steps ``first`` to ``n - 1``."""
    model, seen = inject(stack(), method), []
    steps(model, adamw(model), first, n, lambda step: seen.append(trainable_blocks(model)))
    return seen


def test_n_layers_blocks_train_for_interval_steps() -> None:
    seen = active_sets(LISA(n_layers=2, interval_steps=3), 30)
    assert all(len(blocks) == 2 for blocks in seen)
    periods = [seen[i : i + 3] for i in range(0, 30, 3)]
    assert all(period[0] == period[1] == period[2] for period in periods)
    assert len({tuple(period[0]) for period in periods}) > 3


def test_draws_depend_on_seed_and_step_alone() -> None:
    through = active_sets(LISA(n_layers=1, interval_steps=2), 16)
    for k in range(16):  # wherever a run begins anew
        assert active_sets(LISA(n_layers=1, interval_steps=2), 16, first=k) == through[k:]
    assert active_sets(LISA(n_layers=1, interval_steps=2, seed=1), 16) != through


def test_every_block_has_its_share_of_periods() -> None:
    seen = active_sets(LISA(n_layers=2, interval_steps=1), 400)
    counts = Counter(block for blocks in seen for block in blocks)
    # 2 of 4 for 400 periods: each 200 times; 13.8 is the 99.9 % point of chi square with 3 degrees of freedom, and
    # drawing without replacement spreads less than that
    assert sum((counts[b] - 200) ** 2 / 200 for b in range(4)) < 13.8


def test_frozen_blocks_do_not_move_and_the_rest_does() -> None:
    model = inject(stack(), LISA(n_layers=1, interval_steps=4))
    optimizer = adamw(model)
    for period in range(5):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps(model, optimizer, 4 * period, 4 * period + 4)
        (drawn,) = trainable_blocks(model)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        always = {name for name in before if not name.startswith("layers")}
        assert moved == always | {name for name in before if name.startswith(f"layers.{drawn}.")}


def test_the_optimizer_holds_the_moments_of_active_blocks_alone() -> None:
    model = inject(stack(), LISA(n_layers=2, interval_steps=1))
    optimizer = adamw(model)
    always = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("layers"))
    block = sum(p.numel() for p in model.layers[0].parameters())
    for step in range(12):
        steps(model, optimizer, step, step + 1)
        held = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values())
        assert held == 2 * (always + 2 * block)
        assert sum(p.grad is not None for p in model.parameters()) == 0


def test_a_block_that_is_frozen_leaves_no_gradient_behind() -> None:
    model = inject(stack(), LISA(n_layers=1, interval_steps=1))
    loss(model, 0).backward()  # a loop that clears gradients later
    notify(model, "on_train_batch_start", adamw(model), step=0)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name


def test_keep_lets_the_moments_grow_to_those_of_full_fine_tuning() -> None:
    model = inject(stack(), LISA(n_layers=1, interval_steps=1, state_policy="keep"))
    optimizer = adamw(model)
    steps(model, optimizer, 0, 20)
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_all_blocks_with_their_moments_are_full_fine_tuning(policy: str) -> None:
    sampled = inject(stack(), LISA(n_layers=4, interval_steps=2, state_policy=policy))
    full = inject(stack(), FullFineTuning())
    for model in (sampled, full):
        steps(model, adamw(model), 0, 9)
    for a, b in zip(sampled.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_block_that_comes_back_goes_on_with_its_moments_or_starts_anew() -> None:
    counters = {}
    for policy in ("reset", "offload"):
        model = inject(stack(2), LISA(n_layers=1, interval_steps=2, state_policy=policy))
        optimizer = adamw(model)
        steps(model, optimizer, 0, 20)
        (drawn,) = trainable_blocks(model)
        counters[policy] = optimizer.state[model.layers[drawn].attn.weight]["step"].item()
    assert counters["reset"] % 2 == 0
    assert counters["offload"] > counters["reset"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moments leave a GPU for main memory")
def test_offloaded_moments_lie_in_main_memory() -> None:
    model = inject(stack().cuda(), LISA(n_layers=1, interval_steps=1, state_policy="offload"))
    optimizer = adamw(model)
    steps(model, optimizer, 0, 12)
    for name, p in model.named_parameters():
        if p in optimizer.state:
            assert optimizer.state[p]["exp_avg"].device.type == ("cuda" if p.requires_grad else "cpu"), name


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TargetError, match=r"n_layers=5, but there are 4 blocks to draw, layers.0 to layers.3"):
        inject(stack(), LISA(n_layers=5))
    with pytest.raises(AdapterError, match="state_policy must be one of 'reset', 'keep', 'offload', got 'drop'"):
        LISA(state_policy="drop")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="interval_steps must be an integer >= 1, got 0"):
        LISA(interval_steps=0)
