"""LoRA-GGPO: what the noise is made of, that it is there in training steps alone, and what gradients see of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_peft import AdapterError, LoRA, LoRAGGPO, inject, merge
from lightning_peft.engine import TargetError, adapters_of, notify
from lightning_peft.methods.lora.loraggpo import Perturbed, squared_rows
from tests.papers.stack import loss, stack, steps

S = 6 / 2


def trained(count: int = 3, **options: Any) -> tuple[nn.Module, Any]:
    method = LoRAGGPO(r=2, alpha=6.0, target_modules=("up", "down"), **options)
    model = inject(stack(2).double(), method).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    steps(model, optimizer, 0, count)
    return model, optimizer


def test_row_norms_need_no_large_matrix() -> None:
    A, dA = torch.randn(2, 3, 9, dtype=torch.float64)
    B, dB = torch.randn(2, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(squared_rows(A, B), (B @ A).square().sum(1))
    torch.testing.assert_close(squared_rows(A, B, dA, dB), (B @ dA + dB @ A).square().sum(1))


def test_the_strength_comes_from_the_weight_and_its_gradient() -> None:
    model, optimizer = trained(sigma=0.2, beta=0.3)
    for step in range(3, 5):
        now = {"step": step}
        notify(model, "on_train_batch_start", optimizer, **now)
        loss(model, step).backward()
        gradients = [(a.lora_A.grad.clone(), a.lora_B.grad.clone()) for _, _, a in adapters_of(model)]
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, **now)
        optimizer.zero_grad()
    for (_, module, a), (dA, dB) in zip(adapters_of(model), gradients, strict=True):
        omega = torch.stack([row.norm() for row in module.weight]).mean()
        own = torch.stack([row.norm() for row in S * a.lora_B @ a.lora_A])
        moving = torch.stack([row.norm() for row in S * (a.lora_B @ dA + dB @ a.lora_A)])
        torch.testing.assert_close(a.strength, (0.2 * (omega**2 + own**2).sqrt() + 0.3 * moving**2).detach())


def noises(model: nn.Module, x: Tensor, count: int) -> Tensor:
    """(count, ..., d_out): what is added to the output of the first layer, at so many steps."""
    path, module, adapter = adapters_of(model)[0]
    plain = module(x)
    seen = []
    for step in range(count):
        notify(model, "on_train_batch_start", SGD(model.parameters(), lr=0.1), step=100 + step)
        seen.append(module(x) - plain)
    adapter.seed = None
    return torch.stack(seen).detach()


def test_the_noise_has_mean_zero_and_a_deviation_of_its_strength_in_each_row() -> None:
    model, _ = trained(sigma=0.5)
    x = torch.randn(6, dtype=torch.float64)
    adapter, found = adapters_of(model)[0][2], noises(model, x, 2000)
    expected = adapter.strength / len(adapter.strength) ** 0.5 * x.norm()
    torch.testing.assert_close(found.std(0), expected, rtol=0.08, atol=0)  # 5 standard errors
    assert (found.mean(0).abs() < 4.5 * expected / 2000**0.5).all()
    correlation = torch.corrcoef(found.T) - torch.eye(len(expected))
    assert correlation.abs().max() < 0.12, "rows draw by themselves"


def test_layers_and_steps_have_noise_of_their_own_and_batches_of_a_step_the_same() -> None:
    model, optimizer = trained()
    x = torch.randn(4, 6, dtype=torch.float64)
    one, other = noises(model, x, 2)
    assert not torch.equal(one, other)
    notify(model, "on_train_batch_start", optimizer, step=100)
    assert torch.equal(model.layers[0].up(x), model.layers[0].up(x))
    assert len({adapter.seed for _, _, adapter in adapters_of(model)}) == 4


def test_there_is_no_noise_outside_of_training_steps() -> None:
    model, optimizer = trained()
    plain = inject(stack(2).double(), LoRA(r=2, alpha=6.0, target_modules=("up", "down"))).train()
    for (_, _, to), (_, _, a) in zip(adapters_of(plain), adapters_of(model), strict=True):
        to.lora_A.data, to.lora_B.data = a.lora_A.data, a.lora_B.data
    expected = loss(plain, 0)
    assert torch.equal(loss(model, 0), expected)
    notify(model, "on_train_batch_start", optimizer, step=9)
    assert not torch.equal(loss(model, 0), expected)
    assert torch.equal(loss(model.eval(), 0), expected)
    torch.testing.assert_close(loss(merge(model.train()), 0), expected)


def test_without_strength_it_is_lora_bit_for_bit_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(method: LoRA) -> list[Tensor]:
        torch.manual_seed(3)
        model = inject(stack(2), method).train()
        steps(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05), 0, 4)
        return [*(p.detach() for p in model.parameters()), torch.rand(3)]

    plain, noisy = run(LoRA(r=2, dropout=0.5)), run(LoRAGGPO(r=2, dropout=0.5))
    monkeypatch.setattr(Perturbed, "perturbed", None)
    assert all(torch.equal(a, b) for a, b in zip(run(LoRAGGPO(r=2, dropout=0.5, sigma=0, beta=0)), plain, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(noisy, plain, strict=True))
    assert torch.equal(noisy[-1], plain[-1]), "the noise comes from a generator of its own"


@pytest.mark.parametrize("through", [False, True])
def test_the_gradient_of_the_input_sees_the_noise_if_it_is_told_to(through: bool) -> None:
    model, optimizer = trained(sigma=0.5, grad_through_noise=through)
    _, module, adapter = adapters_of(model)[0]
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    weight = module.weight + S * adapter.lora_B @ adapter.lora_A
    notify(model, "on_train_batch_start", optimizer, step=9)
    if through:  # the layer is linear: its noise is what it makes of the unit vectors
        eye = torch.eye(6, dtype=torch.float64)
        weight = weight + (module(eye) - eye @ weight.T).T
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).detach())


def test_a_weight_that_is_not_called_is_refused() -> None:
    with pytest.raises(TargetError, match="LoRAGGPO: '0.in_proj_weight' is used without a call"):
        inject(nn.Sequential(nn.MultiheadAttention(6, 2)), LoRAGGPO(r=2))
    inject(nn.Sequential(nn.MultiheadAttention(6, 2)), LoRAGGPO(r=2, sigma=0.0, beta=0.0))
    with pytest.raises(AdapterError, match="beta must be a number >= 0, got -1"):
        LoRAGGPO(beta=-1)
