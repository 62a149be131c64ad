"""segment_lora against every adapter computed for every token; as its twin here, as its kernels where interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import lora_product, rms_norm, segment_lora
from lightning_peft.kernels.segment_lora import TOKENS, _backward, _forward, _plan
from tests.kernels.rule import DEVICE, INTERPRETED, check, every_dtype, upstreams


def plain(x: Tensor, A: Tensor, B: Tensor, index: Tensor, scaling: float | Tensor) -> Tensor:
    y = A.new_zeros(*x.shape[:-1], B.shape[1])
    factors = torch.as_tensor(scaling).expand(len(A))
    for i, (a, b, s) in enumerate(zip(A, B, factors, strict=True)):
        y = torch.where((index == i)[..., None], s * F.linear(F.linear(x.to(A.dtype), a), b), y)
    return y


def made(
    T: tuple[int, ...], K: int, N: int, n: int, r: int, dtype: torch.dtype = torch.float32, **trains: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, A, B, index and scaling; about one token of n + 1 has no adapter, and with several one adapter no token."""
    index = torch.randint(-1, n, T)
    if n > 2:
        index[index == 1] = n - 1
    x, A, B = (torch.randn(shape, dtype=dtype) for shape in ((*T, K), (n, r, K), (n, N, r)))
    for name, each in (("x", x), ("A", A), ("B", B)):
        each.requires_grad_(trains.get(name, True))
    return x, A, B, index, torch.rand(n) + 0.5


# more than one program of each kernel in each direction, and ragged; more ranks than a kernel takes at a time
SIZES = [((1,), 1, 1, 1, 1), ((2, 19), 63, 40, 3, 5), ((110,), 130, 150, 4, 24), ((40,), 17, 31, 2, 70)]


@every_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients(sizes: tuple[tuple[int, ...], int, int, int, int], dtype: torch.dtype) -> None:
    T, _, N, _, _ = sizes
    for upstream in upstreams((*T, N))[: 4 if T == (2, 19) else 1]:
        check(segment_lora, plain, made(*sizes, dtype), upstream)


@pytest.mark.parametrize("frozen", [("x",), ("A",), ("B",), ("x", "A"), ("x", "B"), ("A", "B")])
def test_parts_may_be_frozen(frozen: tuple[str, ...]) -> None:
    check(segment_lora, plain, made((9,), 6, 7, 3, 2, **dict.fromkeys(frozen, False)), torch.randn(9, 7))


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
    ids=["fine", "coarse", "double"],
)
def test_the_result_has_the_precision_of_the_factors(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, *others = made((37,), 40, 30, 3, 4, dtype)
    check(segment_lora, plain, (torch.randn(37, 40, dtype=x_dtype).requires_grad_(), *others), torch.randn(37, 30))


def test_inputs_with_gaps() -> None:
    x, A, B, index, scaling = made((5, 8), 6, 7, 3, 2)
    x, index = torch.randn(8, 12, 5).permute(2, 0, 1)[..., ::2].requires_grad_(), index.T.contiguous().T
    A, B = torch.randn(3, 6, 2).mT.requires_grad_(), torch.randn(2, 7, 3).permute(2, 1, 0).requires_grad_()
    check(
        segment_lora, plain, (x, A, B, index, scaling.repeat_interleave(2)[::2]), torch.randn(7, 8, 5).permute(2, 1, 0)
    )
    assert segment_lora(x, A, B, index, scaling).is_contiguous()


def test_no_tokens_no_adapters_and_no_ranks() -> None:
    x, A, B, index, scaling = made((0,), 6, 7, 3, 2)
    y = segment_lora(x, A, B, index, scaling)
    assert y.shape == (0, 7)
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), (x, A, B)))
    x, A, B, index, scaling = made((5,), 6, 7, 3, 2)
    for n, r in ((0, 2), (3, 0)):
        given = x, A[:n, :r], B[:n, :, :r], index if n else torch.full((5,), -1), 1.0
        y = segment_lora(*given)
        assert torch.equal(y, torch.zeros(5, 7))
        assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), (x, A, B)))


def test_one_token_without_other_dimensions() -> None:
    check(segment_lora, plain, made((), 6, 7, 1, 2), torch.randn(7))


