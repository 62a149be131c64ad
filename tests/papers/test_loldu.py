"""LoLDU against Gaussian elimination by hand, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_peft import LoLDU, inject
from lightning_peft.engine import adapters_of
from tests.papers.stack import batch, loss, stack, steps

LAYERS = r"layers\.\d\.(up|down|attn)"


def adapted(**changed: Any) -> nn.Module:
    return inject(stack(2).double(), LoLDU(**{"r": 2, "target_modules": LAYERS, **changed}))


def eliminated(weight: Tensor, r: int) -> tuple[list[Tensor], list[float], list[Tensor]]:
    """Rows, pivots and columns of the first ``r`` steps of elimination, each with the largest pivot of its column."""
    rest, rows, pivots, columns = weight.detach().clone(), [], [], []
    for i in range(r):
        pivot = int(rest[:, i].abs().argmax())
        value = float(rest[pivot, i])
        row, column = rest[pivot] / value, rest[:, i] / value
        rest = rest - value * torch.outer(column, row)
        rows.append(row), pivots.append(value), columns.append(column)
    return rows, pivots, columns


@pytest.mark.parametrize(("alpha", "s"), [(6.0, 6 / 2), (None, 1.0)])
def test_the_weight_is_that_of_the_paper(alpha: float | None, s: float) -> None:
    change = torch.tensor([0.5, -0.3]).double()
    for _, module, a in adapters_of(adapted(alpha=alpha)):
        rows, pivots, columns = eliminated(module.weight, 2)
        torch.testing.assert_close(a.lora_z, torch.tensor(pivots).double())
        a.lora_z.data += change
        taken_out = sum(d * torch.outer(c, u) for d, c, u in zip(pivots, columns, rows, strict=True))
        added = sum(z * torch.outer(c, u) for z, c, u in zip(a.lora_z.detach(), columns, rows, strict=True))
        expected = (module.weight - s * taken_out) + s * added
        torch.testing.assert_close(a.merged(module.weight, None)[0], expected)
        x = torch.linspace(-1, 1, module.in_features, dtype=torch.float64)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), expected @ x + bias)


def test_all_factors_together_are_the_weight() -> None:
    for _, module, a in adapters_of(adapted(r=768)):
        k = min(module.weight.shape)
        assert a.lora_z.shape == (k,)
        assert float(a.scaling) == 8 / k, "the rank that it has, not the one that was asked for"
        torch.testing.assert_close(a.lora_B @ a.lora_z.diag() @ a.lora_A, module.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.lora_A.diagonal(), torch.ones(k).double())
        assert not a.lora_A.tril(-1).any()
        # each column of P L holds the 1 of its pivot, and nothing larger
        assert a.lora_B.abs().max() == 1
        assert {(column == 1).sum().item() for column in a.lora_B.T} == {1}


def test_what_is_left_of_the_weight_has_r_ranks_less() -> None:
    for _, module, a in adapters_of(adapted(alpha=None)):
        left = module.weight - a.lora_B @ a.lora_z.diag() @ a.lora_A
        assert torch.linalg.matrix_rank(left, tol=1e-10) == min(module.weight.shape) - 2


def test_the_gradient_is_the_full_one_seen_between_the_factors() -> None:
    model, full = adapted(alpha=6.0), stack(2).double()
    for net in (model, full):
        loss(net, 0).backward()
    for path, module, a in adapters_of(model):
        rows, _, columns = eliminated(module.weight, 2)
        G = full.get_parameter(f"{path}.weight").grad
        expected = torch.stack([3 * c @ G @ u for c, u in zip(columns, rows, strict=True)])
        torch.testing.assert_close(a.lora_z.grad, expected)


def test_only_the_pivots_move() -> None:
    model = adapted()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    start = [a.lora_z.detach().clone() for _, _, a in adapters_of(model)]
    steps(model, SGD(model.parameters(), lr=0.1), 0, 3)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_z"}
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all((a.lora_z != z).all() for (_, _, a), z in zip(adapters_of(model), start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_exact_in_any_precision(dtype: torch.dtype) -> None:
    x = batch(0)[0].to(dtype)
    assert torch.equal(inject(stack(2).to(dtype), LoLDU(target_modules=LAYERS))(x), stack(2).to(dtype)(x))


def test_a_pivot_of_zero_does_no_harm() -> None:
    # the second pivot is zero beside a row that is not; the third row is gone altogether
    weight = torch.tensor([[2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 8.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data = weight.clone()
    a = inject(model, LoLDU(alpha=None))[0].adapters["default"]
    assert a.lora_z.tolist() == [2.0, 1.0, 1.0]
    assert a.lora_A[1].tolist() == [0.0, 0.0, 5.0, -3.0]
    assert torch.equal(a.lora_B @ a.lora_z.diag() @ a.lora_A, weight)
    model(torch.eye(4)).square().sum().backward()
    assert a.lora_z.grad.isfinite().all()
    assert a.lora_z.grad[:2].all()


def test_small_weights_are_no_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data *= 1e-12
    a = inject(model, LoLDU(alpha=None))[0].adapters["default"]
    assert a.lora_z.abs().max() < 1e-11
    torch.testing.assert_close(a.lora_A.diagonal(), torch.ones(3))
