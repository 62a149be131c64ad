"""SALT against the formula of the paper, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_peft import SALT, AdapterError, inject
from lightning_peft.engine import TargetError, adapters_of, notify
from tests.papers.stack import batch, loss, stack, steps

LAYERS = r"layers\.\d\.(up|down|attn)"


def adapted(move: float = 0.3, **changed: Any) -> nn.Module:
    """Off the initial point, so far that some entries of the spectrum would be negative."""
    arguments = {"ratio": 0.4, "r": 2, "target_modules": LAYERS, **changed}
    model = inject(stack(2).double(), SALT(**arguments))
    generator = torch.Generator().manual_seed(3)
    for _, _, adapter in adapters_of(model):
        for p in adapter.parameters():
            p.data += move * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        adapter.shift.data[-1] -= 10 * move
    return model


def written_out(a: Any) -> Tensor:
    """U S' V^T, entry by entry of S'."""
    n, k = len(a.scale), len(a.values)
    added, rows = a.X @ a.Y, []
    for i in range(k):
        for j in range(k):
            entry = a.values[i] * float(i == j)
            if i == j < n:
                entry = a.scale[i] * a.values[i] + a.shift[i]
            if i >= n and j >= n:
                entry = entry + added[i - n, j - n]
            rows.append(entry if entry > 0 else 0 * entry)
    return a.lora_B @ torch.stack(rows).view(k, k) @ a.lora_A


def test_the_weight_is_that_of_the_paper() -> None:
    cut = 0
    for _, module, a in adapters_of(adapted()):
        expected = written_out(a)
        torch.testing.assert_close(a.merged(module.weight, None)[0], expected)
        x = torch.linspace(-1, 1, module.in_features, dtype=torch.float64)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), expected @ x + bias)
        cut += (a.values[2:].diag() + a.X @ a.Y < 0).sum().item()
        assert (len(a.scale), len(a.values)) == (2, 6), "floor(0.4 * 6) of 6 values"
    assert cut > 10


def test_between_the_singular_vectors_are_two_blocks_without_negative_entries() -> None:
    model = adapted(move=0.0)
    steps(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1), 0, 10)
    for _, module, a in adapters_of(model):
        torch.testing.assert_close(a.lora_B @ a.values.diag() @ a.lora_A, module.weight)
        spectrum = a.lora_B.T @ a.merged(module.weight, None)[0].detach() @ a.lora_A.T
        assert spectrum.min() > -1e-9
        assert (spectrum[2:, 2:] - spectrum[2:, 2:].diagonal().diag()).max() > 1e-3
        assert spectrum[:2, 2:].abs().max() < 1e-9
        assert spectrum[2:, :2].abs().max() < 1e-9
        torch.testing.assert_close(spectrum[:2, :2], spectrum[:2, :2].diagonal().diag(), rtol=0, atol=1e-9)
        assert (spectrum.diagonal() - a.values).abs().max() > 1e-2


def test_gradients_are_those_of_the_formula() -> None:
    model, full = adapted(), stack(2).double()
    layers = adapters_of(model)
    for path, _, a in layers:
        full.get_parameter(f"{path}.weight").data = written_out(a).detach()
    for net in (model, full):
        loss(net, 0).backward()
    for path, _, a in layers:
        parameters = [a.scale, a.shift, a.X, a.Y]
        gradient = full.get_parameter(f"{path}.weight").grad
        expected = torch.autograd.grad((written_out(a) * gradient).sum(), parameters)
        torch.testing.assert_close(tuple(p.grad for p in parameters), expected)
        assert all(g.any() for g in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    x = batch(0)[0].to(dtype)
    assert torch.equal(inject(stack(2).to(dtype), SALT(target_modules=LAYERS))(x), stack(2).to(dtype)(x))
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).to(dtype)
    image = torch.randn(2, 4, 5, 5).to(dtype)
    before = conv(image)
    assert torch.equal(inject(conv, SALT(r=2, target_modules="all-layers"))(image), before)


def test_the_start_of_the_parameters() -> None:
    for _, module, a in adapters_of(adapted(move=0.0, r=3)):
        assert (a.scale == 1).all()
        assert not a.shift.any()
        assert not a.Y.any()
        bound = (6 / ((1 + 20) * 3)) ** 0.5  # Kaiming's for a slope of sqrt(20) and 3 inputs
        assert 0.7 * bound < a.X.abs().max() <= bound
        torch.testing.assert_close(a.values, torch.linalg.svdvals(module.weight))


def test_singular_vectors_and_values_stay() -> None:
    model = adapted(reg=0.1)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    steps(model, SGD(model.parameters(), lr=0.1), 0, 3)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"scale", "shift", "X", "Y"}


def test_the_penalty_is_the_sum_of_two_norms_in_each_layer() -> None:
    model = adapted(reg=0.7)
    values = notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1))
    total = torch.zeros(())
    for _, _, a in adapters_of(model):
        change = (a.scale - 1) * a.values[:2] + a.shift
        total = total + 0.7 * ((change**2).sum() ** 0.5 + ((a.X @ a.Y) ** 2).sum() ** 0.5)
    assert values["default/spectrum"].item() == pytest.approx(total.item())
    for _, _, a in adapters_of(model):
        parameters = [a.scale, a.shift, a.X, a.Y]
        wanted = torch.autograd.grad(total, parameters, retain_graph=True)
        torch.testing.assert_close(tuple(p.grad for p in parameters), wanted)


def test_there_is_none_by_default_and_none_at_the_start() -> None:
    model = adapted()
    assert notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1)) == {}
    model = adapted(move=0.0, reg=1.0)
    values = notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1))
    assert values["default/spectrum"] == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert not any(g.any() for g in grads), "a norm has a corner at zero: no NaN there"


@pytest.mark.parametrize(("ratio", "n"), [(0.0, 1), (0.1, 1), (0.3, 1), (0.35, 2), (0.99, 5)])
def test_how_many_values_are_scaled(ratio: float, n: int) -> None:
    model = inject(nn.Sequential(nn.Linear(7, 6)), SALT(ratio=ratio, r=1))
    assert len(model[0].adapters["default"].scale) == n


def test_the_rank_is_lowered_to_what_is_left() -> None:
    model = inject(nn.Sequential(nn.Linear(7, 5)), SALT(r=256, ratio=0.5))
    a = model[0].adapters["default"]
    assert (len(a.scale), a.X.shape, a.Y.shape) == (2, (3, 3), (3, 3))


def test_a_weight_of_one_singular_value_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'1' \(1 x 3\) has one singular value.* exclude_modules"):
        inject(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), SALT(target_modules=("0", "1")))


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"ratio": -0.1}, {"r": 0}, {"reg": -1.0}], ids=repr)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"SALT: {next(iter(wrong))} must be"):
        SALT(**wrong)
