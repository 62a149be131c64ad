"""swiglu and geglu against the formulas; as twins here, as kernels where interpreted."""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import geglu, swiglu
from lightning_peft.kernels.gates import _eager, _forward
from tests.kernels.rule import INTERPRETED, check, every_dtype, upstreams

Gate = Callable[[Tensor, Tensor], Tensor]


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    return F.gelu(gate, approximate=approximate) * up


PAIRS = {
    "swiglu": (swiglu, plain_swiglu),
    "geglu": (geglu, plain_geglu),
    "exact geglu": (
        functools.partial(geglu, approximate="none"),
        functools.partial(plain_geglu, approximate="none"),
    ),
}
every_gate = pytest.mark.parametrize(("ours", "plain"), PAIRS.values(), ids=PAIRS.keys())


@every_dtype
@every_gate
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 2, 63), (5, 127), (2, 2057)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...], ours: Gate, plain: Gate, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    for upstream in upstreams(shape)[: 1 if INTERPRETED and shape != (3, 17) else 4]:
        check(ours, plain, (gate, up), upstream)


@every_gate
@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_one_side_may_be_frozen(frozen: str, ours: Gate, plain: Gate) -> None:
    gate, up = (torch.randn(4, 9).requires_grad_(frozen != name) for name in ("gate", "up"))
    check(ours, plain, (gate, up), torch.randn(4, 9))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: 1 / (1 + inf) is meant
@every_dtype
@every_gate
def test_far_from_zero(ours: Gate, plain: Gate, dtype: torch.dtype) -> None:
    gate = torch.tensor([-300.0, -30.0, -6.0, -0.0, 0.0, 6.0, 30.0, 300.0], dtype=dtype).requires_grad_()
    check(ours, plain, (gate, torch.randn(8, dtype=dtype).requires_grad_()), torch.randn(8))


@every_gate
def test_halves_of_a_fused_projection(ours: Gate, plain: Gate) -> None:
    def halves(gate: Gate) -> Callable[[Tensor], Tensor]:
        return lambda fused: gate(*fused.chunk(2, -1))

    check(halves(ours), halves(plain), (torch.randn(2, 3, 34).requires_grad_(),), torch.randn(2, 3, 17))
    gate, up = torch.randn(6, 5).T.requires_grad_(), torch.randn(5, 12)[:, ::2].requires_grad_()
    check(ours, plain, (gate, up), torch.randn(5, 6))
    y = ours(gate, up)
    assert all(each.is_contiguous() for each in (y, *torch.autograd.grad(y.sum(), (gate, up))))


@every_gate
def test_an_empty_input(ours: Gate, plain: Gate) -> None:
    for shape in ((0, 8), (3, 0)):
        gate, up = (torch.randn(shape).requires_grad_() for _ in range(2))
        ours(gate, up).sum().backward()
        assert gate.grad is not None
        assert gate.grad.shape == shape


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), name=st.sampled_from(sorted(PAIRS)))
def test_properties(rows: int, columns: int, name: str) -> None:
    ours = PAIRS[name][0]
    gate, up, other = (torch.randn(rows, columns) for _ in range(3))
    torch.testing.assert_close(ours(gate, up + other), ours(gate, up) + ours(gate, other))
    # phi(g) - phi(-g) = g for all three
    torch.testing.assert_close(ours(gate, up) - ours(-gate, up), gate * up)
    assert not ours(torch.zeros(rows, columns), up).any()


def test_what_is_kept_for_backward() -> None:
    fused, kept = torch.randn(6, 32, requires_grad=True), []
    gate, up = fused.chunk(2, -1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}
    assert len(kept) == 2


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"swiglu: gate and up must agree .* \(2, 8\) torch.float32 and \(8,\)"):
        swiglu(x, x[0])
    with pytest.raises(ValueError, match=r"geglu: gate and up must agree .* torch.float64"):
        geglu(x, x.double())
    with pytest.raises(ValueError, match=r"approximate must be 'tanh' or 'none', got 'erf'"):
        geglu(x, x, approximate="erf")  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="the kernel rounds in another order")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_the_twin_called_by_itself_is_the_operation(activation: str) -> None:
    gate, up, upstream = (torch.randn(3, 8, device="cpu") for _ in range(3))
    inputs = (gate.requires_grad_(), up.requires_grad_())
    ours, registered = (f(*inputs, activation) for f in (_eager, _forward))
    assert torch.equal(ours, registered)
    for one, other in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (ours, registered)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_the_operations_are_well_behaved(activation: str) -> None:
    gate, up = torch.randn(3, 8, requires_grad=True), torch.randn(8, 3).T.requires_grad_()
    torch.library.opcheck(_forward, (gate, up, activation))
    torch.library.opcheck(_forward, (gate.detach(), up, activation))
    gate, up = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *each: _forward(*each, activation), (gate, up))


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
def test_they_compile_whole() -> None:
    def both(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up) + geglu(gate, up, approximate="none")

    inputs = [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), both(*inputs))
    ours, theirs = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, both))
    torch.testing.assert_close(ours, theirs)
