"""scale_shift against the formula; as its twin here, as its kernel where interpreted."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_peft.kernels import scale_shift
from lightning_peft.kernels.scale_shift import _forward
from tests.kernels.rule import INTERPRETED, check, every_dtype, upstreams


def plain(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    y = x * scale
    return (y if shift is None else y + shift).to(x.dtype)


@every_dtype
@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("shape", [(1,), (4, 1), (3, 17), (2, 3, 63), (70, 127), (2, 1030)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...], with_shift: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    scale, shift = (torch.randn(shape[-1], dtype=dtype).requires_grad_() for _ in range(2))
    for upstream in upstreams(shape)[: 1 if INTERPRETED and shape != (3, 17) else 4]:
        check(scale_shift, plain, (x, scale, shift if with_shift else None), upstream)


@pytest.mark.parametrize("frozen", [("x",), ("scale",), ("shift",), ("x", "shift"), ("x", "scale"), ("scale", "shift")])
def test_parts_may_be_frozen(frozen: tuple[str, ...]) -> None:
    x = torch.randn(4, 9).requires_grad_("x" not in frozen)
    scale, shift = (torch.randn(9).requires_grad_(name not in frozen) for name in ("scale", "shift"))
    check(scale_shift, plain, (x, scale, shift), torch.randn(4, 9))


@pytest.mark.parametrize("shape", [(150, 100), (9, 2100)], ids=str)
def test_many_rows_in_few_programs(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_peft.kernels.scale_shift"], "PROGRAMS", 2)
    x = torch.randn(shape).requires_grad_()
    scale, shift = (torch.randn(shape[-1]).requires_grad_() for _ in range(2))
    check(scale_shift, plain, (x, scale, shift), torch.randn(shape))


def test_vectors_in_float32_beside_a_half_precision_input() -> None:
    x = torch.randn(4, 24, dtype=torch.float16).requires_grad_()
    scale, shift = (torch.randn(24).requires_grad_() for _ in range(2))
    check(scale_shift, plain, (x, scale, shift), torch.randn(4, 24))


def test_inputs_with_gaps_and_empty_ones() -> None:
    scale, shift = torch.randn(2 * 20)[::2].requires_grad_(), torch.randn(1).expand(20).requires_grad_()
    check(scale_shift, plain, (torch.randn(5, 40)[:, ::2].requires_grad_(), scale, shift), torch.randn(5, 20))
    check(scale_shift, plain, (torch.randn(20, 5).T.requires_grad_(), scale, shift), torch.randn(20, 5).T)
    assert scale_shift(torch.randn(20, 5).T, scale, shift).is_contiguous()
    empty = torch.randn(0, 20).requires_grad_()
    for gradient in torch.autograd.grad(scale_shift(empty, scale, shift).sum(), (empty, scale, shift)):
        assert not gradient.any()


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70))
def test_properties(rows: int, columns: int) -> None:
    x, scale, shift = torch.randn(rows, columns), torch.randn(columns), torch.randn(columns)
    one, zero = torch.ones(columns), torch.zeros(columns)
    assert torch.equal(scale_shift(x, one, zero), x)
    assert torch.equal(scale_shift(x.half(), one), x.half())
    twice = scale_shift(scale_shift(x, scale, shift), scale, shift)
    torch.testing.assert_close(twice, scale_shift(x, scale * scale, scale * shift + shift))


def test_what_is_kept_for_backward() -> None:
    x, scale = torch.randn(6, 32, requires_grad=True), torch.randn(32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scale_shift(x, scale, torch.randn(32, requires_grad=True))
        assert [t.data_ptr() for t in kept] == [scale.data_ptr()]
        scale_shift(x, scale.requires_grad_())
    assert {t.data_ptr() for t in kept} == {scale.data_ptr(), x.data_ptr()}


def test_wrong_shapes_are_named() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"scale_shift: scale must be \(8,\) for x \(2, 3, 8\), got \(3,\)"):
        scale_shift(x, torch.randn(3))
    with pytest.raises(ValueError, match=r"scale_shift: shift must be \(8,\)"):
        scale_shift(x, torch.randn(8), torch.randn(1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    x = torch.randn(8, 3).T.requires_grad_()
    scale, shift = (torch.randn(8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(_forward, (x, scale, shift))
    torch.library.opcheck(_forward, (x, scale.detach(), None))
    torch.library.opcheck(_forward, (x.detach(), scale.detach(), shift))
    assert torch.autograd.gradcheck(
        scale_shift, [each.detach().double().requires_grad_() for each in (x, scale, shift)]
    )


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
def test_it_compiles_whole() -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (8,), (8,))]
    compiled = torch.compile(scale_shift, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), scale_shift(*inputs))
    grads = [torch.autograd.grad(f(*inputs).pow(3).sum(), inputs) for f in (compiled, scale_shift)]
    torch.testing.assert_close(*grads)
    frozen = [inputs[0], inputs[1].detach()]
    grads = [torch.autograd.grad(f(*frozen).pow(3).sum(), inputs[0]) for f in (compiled, scale_shift)]
    torch.testing.assert_close(*grads)
