"""Linear layers with trained entries, columns or rows, against a dense change of the weight."""

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import linear_with_columns, linear_with_entries, linear_with_rows
from lightning_peft.kernels.sparse_grad import _columns, _entries, _entries_backward, _rows
from tests.kernels.counted import Count
from tests.kernels.rule import DEVICE, INTERPRETED, check, every_dtype, upstreams

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]


def dense(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Linear:
    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
        return F.linear(x, weight + change(torch.zeros_like(weight), index, values.to(weight.dtype)), bias)

    return plain


FORMS: dict[str, tuple[Linear, Linear]] = {
    "entries": (
        linear_with_entries,
        dense(lambda zero, index, values: zero.flatten().index_add(0, index, values).view_as(zero)),
    ),
    "columns": (linear_with_columns, dense(lambda zero, index, values: zero.index_add(1, index, values))),
    "rows": (linear_with_rows, dense(lambda zero, index, values: zero.index_add(0, index, values))),
}
every_form = pytest.mark.parametrize("form", FORMS)


def inputs(
    form: str, T: tuple[int, ...], N: int, K: int, dtype: torch.dtype = torch.float32, share: float = 0.3
) -> list[Tensor]:
    """x, weight, bias, values and index, with this share of all entries, columns or rows; all but the weight train."""
    size = {"entries": N * K, "columns": K, "rows": N}[form]
    index = torch.randperm(size)[: max(1, int(share * size))]
    index = index.sort().values if form == "entries" else index
    n = len(index)
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((*T, K), (N, K), (N,)))
    values = torch.randn({"entries": (n,), "columns": (N, n), "rows": (n, K)}[form], dtype=dtype)
    return [x.requires_grad_(), weight, bias.requires_grad_(), values.requires_grad_(), index]


# more than one tile of the kernel in each direction, and ragged
SIZES = [((1,), 1, 1), ((2, 3), 17, 63), ((40,), 70, 127), ((63,), 129, 257)]


@every_dtype
@every_form
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients(sizes: tuple[tuple[int, ...], int, int], form: str, dtype: torch.dtype) -> None:
    T, N, K = sizes
    for upstream in upstreams((*T, N))[: 1 if T != (2, 3) else 4]:
        check(*FORMS[form], inputs(form, T, N, K, dtype), upstream)


@every_form
@pytest.mark.parametrize("frozen", [("x",), ("values",), ("bias",), ("x", "bias"), ("x", "values")])
def test_parts_may_be_frozen_or_missing(frozen: tuple[str, ...], form: str) -> None:
    x, weight, bias, values, index = inputs(form, (5,), 7, 9)
    for name, each in (("x", x), ("bias", bias), ("values", values)):
        each.requires_grad_(name not in frozen)
    check(*FORMS[form], (x, weight, bias, values, index), torch.randn(5, 7))
    if frozen != ("x", "values"):
        check(*FORMS[form], (x, weight, None, values, index), torch.randn(5, 7))


@every_form
def test_values_in_float32_beside_a_half_precision_layer(form: str) -> None:
    x, weight, bias, values, index = inputs(form, (6,), 20, 30, torch.float16)
    values = torch.randn(values.shape, requires_grad=True)
    check(*FORMS[form], (x, weight, bias, values, index), torch.randn(6, 20))


@every_form
@pytest.mark.parametrize("share", [0.001, 1.0])
def test_few_places_and_all(share: float, form: str) -> None:
    check(*FORMS[form], inputs(form, (5,), 66, 130, share=share), torch.randn(5, 66))


@pytest.mark.parametrize("form", ["columns", "rows"])
def test_a_place_that_occurs_twice_gets_both_changes(form: str) -> None:
    x, weight, bias, values, index = inputs(form, (5,), 8, 8, share=0.5)
    check(*FORMS[form], (x, weight, bias, values, index.clamp(max=2)), torch.randn(5, 8))


GRAD = sys.modules["lightning_peft.kernels.sparse_grad"]


def test_entries_each_by_itself_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAD, "ELEMENTS", 30)
    monkeypatch.setattr(GRAD, "FEW", 0)
    check(*FORMS["entries"], inputs("entries", (7,), 9, 11), torch.randn(7, 9))


