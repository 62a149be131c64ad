"""PEGO against the formula of the paper, with every matrix built."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_peft import PEGO, inject
from lightning_peft.engine import adapters_of, notify
from tests.papers.stack import loss, stack, steps

N, R, ALPHA = 3, 1, 6.0
S = ALPHA / (N * R)


def group(adapter: Any) -> list[Tensor]:
    """The deltas of the group, (d_out, d_in) each."""
    parts = [slice(i * R, i * R + R) for i in range(N)]
    return [S * adapter.lora_B[:, part] @ adapter.lora_A[part] for part in parts]


def overlaps(model: nn.Module) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for _, module, adapter in adapters_of(model):
        D = group(adapter)
        total = total + sum((module.weight @ d.T).abs().sum() for d in D)
        total = total + sum((D[i] @ D[j].T).abs().sum() for i in range(N) for j in range(i + 1, N))
    return total


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def moved() -> nn.Module:
    model = inject(stack(2).double(), PEGO(n=N, r=R, alpha=ALPHA, weight=0.3))
    for i, parameter in enumerate(trained(model)):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        parameter.data += 0.2 * noise
    return model


def test_the_gradients_are_those_of_loss_and_penalty() -> None:
    model, twin, seen = moved(), moved(), []
    steps(model, SGD(trained(model), lr=0.0), 0, 1, lambda step: seen.extend(p.grad for p in trained(model)))
    (loss(twin, 0) + 0.3 * overlaps(twin)).backward()
    for one, other in zip(seen, trained(twin), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-11)


def test_it_is_a_sum_over_the_group() -> None:
    for _, module, adapter in adapters_of(moved()):
        expected = module.weight + sum(group(adapter))
        torch.testing.assert_close(adapter.merged(module.weight, None)[0], expected)


def test_the_penalty_is_flat_at_the_start() -> None:
    model, plain = (inject(stack(2).double(), PEGO(n=2, r=1, weight=weight)) for weight in (10.0, 0.0))
    for each in (model, plain):
        steps(each, SGD(trained(each), lr=0.1), 0, 1)
    for one, other in zip(trained(model), trained(plain), strict=True):
        assert torch.equal(one, other)


def test_without_weight_there_is_no_penalty() -> None:
    model = inject(stack(1), PEGO(n=2, r=1, weight=0.0))
    assert notify(model, "on_before_optimizer_step", SGD(trained(model), lr=0.1)) == {}


def test_a_strong_penalty_keeps_the_products_apart() -> None:
    def shared(weight: float) -> float:
        model = inject(stack(2).double(), PEGO(n=N, r=R, alpha=ALPHA, weight=weight))
        steps(model, AdamW(trained(model), lr=0.01, weight_decay=0.0), 0, 60)
        with torch.no_grad():
            return float(overlaps(model) / sum(d.abs().sum() for _, _, a in adapters_of(model) for d in group(a)))

    assert shared(0.1) < 0.8 * shared(0.0)


def test_a_lowered_rank_keeps_the_group_whole() -> None:
    model = inject(stack(1), PEGO(n=2, r=100, clip_rank=True, target_modules=("embed", "up")))
    assert [len(adapter.lora_A) for _, _, adapter in adapters_of(model)] == [2, 6]
