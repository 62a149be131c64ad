"""PaCA against columns of the weight that are trained as they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_peft import PaCA, inject, merge
from lightning_peft.engine import TargetError


def test_training_moves_the_drawn_columns_as_full_training_would() -> None:
    base = nn.Sequential(nn.Linear(9, 7)).double()
    plain = base[0].weight.detach().clone().requires_grad_()
    bias = base[0].bias.detach().clone()
    adapter = inject(base, PaCA(r=3, alpha=6.0))[0].adapters["default"]
    optimizer = SGD(base.parameters(), lr=0.01)
    x, goal = torch.randn(4, 2, 9, dtype=torch.float64), torch.randn(4, 2, 7, dtype=torch.float64)
    chosen = adapter.indices.tolist()
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(base(x), goal).backward()
        optimizer.step()
        (gradient,) = torch.autograd.grad(F.mse_loss(F.linear(x, plain, bias), goal), plain)
        with torch.no_grad():  # the columns are scaling * P, so that one scaling comes from each chain rule
            plain[:, chosen] -= 0.01 * (6 / 3) ** 2 * gradient[:, chosen]
    torch.testing.assert_close(merge(base)[0].weight, plain.detach())
    assert len(set(chosen)) == 3


def test_the_other_columns_stay_bit_for_bit() -> None:
    base = nn.Sequential(nn.Linear(9, 7))
    before = base[0].weight.detach().clone()
    adapter = inject(base, PaCA(r=3))[0].adapters["default"]
    nn.init.normal_(adapter.columns)
    changed = (merge(base)[0].weight != before).any(0).nonzero().flatten().tolist()
    assert changed == adapter.indices.tolist()


def test_layers_draw_different_columns() -> None:
    model = inject(nn.Sequential(*[nn.Linear(50, 50) for _ in range(4)]), PaCA(r=5))
    assert len({tuple(layer.adapters["default"].indices.tolist()) for layer in model}) == 4


def test_the_backward_pass_keeps_the_drawn_features_alone() -> None:
    model, kept = inject(nn.Sequential(nn.Linear(50, 7)), PaCA(r=3)), []
    x = torch.randn(4, 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(x)
    assert (4, 3) in kept
    assert (4, 50) not in kept


def test_more_columns_than_there_are_is_refused() -> None:
    with pytest.raises(TargetError, match="r=8, but '0' has 5 columns"):
        inject(nn.Sequential(nn.Linear(5, 30)), PaCA())