@pytest.mark.skipif(INTERPRETED, reason="of the twin")
@pytest.mark.parametrize("waits", [True, False], ids=["asked", "not asked how many"])
@pytest.mark.parametrize("few", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 44, 1000])
def test_entries_in_pieces_of_the_weight(
    size: int, dtype: torch.dtype, few: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PIECE", size), ("FEW", few), ("_can_ask", lambda places: waits)):
        monkeypatch.setattr(GRAD, name, value)
    for share in (0.01, 0.3):
        check(*FORMS["entries"], inputs("entries", (7,), 19, 11, dtype, share), torch.randn(7, 19))
    x, weight, bias, values, index = inputs("entries", (7,), 19, 11, dtype)
    x.requires_grad_(False)
    check(*FORMS["entries"], (x, weight, bias, values, index), torch.randn(7, 19))
    check(*FORMS["entries"], (x.requires_grad_(), weight, bias, values.detach(), index), torch.randn(7, 19))


def test_the_gradient_of_x_is_not_rounded_for_each_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAD, "PIECE", 1)
    given = inputs("entries", (7,), 300, 11, torch.float16 if INTERPRETED else torch.bfloat16, share=0.001)
    check(*FORMS["entries"], given, torch.randn(7, 300))


def test_places_in_another_form() -> None:
    ours, plain = FORMS["entries"]
    x, weight, bias, values, index = inputs("entries", (7,), 19, 11)
    short = index.int()
    other = torch.where(torch.arange(len(index)) % 3 == 0, -1 - short, short)
    dy = torch.randn(7, 19)

    def told(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
        return plain(x, weight, bias, values, torch.where(index < 0, -1 - index, index))

    for form in (short, other, other.long()):
        check(ours, told, (x, weight, bias, values, form), dy)


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="of the twin")
@pytest.mark.parametrize("n", [820, 4060])
def test_entries_keep_nothing_dense_and_one_piece_lives_at_a_time(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAD, "PIECE", 16)
    weights = [torch.randn(90, 90) for _ in range(3)]
    index = torch.randperm(8100)[:n].sort().values.int()
    values = [torch.randn(n, requires_grad=True) for _ in weights]
    small, piece = 7 * 90 * 4, n // 90 * 90 * 4
    x = torch.randn(7, 90)
    with Count() as forward:
        for weight, each in zip(weights, values, strict=True):
            x = linear_with_entries(x, weight, None, each, index)
    assert forward.most[8100 * 4] == 1
    assert sorted(forward.live.values()) == [small] * 3
    with Count() as backward:
        x.sum().backward()
    assert backward.most[piece] == 1
    assert max(backward.most) < 8100 * 4
    in_piece = 2 * piece * n // 8100
    assert backward.peak <= 3 * 4 * n + 4 * n + piece + 6 * in_piece + 4 * small
    assert sorted(backward.live.values()) == [4 * n] * 3


