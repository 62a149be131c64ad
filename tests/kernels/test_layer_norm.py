"""layer_norm and its modulated form against the formula; as twins here, as kernels where interpreted."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_peft.kernels import layer_norm, modulated_layer_norm
from lightning_peft.kernels.layer_norm import _forward
from tests.kernels.rule import INTERPRETED, check, every_dtype, upstreams


def normalised(x: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = normalised(x, eps)
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def plain_modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    y = normalised(x, eps)
    middle = (slice(None), *[None] * (x.dim() - 2))
    return (y * (1 + scale[middle].to(y.dtype)) + shift[middle].to(y.dtype)).to(x.dtype)


def vector(kind: str, *shape: int, dtype: torch.dtype) -> Tensor | None:
    return None if kind == "none" else torch.randn(*shape, dtype=dtype).requires_grad_(kind == "trained")


@every_dtype
@pytest.mark.parametrize("shape", [(4, 1), (3, 17), (2, 3, 63), (3 if INTERPRETED else 33, 127), (3, 257)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    w, b = (vector("trained", shape[-1], dtype=dtype) for _ in range(2))
    for upstream in upstreams(shape)[: 1 if INTERPRETED and shape != (3, 17) else 4]:
        check(layer_norm, plain, (x, w, b, 0.5 if shape[-1] == 1 else 1e-5), upstream)


@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("weight", ["none", "frozen", "trained"])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_any_part_may_be_missing_or_frozen(bias: str, weight: str, x_trains: bool) -> None:
    if not x_trains and "trained" not in (weight, bias):
        pytest.skip("nothing trains")
    x = (3 + torch.randn(5, 19)).requires_grad_(x_trains)
    w, b = (vector(kind, 19, dtype=torch.float32) for kind in (weight, bias))
    check(layer_norm, plain, (x, w, b, 1e-5), torch.randn(5, 19))


@every_dtype
@pytest.mark.parametrize("shape", [(1, 4, 1), (3, 3, 17), (2, 2, 2, 63)], ids=str)
def test_modulated(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    scale, shift = (torch.randn(shape[0], shape[-1], dtype=dtype).requires_grad_() for _ in range(2))
    for upstream in upstreams(shape)[: 1 if INTERPRETED else 4]:
        check(modulated_layer_norm, plain_modulated, (x, scale, shift, 0.5 if shape[-1] == 1 else 1e-6), upstream)


@pytest.mark.parametrize("trained", ["scale", "shift", "neither"])
def test_modulated_with_parts_frozen(trained: str) -> None:
    x = torch.randn(2, 3, 8).requires_grad_()
    scale, shift = (torch.randn(2, 8).requires_grad_(trained == name) for name in ("scale", "shift"))
    check(modulated_layer_norm, plain_modulated, (x, scale, shift, 1e-6), torch.randn(2, 3, 8))


def test_rows_longer_than_a_block() -> None:
    x = torch.randn(3, 8200).requires_grad_()
    w, b = (vector("trained", 8200, dtype=torch.float32) for _ in range(2))
    check(layer_norm, plain, (x, w, b, 1e-5), torch.randn(3, 8200))


@pytest.mark.parametrize("columns", [2, 8200])
def test_many_rows_in_few_programs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_peft.kernels.layer_norm"], "PROGRAMS", 4)
    x = torch.randn(2, 7, columns).requires_grad_()
    scale, shift = (torch.randn(2, columns).requires_grad_() for _ in range(2))
    check(modulated_layer_norm, plain_modulated, (x, scale, shift, 1e-2), torch.randn(x.shape))


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x = (1e4 + torch.randn(4, 64)).requires_grad_()
    check(layer_norm, plain, (x, torch.randn(64), torch.randn(64), 1e-5), torch.randn(4, 64))


def test_parameters_in_float32_beside_a_half_precision_input() -> None:
    x = torch.randn(4, 24, dtype=torch.float16).requires_grad_()
    w, b = (vector("trained", 24, dtype=torch.float32) for _ in range(2))
    check(layer_norm, plain, (x, w, b, 1e-5), torch.randn(4, 24))


def test_inputs_with_gaps_and_empty_ones() -> None:
    x = torch.randn(5, 40)[:, ::2].requires_grad_()
    w = torch.randn(40)[::2].requires_grad_()
    check(layer_norm, plain, (x, w, torch.randn(20), 1e-5), torch.randn(5, 20))
    scale, shift = torch.randn(2, 16, requires_grad=True).chunk(2, -1)
    x = torch.randn(3, 2, 8).transpose(0, 1).requires_grad_()
    check(modulated_layer_norm, plain_modulated, (x, scale, shift, 1e-5), torch.randn(2, 3, 8))
    empty, w = torch.randn(0, 8).requires_grad_(), torch.ones(8).requires_grad_()
    layer_norm(empty, w, None, 1e-5).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 8)
    assert w.grad is not None
    assert not w.grad.any()


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), columns=st.integers(2, 70), by=st.floats(-20, 20), times=st.floats(0.5, 20))
def test_moving_and_stretching_a_row_changes_nothing(rows: int, columns: int, by: float, times: float) -> None:
    x, w, b = torch.randn(rows, columns), torch.randn(columns), torch.randn(columns)
    x[:, 0] += 3  # some variance in each row
    x.requires_grad_()
    y = layer_norm(x, w, b, 0.0)
    torch.testing.assert_close(layer_norm(times * x + by, w, b, 0.0), y, rtol=1e-3, atol=1e-3)
    dx = torch.autograd.grad(y, x, torch.randn(rows, columns))[0]
    allowed = 1e-4 * (1 + dx.abs().max())
    assert dx.sum(-1).abs().max() < allowed
    assert (dx * x).sum(-1).abs().max() < allowed * (1 + x.detach().abs().max())


def test_it_is_the_norm_of_torch_and_no_modulation_is_none() -> None:
    x, w, b = torch.randn(4, 9), torch.randn(9), torch.randn(9)
    torch.testing.assert_close(layer_norm(x, w, b, 1e-5), torch.nn.functional.layer_norm(x, (9,), w, b, 1e-5))
    zero = torch.zeros(4, 9)
    y = modulated_layer_norm(x[:, None], zero, zero, 1e-5)[:, 0]
    torch.testing.assert_close(y, layer_norm(x, None, None, 1e-5), rtol=0, atol=0)


def test_what_is_kept_for_backward() -> None:
    x, w, b = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True), torch.randn(32)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        layer_norm(x, w, b, 1e-5)
    assert sum(kept.values()) == 4 * (x.numel() + w.numel() + 2 * 6)
    assert {x.data_ptr(), w.data_ptr()} < kept.keys()


def test_wrong_shapes_are_named() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \(8,\) for x \(2, 3, 8\), got \(3, 8\)"):
        layer_norm(x, torch.randn(3, 8), None, 1e-6)
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \(8,\)"):
        layer_norm(x, None, torch.randn(2), 1e-6)
    with pytest.raises(ValueError, match=r"scale must be \(2, 8\) for x \(2, 3, 8\), got \(2, 1, 8\)"):
        modulated_layer_norm(x, torch.randn(2, 1, 8), torch.randn(2, 8), 1e-6)
    with pytest.raises(ValueError, match=r"x must be \(B, ..., C\), got \(8,\)"):
        modulated_layer_norm(torch.randn(8), torch.randn(8), torch.randn(8), 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operations_are_well_behaved() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    w, b = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(_forward, (x, w, b, 1e-6, 1.0))
    torch.library.opcheck(_forward, (x, w.detach(), None, 1e-6, 0.0))
    torch.library.opcheck(_forward, (x.detach(), None, b, 1e-6, 0.0))
    torch.library.opcheck(_forward, (torch.randn(2, 8, 3).mT.detach().requires_grad_(), None, None, 1e-6, 0.0))
    x, w, b = (each.detach().double().requires_grad_() for each in (x, w, b))
    assert torch.autograd.gradcheck(lambda *each: layer_norm(*each, 1e-6), (x, w[0], b[0]))
    assert torch.autograd.gradcheck(lambda *each: modulated_layer_norm(*each, 1e-6), (x, w, b))


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
def test_they_compile_whole() -> None:
    def both(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return modulated_layer_norm(layer_norm(x, w, w, 1e-5), scale, scale, 1e-5)

    inputs = [torch.randn(2, 3, 8, requires_grad=True), *(torch.randn(s, requires_grad=True) for s in ((8,), (2, 8)))]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), both(*inputs))
    ours, theirs = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, both))
    torch.testing.assert_close(ours, theirs)
