"""mixture_lora against the sum over experts; as its twin here, as its kernels where interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import lora_product, mixture_lora, rms_norm
from lightning_peft.kernels.mixture_lora import _forward
from tests.kernels.rule import DEVICE, INTERPRETED, check, every_dtype, upstreams


def plain(x: Tensor, A: Tensor, B: Tensor, gates: Tensor, scaling: float | Tensor) -> Tensor:
    x = x.to(A.dtype)
    return sum(
        p[..., None].to(A.dtype) * F.linear(F.linear(x, a), scaling * b)
        for a, b, p in zip(A, B, gates.unbind(-1), strict=True)
    )  # type: ignore[return-value]


def made(
    T: tuple[int, ...], K: int, N: int, E: int, r: int, dtype: torch.dtype = torch.float32, **trains: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """x, A, B, gates of which about half are 0, and scaling."""
    x, A, B = (torch.randn(shape, dtype=dtype) for shape in ((*T, K), (E, r, K), (E, N, r)))
    gates = (torch.rand(*T, E) * (torch.rand(*T, E) < 0.5)).to(dtype)
    for name, each in (("x", x), ("A", A), ("B", B), ("gates", gates)):
        each.requires_grad_(trains.get(name, True))
    return x, A, B, gates, 0.7


# more than one program of the kernels, and ragged; of single numbers, which average no rounding away, none
SIZES = [((1,), 7, 5, 1, 2), ((2, 19), 63, 40, 3, 5), ((61,), 17, 31, 4, 24), ((9,), 70, 7, 5, 66)]


@every_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients(sizes: tuple[tuple[int, ...], int, int, int, int], dtype: torch.dtype) -> None:
    T, _, N, _, _ = sizes
    for upstream in upstreams((*T, N)):
        check(mixture_lora, plain, made(*sizes, dtype), upstream)


NAMES = ("x", "A", "B", "gates")


@pytest.mark.parametrize(
    "trained", [*((name,) for name in NAMES), ("x", "gates"), ("A", "B"), ("x", "A", "B")], ids=str
)
def test_parts_may_be_frozen(trained: tuple[str, ...]) -> None:
    given = made((9,), 6, 7, 3, 2, **{name: name in trained for name in NAMES})
    check(mixture_lora, plain, given, torch.randn(9, 7))


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "gates_dtype"),
    [(torch.float16, torch.float32, torch.float32), (torch.float32, torch.float16, torch.float32)],
    ids=["coarse x", "coarse factors"],
)
def test_the_result_has_the_precision_of_the_factors(
    x_dtype: torch.dtype, dtype: torch.dtype, gates_dtype: torch.dtype
) -> None:
    x, A, B, gates, scaling = made((11,), 20, 30, 3, 4, dtype)
    x, gates = (each.detach().to(to).requires_grad_() for each, to in ((x, x_dtype), (gates, gates_dtype)))
    check(mixture_lora, plain, (x, A, B, gates, scaling), torch.randn(11, 30))


def test_the_scaling_may_be_a_tensor_that_trains() -> None:
    x, A, B, gates, _ = made((9,), 6, 7, 3, 2)
    check(mixture_lora, plain, (x, A, B, gates, torch.tensor(0.3).requires_grad_()), torch.randn(9, 7))


def test_inputs_with_gaps() -> None:
    x, gates = torch.randn(8, 12, 5).permute(2, 0, 1)[..., ::2].requires_grad_(), torch.rand(8, 3, 5).permute(2, 0, 1)
    A, B = torch.randn(3, 6, 2).mT.requires_grad_(), torch.randn(2, 7, 3).permute(2, 1, 0).requires_grad_()
    check(mixture_lora, plain, (x, A, B, gates.requires_grad_(), 0.7), torch.randn(7, 8, 5).permute(2, 1, 0))
    assert mixture_lora(x, A, B, gates).is_contiguous()


@pytest.mark.parametrize("sizes", [((0,), 6, 7, 3, 2), ((5,), 6, 7, 0, 2), ((5,), 6, 7, 3, 0)], ids=str)
def test_no_tokens_no_experts_and_no_ranks(sizes: tuple[tuple[int, ...], int, int, int, int]) -> None:
    x, A, B, gates, scaling = made(*sizes)
    y = mixture_lora(x, A, B, gates, scaling)
    assert torch.equal(y, torch.zeros(*sizes[0], 7))
    for gradient, each in zip(torch.autograd.grad(y.sum(), (x, A, B, gates)), (x, A, B, gates), strict=True):
        assert torch.equal(gradient, torch.zeros_like(each))


def test_one_token_without_other_dimensions() -> None:
    check(mixture_lora, plain, made((), 6, 7, 3, 2), torch.randn(7))


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(T=st.integers(1, 40), K=st.integers(1, 20), N=st.integers(1, 20), E=st.integers(1, 5), r=st.integers(1, 9))
def test_properties(T: int, K: int, N: int, E: int, r: int) -> None:
    x, A, B, gates, scaling = made((T,), K, N, E, r)
    y = mixture_lora(x, A, B, gates, scaling)
    close = {"rtol": 1e-4, "atol": 1e-4}
    # linear in the gates and in the scaling, and the order of experts is nobody's
    torch.testing.assert_close(mixture_lora(x, A, B, 2 * gates, scaling), 2 * y, **close)
    torch.testing.assert_close(mixture_lora(x, A, B, gates), y / scaling, **close)
    order = torch.randperm(E)
    torch.testing.assert_close(mixture_lora(x, A[order], B[order], gates[:, order], scaling), y, **close)
    # one expert alone is the plain product; none is nothing
    chosen = F.one_hot(torch.tensor(E - 1), E).float().expand(T, E)
    torch.testing.assert_close(mixture_lora(x, A, B, chosen, scaling), lora_product(x, A[-1], scaling * B[-1]), **close)
    assert not mixture_lora(x, A, B, 0 * gates).any()
    # the gradient of a gate is what its expert gives along dy, chosen or not
    dy = torch.randn(T, N)
    each = torch.stack([dy.mul(lora_product(x, a, scaling * b)).sum(-1) for a, b in zip(A, B, strict=True)], -1)
    torch.testing.assert_close(torch.autograd.grad(y, gates, dy)[0], each, **close)


def test_what_is_kept_for_backward() -> None:
    x, A, B, gates, scaling = made((50,), 32, 7, 3, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixture_lora(x, A, B, gates, scaling)
        assert x.data_ptr() in {t.data_ptr() for t in kept}
        rest = [t for t in kept if len(t) == 50 and t.data_ptr() != x.data_ptr()]
        assert [t.shape for t in rest] == [(50, 3), (50, 6)]  # gates, and x A^T
        kept.clear()
        mixture_lora(x, A.detach(), B, gates, scaling)
        assert x.data_ptr() not in {t.data_ptr() for t in kept}
        hidden = rms_norm(x, None, 1e-6)
        kept.clear()
        y = mixture_lora(hidden, A, B, gates, scaling)
    assert hidden.data_ptr() not in {t.data_ptr() for t in kept}
    expected = plain(F.rms_norm(x, (32,), eps=1e-6), A, B, gates, scaling)
    for mine, theirs in zip(*(torch.autograd.grad(e.sum(), (x, A, B, gates)) for e in (y, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_decides_on_the_precision() -> None:
    x, A, B, gates, scaling = made((9,), 6, 7, 3, 2)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(DEVICE, dtype):
        y = mixture_lora(x, A, B, gates, scaling)
    assert y.dtype == dtype
    expected = plain(x, A, B, gates, scaling)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)  # a few roundings of 8 bits
    for mine, theirs in zip(*(torch.autograd.grad(e.sum(), (x, A, B, gates)) for e in (y, expected)), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_wrong_arguments_are_named() -> None:
    x, A, B, gates, scaling = made((5,), 6, 7, 3, 2)
    with pytest.raises(ValueError, match=r"mixture_lora: x must be .* got \(5, 5\), \(3, 2, 6\) and \(3, 7, 2\)"):
        mixture_lora(x[:, 1:], A, B, gates, scaling)
    with pytest.raises(ValueError, match=r"got \(5, 6\), \(3, 2, 6\) and \(3, 7, 1\)"):
        mixture_lora(x, A, B[..., 1:], gates, scaling)
    with pytest.raises(ValueError, match=r"got \(5, 6\), \(3, 2, 6\) and \(2, 7, 2\)"):
        mixture_lora(x, A, B[1:], gates, scaling)
    with pytest.raises(ValueError, match=r"got \(5, 6\), \(2, 6\) and \(7, 2\)"):
        mixture_lora(x, A[0], B[0], gates, scaling)
    with pytest.raises(ValueError, match=r"gates must be \(5, 3\), one for each token and expert, got \(5, 2\)"):
        mixture_lora(x, A, B, gates[:, 1:], scaling)
    with pytest.raises(ValueError, match=r"got torch.float32, torch.float16, torch.float32, torch.float32 for x"):
        mixture_lora(x, A.half(), B, gates, scaling)
    with pytest.raises(ValueError, match=r"got torch.float32, torch.float32, torch.float32, torch.bool for x"):
        mixture_lora(x, A, B, gates > 0, scaling)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    x, A, B, gates, _ = made((5,), 6, 7, 3, 2)
    down, up = A.detach().flatten(0, 1).requires_grad_(), torch.randn(7, 6).requires_grad_()
    torch.library.opcheck(_forward, (x, down, up, gates))
    torch.library.opcheck(_forward, (torch.randn(6, 5).half().T, down, up.detach(), gates))
    torch.library.opcheck(_forward, (x.detach(), down.detach(), torch.randn(6, 7).T, torch.rand(3, 5).T))
    exact = [each.detach().double().requires_grad_() for each in (x, A, B, gates)]
    assert torch.autograd.gradcheck(lambda *each: mixture_lora(*each, 0.7), exact)


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mixture_lora, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for T in (40, 3) if dynamic else (40,):
        *given, scaling = made((T,), 6, 7, 3, 2)
        mine, theirs = (f(*given, scaling) for f in (compiled, mixture_lora))
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(y.pow(3).sum(), given) for y in (mine, theirs)))
