"""AdaLoRA against HF PEFT step by step, and the invariants of its budget."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_peft import PEFT, AdaLoRA, AdapterError, inject
from lightning_peft.engine import adapters_of, notify
from tests.callbacks.nets import Lit, loader, trainer
from tests.papers.stack import loss, stack

TARGETS = ("attn", "up", "down")


class Losing(nn.Module):
    """Gives its loss away as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = stack(2).double()

    def forward(self, step: int) -> Any:
        return SimpleNamespace(loss=loss(self.net, step))


def take(model: nn.Module, optimizer: Any, step: int, of: Any, total: int | None = 30) -> None:
    """One step of ``model``, as a plain loop makes it, for the loss ``of(step)``."""
    now = {"step": step, "total_steps": total}
    notify(model, "on_train_batch_start", optimizer, **now)
    optimizer.zero_grad()
    of(step).backward()
    notify(model, "on_before_optimizer_step", optimizer, **now)
    optimizer.step()
    notify(model, "on_after_optimizer_step", optimizer, **now)


def tensors(adapter: Any) -> list[Tensor]:
    return [t.detach().clone() for t in (adapter.lora_A, adapter.lora_z[:, None], adapter.lora_B)]


@pytest.mark.parametrize(("tinit", "tfinal", "gap"), [(0, 0, 1), (4, 6, 3)])
def test_the_same_run_as_in_hf_peft(tinit: int, tfinal: int, gap: int) -> None:
    peft = pytest.importorskip("peft")
    r, total = 4, 30
    schedule = {"tinit": tinit, "tfinal": tfinal, "deltaT": gap}
    ours = inject(Losing(), AdaLoRA(r=r, target_r=2, alpha=8.0, target_modules=TARGETS, **schedule))
    config = peft.AdaLoraConfig(
        init_r=r,
        target_r=2,
        lora_alpha=8.0 * (r + 1e-5) / r,
        target_modules=list(TARGETS),
        total_step=total,
        **schedule,
    )
    theirs = peft.get_peft_model(Losing(), config).double()
    layers = [theirs.base_model.model.get_submodule(path) for path, _, _ in adapters_of(ours)]
    for (_, _, adapter), layer in zip(adapters_of(ours), layers, strict=True):
        for name, value in zip("AEB", tensors(adapter), strict=True):
            getattr(layer, f"lora_{name}")["default"].data.copy_(value)
    for layer in layers:
        layer.ranknum["default"].requires_grad_(False)  # a constant, which would be trained by them
    optimizers = [AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, theirs)]
    seen, uncertain = set(), {}
    for step in range(total):
        take(ours, optimizers[0], step, lambda step: ours(step).loss)
        optimizers[1].zero_grad()
        theirs.base_model(step).loss.backward()  # where the penalty is added
        optimizers[1].step()
        theirs.base_model.update_and_allocate(step + 1)
        measured = theirs.base_model.rankallocator
        uncertain = measured.exp_avg_unc or uncertain  # they forget it when the choice is final, we stop measuring
        for (_, _, adapter), layer in zip(adapters_of(ours), layers, strict=True):
            for name, value in zip("AEB", tensors(adapter), strict=True):
                expected = getattr(layer, f"lora_{name}")["default"]
                torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-9)
                own = adapter.lora_z if name == "E" else getattr(adapter, f"lora_{name}")
                key = next(key for key, p in theirs.base_model.model.named_parameters() if p is expected)
                uncertainty = optimizers[0].state[own]["uncertainty"].view_as(expected)
                torch.testing.assert_close(uncertainty, uncertain[key], rtol=1e-5, atol=1e-12)
        seen.add(sum(int(a.lora_z.count_nonzero()) for _, _, a in adapters_of(ours)))
    assert min(seen) == 2 * 6
    assert len(seen) > 5


def ranks(model: nn.Module) -> list[int]:
    return [int(a.lora_z.count_nonzero()) for _, _, a in adapters_of(model)]


def test_the_budget_falls_and_what_is_left_differs_between_layers() -> None:
    model = inject(stack(2), AdaLoRA(r=6, target_r=2, tinit=3, tfinal=5, target_modules=TARGETS))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    budgets, last = [], []
    for step in range(30):
        take(model, optimizer, step, lambda step: loss(model, step))
        budgets.append(sum(ranks(model)))
        last.append([a.kept.clone() for _, _, a in adapters_of(model)])
    # the paper's formula, from 36 ranks to 12, t counted from 1
    falling = [int(12 + 24 * (1 - (t - 3) / 22) ** 3) for t in range(4, 26)]
    assert budgets == [36, 36, 36, *falling, *[12] * 5]
    assert len(set(ranks(model))) > 1
    assert all(torch.equal(a, b) for later in last[25:] for a, b in zip(later, last[24], strict=True))


def test_triplets_of_equal_worth_do_not_go_together() -> None:
    model = inject(stack(2), AdaLoRA(r=2, target_r=1, total_steps=1, target_modules=TARGETS))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    for _, _, adapter in adapters_of(model):
        nn.init.ones_(adapter.lora_z)
    take(model, optimizer, 0, lambda step: 0 * loss(model, step))  # nothing is worth anything
    assert sum(ranks(model)) == 6


def test_a_budget_that_does_not_fall_keeps_all() -> None:
    model = inject(stack(2), AdaLoRA(r=2, target_r=2, target_modules=TARGETS))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(4):
        take(model, optimizer, step, lambda step: loss(model, step), total=3)
    assert ranks(model) == [2] * 6


@pytest.mark.parametrize("skipped", [(), (9,), (9, 10, 11)])
def test_a_final_step_that_is_passed_over_is_made_up_for(skipped: tuple[int, ...]) -> None:
    model = inject(stack(2), AdaLoRA(r=4, target_r=1, tfinal=5, deltaT=100, target_modules=TARGETS))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    counts = []
    for step in range(15):
        if step not in skipped:  # as behind a loss scaler, where the step counts, and nobody is told of it
            take(model, optimizer, step, lambda step: loss(model, step), total=15)
        counts.append(sum(ranks(model)))
    first = 9 + len(skipped)  # of 6 layers
    assert counts == [24] * first + [6] * (15 - first)


def test_a_run_that_is_too_short_is_refused_before_it_starts() -> None:
    model = inject(stack(2), AdaLoRA(r=2, tinit=10, tfinal=20))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with pytest.raises(AdapterError, match="of 30 optimizer steps, tinit=10 and tfinal=20 leave none"):
        take(model, optimizer, 0, lambda step: loss(model, step))
    with pytest.raises(AdapterError, match="whose length is not known"):
        take(model, optimizer, 0, lambda step: loss(model, step), total=None)
    with pytest.raises(AdapterError, match="target_r must be at most r=2, got 3"):
        AdaLoRA(r=2, target_r=3)


def test_a_trainer_says_how_long_the_schedule_is(tmp_path: Path) -> None:
    module, method = Lit(), AdaLoRA(r=4, target_r=1, tfinal=5, target_modules=("q_proj", "v_proj"))
    trainer(tmp_path, PEFT(method, summary=False), max_epochs=3).fit(module, loader(), loader())  # 18 steps
    assert sum(ranks(module)) == 2
    shorter = trainer(tmp_path, PEFT(method, summary=False), max_steps=5)
    with pytest.raises(AdapterError, match="of 5 optimizer steps"):
        shorter.fit(Lit(), loader(), loader())
