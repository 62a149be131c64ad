"""DoRA against the formula of the paper, in float64: the norm of a row is a constant for the gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import DoRA, LoRA, inject, merge
from lightning_peft.engine import adapters_of
from tests.methods.backbones import moved

LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), lambda x, w, layer: F.linear(x, w, layer.bias), (4, 3, 9)),
    "without bias": (lambda: nn.Linear(9, 7, bias=False), lambda x, w, layer: F.linear(x, w), (4, 3, 9)),
    "conv": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        lambda x, w, layer: F.conv2d(x, w, layer.bias, stride=2, padding=1, groups=2),
        (2, 4, 5, 5),
    ),
    "conv1d": (
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda x, w, layer: F.conv1d(F.pad(x, (1, 1), mode="circular"), w, layer.bias),
        (2, 4, 5),
    ),
}


def decomposed(weight: Tensor, A: Tensor, B: Tensor, m: Tensor, s: float) -> Tensor:
    """m (W + s B A) / c, row by row; c the length of each row, without a gradient."""
    rows = weight.flatten(1) + s * B @ A.flatten(1)
    c = rows.detach().square().sum(1).sqrt()
    return (m / c)[:, None].mul(rows).view_as(weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_formula(kind: str) -> None:
    make, apply, shape = LAYERS[kind]
    model = moved(inject(nn.Sequential(make()).double(), DoRA(r=2, alpha=6.0, target_modules="all-layers")))
    ((_, layer, a),) = adapters_of(model)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mine = [x, a.lora_A, a.lora_B, a.magnitude]
    theirs = [t.detach().clone().requires_grad_() for t in mine]
    expected = apply(theirs[0], decomposed(layer.weight.detach(), *theirs[1:], s=6 / 2), layer)
    y = model(x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad((y * direction).sum(), mine),
        torch.autograd.grad((expected * direction).sum(), theirs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        assert one.any()
    lengths = merge(model)[0].weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, a.magnitude.abs(), msg="the direction says nothing of the length")


def test_an_embedding_has_a_length_for_each_feature() -> None:
    model = moved(inject(nn.Sequential(nn.Embedding(11, 5)).double(), DoRA(r=2, alpha=6.0, target_modules="0")))
    ((_, layer, a),) = adapters_of(model)
    ids = torch.tensor([[0, 3], [10, 3]])
    table = decomposed(layer.weight.detach().T, a.lora_A, a.lora_B, a.magnitude, s=6 / 2).T
    torch.testing.assert_close(model(ids), table[ids])


def test_it_starts_as_the_base_at_the_lengths_of_its_rows_and_all_but_a_learns_at_once() -> None:
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    y = layer(x)
    ((_, _, a),) = adapters_of(model := inject(nn.Sequential(layer), DoRA(r=2)))
    assert torch.equal(model(x), y)
    torch.testing.assert_close(a.magnitude.detach(), torch.stack([row.norm() for row in layer.weight.detach()]))
    model(x).square().sum().backward()
    assert [bool(p.grad.any()) for p in (a.lora_A, a.lora_B, a.magnitude)] == [False, True, True]


def test_over_another_adapter_the_length_is_that_of_both() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(9, 7)).double(), LoRA(r=2)))
    weight = model[0].weight + model[0].adapters["default"].delta()
    inject(model, DoRA(r=2, alpha=6.0), name="second")
    a = model[0].adapters["second"]
    torch.testing.assert_close(a.magnitude, weight.norm(dim=1))
    moved(model, seed=5)
    below = model[0].weight + model[0].adapters["default"].delta()
    x = torch.randn(3, 9, dtype=torch.float64)
    expected = decomposed(below, a.lora_A, a.lora_B, a.magnitude, s=6 / 2)
    torch.testing.assert_close(model(x), F.linear(x, expected, model[0].bias))


def test_dropout_falls_on_the_product_alone() -> None:
    layer, x = nn.Linear(9, 7), torch.ones(4, 9)
    model = inject(nn.Sequential(layer), DoRA(r=2, dropout=0.9)).train()
    nn.init.constant_(model[0].adapters["default"].magnitude, 2.0)
    assert torch.equal(model(x), model.eval()(x))