@every_form
def test_autocast_keeps_no_weight_in_its_precision(form: str) -> None:
    x, weight, bias, values, index = inputs(form, (5,), 6, 8)
    kept: list[Tensor] = []
    with (
        torch.autocast(DEVICE, torch.float16 if INTERPRETED else torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        FORMS[form][0](x, weight, bias, values, index)
    assert [t.data_ptr() for t in kept if t.shape == weight.shape] == [weight.data_ptr()]


@every_form
def test_inputs_with_gaps_and_empty_ones(form: str) -> None:
    x, weight, bias, values, index = inputs(form, (5,), 6, 8)
    x = torch.randn(5, 16)[:, ::2].requires_grad_()
    check(*FORMS[form], (x, weight.T.contiguous().T, bias, values, index), torch.randn(6, 5).T)
    ours = FORMS[form][0]
    empty = torch.randn(0, 8).requires_grad_()
    for gradient in torch.autograd.grad(ours(empty, weight, bias, values, index).sum(), (empty, bias, values)):
        assert not gradient.any()
    none = {"entries": (0,), "columns": (6, 0), "rows": (0, 8)}[form]
    y = ours(x, weight, bias, torch.randn(none), index[:0])
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(T=st.integers(1, 9), N=st.integers(1, 30), K=st.integers(1, 30), form=st.sampled_from(sorted(FORMS)))
def test_properties(T: int, N: int, K: int, form: str) -> None:
    ours = FORMS[form][0]
    x, weight, bias, values, index = inputs(form, (T,), N, K)
    torch.testing.assert_close(ours(x, weight, bias, 0 * values, index), F.linear(x, weight, bias))
    # linear in the values, whose gradient is that of the dense change, picked
    y, dy = ours(x, weight, bias, values, index), torch.randn(T, N)
    torch.testing.assert_close(
        ours(x, weight, bias, 2 * values, index) - y, y - F.linear(x, weight, bias), rtol=1e-4, atol=1e-4
    )
    full = dy.T @ x
    picked = {"entries": full.flatten(), "columns": full.T, "rows": full}[form][index]
    dvalues = torch.autograd.grad(y, values, dy)[0]
    torch.testing.assert_close(dvalues, picked.T if form == "columns" else picked, rtol=1e-4, atol=1e-4)


@every_form
def test_what_is_kept_for_backward(form: str) -> None:
    x, weight, bias, values, index = inputs(form, (50,), 6, 8, share=0.25)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FORMS[form][0](x, weight, bias, values, index)
        own = {t.data_ptr() for t in (weight, values, index)}
        rest = [t for t in kept if t.data_ptr() not in own]
        if form == "columns":
            assert [t.shape for t in rest] == [(50, 2)]
        else:
            assert [t.data_ptr() for t in rest] == [x.data_ptr()]
        kept.clear()
        FORMS[form][0](x, weight, bias, values.detach(), index)
    assert all(t.data_ptr() in own for t in kept)


@every_form
def test_autocast_decides_on_the_precision(form: str) -> None:
    x, weight, bias, values, index = inputs(form, (5,), 6, 8)
    with torch.autocast(DEVICE, torch.float16 if INTERPRETED else torch.bfloat16):
        y = FORMS[form][0](x, weight, bias, values, index)
    assert y.dtype == (torch.float16 if INTERPRETED else torch.bfloat16)
    torch.testing.assert_close(y.float(), FORMS[form][1](x, weight, bias, values, index), rtol=0.1, atol=0.1)
    gradients = torch.autograd.grad(y.float().sum(), (x, bias, values))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@every_form
def test_wrong_arguments_are_named(form: str) -> None:
    ours = FORMS[form][0]
    x, weight, bias, values, index = inputs(form, (5,), 6, 8)
    with pytest.raises(ValueError, match=rf"linear_with_{form}: x must be .* got \(5, 7\), \(6, 8\) and \(6,\)"):
        ours(x[:, 1:], weight, bias, values, index)
    with pytest.raises(ValueError, match=r"got \(5, 8\), \(6, 8\) and \(5,\)"):
        ours(x, weight, bias[1:], values, index)
    with pytest.raises(ValueError, match=r"index must be \(n,\) .*int64, got .* torch.int16"):
        ours(x, weight, bias, values, index.short())
    with pytest.raises(ValueError, match=r"values must be .* for weight \(6, 8\)"):
        ours(x, weight, bias, values[1:], index)
    with pytest.raises(ValueError, match="weight gets no gradient"):
        ours(x, weight.clone().requires_grad_(), bias, values, index)
    with pytest.raises(ValueError, match="weight must have the dtype of x"):
        ours(x, weight.double(), bias, values, index)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is not waited for")
def test_entries_must_ascend_within_the_weight() -> None:
    x, weight, bias, values, index = inputs("entries", (5,), 6, 8)
    for wrong in (index.flip(0), index.clamp(max=int(index[3])), index - 48, index + 48):
        with pytest.raises(ValueError, match="index must ascend strictly from 0 at least to 47 at most"):
            linear_with_entries(x, weight, bias, values, wrong)


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
def test_entries_out_of_order_have_the_gradient_nan() -> None:
    x, _, _, values, index = inputs("entries", (5,), 70, 80)
    order = torch.randperm(len(index))
    wrong = _entries_backward(torch.randn(5, 70), x.detach(), torch.randn(70, 80), values, index[order], False)[1]
    assert wrong.isnan().any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
@every_form
def test_the_operations_are_well_behaved(form: str) -> None:
    op = {"entries": _entries, "columns": _columns, "rows": _rows}[form]
    x, weight, bias, values, index = inputs(form, (5,), 6, 8)
    torch.library.opcheck(op, (x, weight, bias, values, index))
    torch.library.opcheck(op, (x, weight.T.contiguous().T, None, values.detach(), index))
    torch.library.opcheck(op, (torch.randn(8, 5).T, weight, None, values, index))
    trained = [each.detach().double().requires_grad_() for each in (x, bias, values)]
    assert torch.autograd.gradcheck(lambda x, b, v: FORMS[form][0](x, weight.double(), b, v, index), trained)


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
@every_form
def test_they_compile_whole(form: str) -> None:
    ours, given = FORMS[form][0], inputs(form, (5,), 6, 8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), ours(*given))
    wanted = [given[0], given[2], given[3]]
    grads = [torch.autograd.grad(f(*given).pow(3).sum(), wanted) for f in (compiled, ours)]
    torch.testing.assert_close(*grads)
