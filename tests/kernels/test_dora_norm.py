"""dora_norm against the norms of the sum; as its twin here, as its kernel where interpreted."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_peft.kernels import dora_norm
from lightning_peft.kernels.dora_norm import _norm
from tests.kernels.rule import DEVICE, INTERPRETED, assert_near_truth, every_dtype


def plain(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight.to(wide) + scaling * b.to(wide) @ a.to(wide)).norm(dim=1)


def check(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    before = [x.clone() for x in (weight, a, b)]
    result = dora_norm(weight, a, b, scaling)
    truth = plain(weight.double(), a.double(), b.double(), scaling)
    assert_near_truth(result, plain(weight, a, b, scaling), truth)
    assert result.is_contiguous()
    assert not result.requires_grad
    assert all(torch.equal(x, y) for x, y in zip((weight, a, b), before, strict=True))


@every_dtype
@pytest.mark.parametrize("r", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (70, 127), (33, 257)], ids=str)
def test_norms(shape: tuple[int, int], r: int, dtype: torch.dtype) -> None:
    N, K = shape
    weight, a, b = (torch.randn(s, dtype=dtype) for s in ((N, K), (r, K), (N, r)))
    check(weight, a, b, 0.1)  # more could cancel: see below


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_float32_beside_a_half_precision_weight(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bit patterns of bfloat16")
    check(torch.randn(40, 150, dtype=dtype), torch.randn(5, 150), torch.randn(40, 5), 2.0)


def test_ranks_that_no_kernel_takes() -> None:
    check(torch.randn(5, 300), torch.randn(260, 300), torch.randn(5, 260), 0.1)


def test_a_weight_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_peft.kernels.dora_norm"], "ELEMENTS", 100)
    check(torch.randn(17, 33), torch.randn(2, 33), torch.randn(17, 2), 1.5)


def test_inputs_with_gaps_and_empty_ones() -> None:
    check(torch.randn(20, 6).T, torch.randn(20, 3).T, torch.randn(6, 6)[:, ::2], 1.0)
    assert dora_norm(torch.randn(0, 5), torch.randn(2, 5), torch.randn(0, 2), 1.0).shape == (0,)
    weight = torch.randn(4, 5)
    torch.testing.assert_close(dora_norm(weight, torch.randn(0, 5), torch.randn(4, 0), 1.0), weight.norm(dim=1))


def test_rows_that_the_product_cancels_have_the_norm_zero_or_nearly() -> None:
    a, b = torch.randn(3, 200), torch.randn(50, 3)
    weight = -2.0 * b @ a
    norm = dora_norm(weight, a, b, 2.0)
    assert norm.isfinite().all()
    assert (norm <= 2e-3 * weight.norm(dim=1)).all()  # the root of what rounding leaves


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(N=st.integers(1, 40), K=st.integers(1, 40), r=st.integers(1, 20), scaling=st.floats(-4, 4))
def test_properties(N: int, K: int, r: int, scaling: float) -> None:
    weight, a, b = torch.randn(N, K), torch.randn(r, K), torch.randn(N, r)
    norm = dora_norm(weight, a, b, scaling)
    torch.testing.assert_close(norm, dora_norm(weight, a, b, torch.tensor(scaling)))
    torch.testing.assert_close(norm, dora_norm(weight, scaling * a, b, 1.0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dora_norm(weight, a, 0 * b, scaling), weight.norm(dim=1))
    order = torch.randperm(N)
    torch.testing.assert_close(dora_norm(weight[order], a, b[order], scaling), norm[order])


def test_it_is_a_constant() -> None:
    weight, a, b = (torch.randn(s, requires_grad=True) for s in ((4, 6), (2, 6), (4, 2)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm = dora_norm(weight, a, b, torch.ones((), requires_grad=True))
    assert not norm.requires_grad
    assert kept == []


def test_autocast_takes_no_precision_away() -> None:
    weight, a, b = (torch.randn(s) for s in ((4, 6), (2, 6), (4, 2)))
    with torch.autocast(DEVICE, torch.bfloat16):
        norm = dora_norm(weight, a, b, 0.1)
    assert torch.equal(norm, dora_norm(weight, a, b, 0.1))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 6\), \(2, 5\) and \(4, 2\)"):
        dora_norm(torch.randn(4, 6), torch.randn(2, 5), torch.randn(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"got \(4, 6\), \(2, 6\) and \(4, 3\)"):
        dora_norm(torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 3), 1.0)
    with pytest.raises(ValueError, match=r"flatten\(1\)"):
        dora_norm(torch.randn(4, 6, 1, 1), torch.randn(2, 6, 1, 1), torch.randn(4, 2, 1, 1), 1.0)


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    torch.library.opcheck(_norm, (torch.randn(6, 4).T, torch.randn(2, 6), torch.randn(4, 2)))
    torch.library.opcheck(_norm, (torch.randn(4, 6).half(), torch.randn(2, 6), torch.randn(4, 2)))
    weight, a, b = torch.randn(4, 6), torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    compiled = torch.compile(dora_norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight, a, b, 0.5), dora_norm(weight, a, b, 0.5))