def test_tokens_without_an_adapter_have_no_update_and_no_part_in_gradients() -> None:
    x, A, B, index, scaling = made((50,), 6, 7, 3, 2)
    nobody = index == -1
    with torch.no_grad():
        x[nobody] = torch.inf
    y = segment_lora(x, A, B, index, scaling)
    assert nobody.any()
    assert torch.equal(y[nobody], torch.zeros_like(y[nobody]))
    base = torch.randn(50, 7)
    assert torch.equal((base + y)[nobody], base[nobody])
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), torch.where(nobody[:, None], torch.nan, 1.0).expand(50, 7))
    assert torch.equal(dx[nobody], torch.zeros_like(dx[nobody]))
    assert all(gradient.isfinite().all() for gradient in (dx, dA, dB))
    y = segment_lora(x, A, B, torch.full((50,), -1), scaling)
    assert not any(each.any() for each in (y, *torch.autograd.grad(y.sum(), (x, A, B))))


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(T=st.integers(1, 80), K=st.integers(1, 20), N=st.integers(1, 20), n=st.integers(1, 5), r=st.integers(1, 9))
def test_properties(T: int, K: int, N: int, n: int, r: int) -> None:
    x, A, B, index, scaling = made((T,), K, N, n, r, x=False, A=False, B=False)
    y = segment_lora(x, A, B, index, scaling)
    order = torch.randperm(T)
    torch.testing.assert_close(segment_lora(x[order], A, B, index[order], scaling), y[order])
    # linear in the scaling, which may be one number for all
    torch.testing.assert_close(segment_lora(x, A, B, index, 2 * scaling), 2 * y)
    torch.testing.assert_close(segment_lora(x, A, B * scaling[:, None, None], index, 1.0), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(segment_lora(x, A, B, index, torch.tensor(0.5)), segment_lora(x, A, B, index, 0.5))
    # ranks that are zero change nothing
    more = F.pad(A, (0, 0, 0, 3)), F.pad(B, (0, 3))
    torch.testing.assert_close(segment_lora(x, *more, index, scaling), y)
    # one adapter for all is the plain product
    torch.testing.assert_close(segment_lora(x, A[:1], B[:1], index * 0, 0.5), lora_product(x, A[0], 0.5 * B[0]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 3 * TOKENS), min_size=1, max_size=6))
def test_blocks_hold_every_token_once_and_no_two_adapters(counts: list[int]) -> None:
    *own, nobody = counts
    n = len(own)
    index = torch.tensor([-1] * nobody + [n, -2] + [i for i, count in enumerate(own) for _ in range(count)])
    index = index[torch.randperm(len(index))]
    order, bounds, blocks = _plan(index, n)
    seen = []
    for segment, first, end in blocks.tolist():
        tokens = order[first : min(first + TOKENS, end)]  # all that a program takes
        expected = {n: {-1}, n + 1: {-2, n}}.get(segment, {segment})
        assert set(index[tokens].tolist()) <= expected
        seen += tokens.tolist()
    assert sorted(seen) == list(range(len(index)))
    assert bounds.diff().tolist() == [*own, nobody, 2]
    assert len(blocks) <= len(index) // TOKENS + n + 2


