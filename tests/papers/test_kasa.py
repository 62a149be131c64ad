"""KaSA against the formula of the paper, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_peft import KaSA, inject
from lightning_peft.engine import TargetError, adapters_of, notify
from tests.papers.stack import stack

LAYERS = r"layers\.\d\.(up|down|attn)"


def adapted(**changed: Any) -> nn.Module:
    """Off the initial point."""
    model = inject(stack(2).double(), KaSA(r=2, target_modules=LAYERS, **changed))
    generator = torch.Generator().manual_seed(3)
    for _, _, adapter in adapters_of(model):
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return model


def truncated(weight: Tensor, r: int) -> Tensor:
    """By the eigenvectors of W^T W: the leading ones keep what they span."""
    _, vectors = torch.linalg.eigh(weight.T @ weight)
    kept = vectors[:, -(min(weight.shape) - r) :]
    return weight @ kept @ kept.T


def test_the_weight_is_that_of_the_paper() -> None:
    for _, module, a in adapters_of(adapted(alpha=6.0)):
        expected = truncated(module.weight, 2) + 6.0 / 2 * a.lora_B @ torch.diag(a.lora_z) @ a.lora_A
        torch.testing.assert_close(a.merged(module.weight, None)[0], expected)
        x = torch.linspace(-1, 1, module.in_features, dtype=torch.float64)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), expected @ x + bias)


def test_at_the_start_nothing_but_the_smallest_components_is_gone() -> None:
    model = inject(stack(2).double(), KaSA(r=2, target_modules=LAYERS))
    for _, module, adapter in adapters_of(model):
        W, start = module.weight, adapter.merged(module.weight, None)[0]
        assert torch.linalg.matrix_rank(start) == min(W.shape) - 2
        lost = torch.linalg.svdvals(W)[-2:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.matrix_norm(W - start), lost)
        assert not adapter.lora_B.any()
        assert adapter.lora_z.all()


def test_dropout_does_not_bring_the_noise_back() -> None:
    model = inject(stack(1), KaSA(r=2, dropout=0.9, target_modules=LAYERS))
    x, evaluated = torch.ones(1, 3), model.eval()(torch.ones(1, 3))
    assert torch.equal(model.train()(x), evaluated)


def test_the_penalties_are_means_over_layers_and_weighted() -> None:
    model = adapted(beta=0.3, gamma=0.7)
    values = notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1))
    layers = [adapter for _, _, adapter in adapters_of(model)]
    squares, apart = torch.zeros(()), torch.zeros(())
    for a in layers:
        squares = squares + (a.lora_z**2).sum() / len(layers)
        for gram in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B):
            apart = apart + ((gram - torch.eye(2)) ** 2).sum() ** 0.5 / len(layers)
    assert values["default/singular_values"].item() == pytest.approx(0.3 * squares.item())
    assert values["default/orthonormality"].item() == pytest.approx(0.7 * apart.item())
    total = 0.3 * squares + 0.7 * apart
    for a in layers:
        parameters = [a.lora_A, a.lora_B, a.lora_z]
        wanted = torch.autograd.grad(total, parameters, retain_graph=True)
        torch.testing.assert_close(tuple(p.grad for p in parameters), wanted)


def test_a_penalty_of_weight_zero_is_left_out() -> None:
    for left, changed in {"singular_values": {"gamma": 0.0}, "orthonormality": {"beta": 0.0}}.items():
        model = adapted(**changed)
        assert set(notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1))) == {f"default/{left}"}


def test_a_rank_that_leaves_nothing_is_refused() -> None:
    model = stack(1)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=r"r=6 takes everything out of 'layers.0.attn' \(6 x 6\)"):
        inject(model, KaSA(r=6, target_modules=LAYERS))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_lowered_rank_leaves_something_of_each_weight() -> None:
    model = inject(stack(1), KaSA(r=100, clip_rank=True))
    assert [len(adapter.lora_z) for _, _, adapter in adapters_of(model)] == [2, 5, 5, 5]