def test_a_wrong_index_gives_nan_in_its_row_alone_where_nobody_can_look() -> None:
    x, A, B, index, scaling = made((40,), 6, 7, 3, 2)
    wrong = torch.zeros(40, dtype=torch.bool)
    wrong[[3, 11]] = True
    index[3], index[11] = 3, -2
    plan = _plan(index, 3)
    y, h = _forward(x.detach(), A.detach(), B.detach(), scaling, *plan)
    assert y[wrong].isnan().all()
    torch.testing.assert_close(y[~wrong], plain(x, A, B, index, scaling)[~wrong].detach())
    dy = torch.randn(40, 7)
    dx, dA, dB = _backward(dy, A.detach(), B.detach(), scaling, *plan, h, x.detach(), x.dtype, True, True)
    assert dx[wrong].isnan().all()
    gradients = torch.autograd.grad(plain(x, A, B, index, scaling), (x, A, B), dy)
    for mine, theirs in zip((dx[~wrong], dA, dB), (gradients[0][~wrong], *gradients[1:]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_plan_reads_no_value_so_that_nobody_waits_for_the_accelerator() -> None:
    order, bounds, blocks = _plan(torch.empty(5, 20, dtype=torch.int64, device="meta"), 3)  # there are none
    assert (order.shape, bounds.shape, blocks.shape) == ((100,), (6,), (100 // TOKENS + 5, 3))


def test_what_is_kept_for_backward() -> None:
    x, A, B, index, scaling = made((50,), 32, 7, 3, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        segment_lora(x, A, B, index, scaling)
        own = {t.data_ptr() for t in (A, B, scaling)}
        rest = [t for t in kept if t.data_ptr() not in own and t.is_floating_point()]
        assert [t.shape for t in rest] == [(50, 2), (50, 32)]
        assert rest[1].data_ptr() == x.data_ptr()
        kept.clear()
        segment_lora(x, A.detach(), B, index, scaling)
        assert x.data_ptr() not in {t.data_ptr() for t in kept}
        hidden = rms_norm(x, None, 1e-6)
        kept.clear()
        y = segment_lora(hidden, A, B, index, scaling)
    assert hidden.data_ptr() not in {t.data_ptr() for t in kept}
    expected = plain(F.rms_norm(x, (32,), eps=1e-6), A, B, index, scaling)
    for mine, theirs in zip(*(torch.autograd.grad(each.sum(), (x, A, B)) for each in (y, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_decides_on_the_precision() -> None:
    x, A, B, index, scaling = made((9,), 6, 7, 3, 2)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(DEVICE, dtype):
        y = segment_lora(x, A, B, index, scaling)
    assert y.dtype == dtype
    expected = plain(x.to(dtype), A.to(dtype), B.to(dtype), index, scaling)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)  # a few roundings of 8 bits
    for mine, theirs in zip(*(torch.autograd.grad(each.sum(), (x, A, B)) for each in (y, expected)), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_wrong_arguments_are_named() -> None:
    x, A, B, index, scaling = made((5,), 6, 7, 3, 2)
    with pytest.raises(ValueError, match=r"segment_lora: x must be .* got \(5, 5\), \(3, 2, 6\) and \(3, 7, 2\)"):
        segment_lora(x[:, 1:], A, B, index, scaling)
    with pytest.raises(ValueError, match=r"got \(5, 6\), \(3, 2, 6\) and \(3, 7, 1\)"):
        segment_lora(x, A, B[..., 1:], index, scaling)
    with pytest.raises(ValueError, match=r"got \(5, 6\), \(3, 2, 6\) and \(2, 7, 2\)"):
        segment_lora(x, A, B[1:], index, scaling)
    with pytest.raises(ValueError, match=r"got \(5, 6\), \(2, 6\) and \(7, 2\)"):
        segment_lora(x, A[0], B[0], index, scaling)
    with pytest.raises(ValueError, match=r"one floating dtype.* got torch.float16, torch.float32 and torch.float32"):
        segment_lora(x, A.half(), B, index, scaling)
    with pytest.raises(ValueError, match=r"index must be \(5,\) int64, .* got \(4,\) torch.int64"):
        segment_lora(x, A, B, index[1:], scaling)
    with pytest.raises(ValueError, match=r"index must be \(5,\) int64, .* got \(5,\) torch.int32"):
        segment_lora(x, A, B, index.int(), scaling)
    with pytest.raises(ValueError, match=r"scaling must be a number or \(3,\), got \(2,\)"):
        segment_lora(x, A, B, index, scaling[1:])
    with pytest.raises(ValueError, match=r"scaling gets no gradient, but requires one. Pass scaling.detach\(\)"):
        segment_lora(x, A, B, index, scaling.requires_grad_())
    for low, high in ((-2, 2), (-1, 3)) if DEVICE == "cpu" else ():  # a GPU is not waited for
        with pytest.raises(ValueError, match=rf"index must be from 0 to 2 for 3 adapters, .* got {low} to {high}"):
            segment_lora(x, A, B, torch.tensor([0, low, 1, high, 2]), 1.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    x, A, B, index, scaling = made((5,), 6, 7, 3, 2)
    plan = _plan(index, 3)
    torch.library.opcheck(_forward, (x, A, B, scaling, *plan))
    torch.library.opcheck(_forward, (torch.randn(6, 5).half().T, A, B.detach(), scaling, *plan))
    torch.library.opcheck(_forward, (x.detach(), A.detach(), torch.randn(3, 2, 7).mT, scaling, *plan))
    exact = [each.detach().double().requires_grad_() for each in (x, A, B)]
    assert torch.autograd.gradcheck(lambda x, A, B: segment_lora(x, A, B, index, scaling.double()), exact)


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(segment_lora, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for T in (40, 3) if dynamic else (40,):
        x, A, B, index, scaling = made((T,), 6, 7, 3, 2)
        for factor in (scaling, 0.5):
            mine, theirs = (f(x, A, B, index, factor) for f in (compiled, segment_lora))
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(*(torch.autograd.grad(y.pow(3).sum(), (x, A, B)) for y in (mine, theirs)))
