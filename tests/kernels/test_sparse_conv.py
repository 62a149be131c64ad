"""Convolutions with trained entries, against a dense change of the weight."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import conv_with_entries
from lightning_peft.kernels.sparse_conv import _conv
from tests.kernels.counted import Count
from tests.kernels.rule import DEVICE, INTERPRETED, check, every_dtype

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="it has no kernel of its own"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths"),  # of the reference
]

GRAD = sys.modules["lightning_peft.kernels.sparse_grad"]
CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# shape of x, of the weight, and how
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 5, 9, 8), (7, 5, 3, 2), {}),
    "1d, strided, padded": ((3, 4, 11), (6, 4, 3), {"stride": 2, "padding": 1}),
    "3d": ((2, 3, 5, 4, 6), (5, 3, 2, 1, 3), {"padding": (1, 0, 2)}),
    "strides and dilations that differ": (
        (2, 3, 11, 13),
        (4, 3, 3, 2),
        {"stride": (2, 3), "dilation": (1, 2), "padding": (2, 1)},
    ),
    "groups": ((2, 6, 7, 7), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((2, 5, 7, 6), (10, 1, 3, 3), {"groups": 5}),
    "same": ((2, 3, 8, 7), (4, 3, 3, 5), {"padding": "same", "dilation": (2, 1)}),
    "same, one side more": ((2, 3, 8, 7), (4, 3, 2, 4), {"padding": "same"}),
    "valid": ((2, 3, 8, 7), (4, 3, 2, 4), {"padding": "valid"}),
    "no batch": ((3, 8, 7), (4, 3, 3, 3), {"padding": 1}),
    "a batch of none": ((0, 3, 8, 7), (4, 3, 3, 3), {"padding": 1}),
    "pixels by themselves": ((2, 9, 3, 3), (8, 9, 1, 1), {}),
}
every_case = pytest.mark.parametrize("case", CASES)


def inputs(case: str, dtype: torch.dtype = torch.float32, share: float = 0.3) -> list[Any]:
    """x, weight, bias, values and index, with this share of all entries; all but the weight train."""
    x_shape, shape, _ = CASES[case]
    x, weight, bias = torch.randn(x_shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(shape[0])
    index = torch.randperm(weight.numel())[: max(1, int(share * weight.numel()))].sort().values
    values = torch.randn(len(index), dtype=dtype).requires_grad_()
    return [x.requires_grad_(), weight, bias.to(dtype).requires_grad_(), values, index]


def ours(case: str) -> Callable[..., Tensor]:
    return partial(conv_with_entries, **CASES[case][2])


def plain(case: str) -> Callable[..., Tensor]:
    def dense(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
        index = torch.where(index < 0, -1 - index, index).long()
        change = torch.zeros_like(weight).flatten().index_add(0, index, values.to(weight.dtype)).view_as(weight)
        return CONVS[weight.dim() - 2](x, weight + change, bias, **CASES[case][2])

    return dense


def upstream(case: str) -> Tensor:
    return torch.randn(plain(case)(*inputs(case)).shape)


@every_dtype
@every_case
def test_output_and_gradients(case: str, dtype: torch.dtype) -> None:
    check(ours(case), plain(case), inputs(case, dtype), upstream(case))


@every_case
def test_gradients_are_those_of_differences(case: str) -> None:
    x, weight, bias, values, index = inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda x, b, v: ours(case)(x, weight, b, v, index), (x, bias, values))


@pytest.mark.parametrize("waits", [True, False], ids=["asked", "not asked how many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 41])
@every_case
def test_in_pieces(case: str, size: int, dtype: torch.dtype, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAD, "PIECE", size)
    monkeypatch.setattr(GRAD, "_can_ask", lambda places: waits)
    check(ours(case), plain(case), inputs(case, dtype, share=0.1), upstream(case))


def test_the_gradient_of_x_is_not_rounded_for_each_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "wide", ((1, 4, 6, 6), (300, 4, 3, 3), {"padding": 1}))
    monkeypatch.setattr(GRAD, "PIECE", 1)
    check(ours("wide"), plain("wide"), inputs("wide", torch.bfloat16, share=0.001), upstream("wide"))


def test_pieces_are_parts_of_groups_or_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(12, 2, 5)  # ten entries in a channel
    monkeypatch.setattr(GRAD, "PIECE", 0)
    parts = lambda n, groups: GRAD.pieces(weight, torch.arange(n), groups)  # noqa: E731
    assert parts(1, 1) == [(i, i + 1) for i in range(12)]
    assert parts(50, 1) == [(0, 5), (5, 10), (10, 12)]
    assert parts(50, 3) == [(0, 4), (4, 8), (8, 12)]
    assert parts(30, 3) == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)]
    assert parts(70, 6) == [(0, 6), (6, 12)]
    assert parts(120, 3) == [(0, 12)]
    monkeypatch.setattr(GRAD, "PIECE", 90)
    assert parts(1, 1) == [(0, 9), (9, 12)]


@pytest.mark.parametrize("frozen", [("x",), ("values",), ("bias",), ("x", "bias"), ("x", "values")])
@pytest.mark.parametrize("case", ["plain", "groups"])
def test_parts_may_be_frozen_or_missing(case: str, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAD, "PIECE", 40)
    x, weight, bias, values, index = inputs(case)
    for name, each in (("x", x), ("bias", bias), ("values", values)):
        each.requires_grad_(name not in frozen)
    check(ours(case), plain(case), (x, weight, bias, values, index), upstream(case))
    if frozen != ("x", "values"):
        check(ours(case), plain(case), (x, weight, None, values, index), upstream(case))


def test_values_in_float32_beside_a_half_precision_layer() -> None:
    x, weight, bias, values, index = inputs("plain", torch.float16)
    values = torch.randn(values.shape, requires_grad=True)
    check(ours("plain"), plain("plain"), (x, weight, bias, values, index), upstream("plain"))


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_few_places_and_all(share: float) -> None:
    check(ours("plain"), plain("plain"), inputs("plain", share=share), upstream("plain"))


def test_none_at_all() -> None:
    x, weight, bias, values, index = inputs("groups")
    y = ours("groups")(x, weight, bias, values[:0], index[:0])
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, **CASES["groups"][2]))


def test_places_in_another_form() -> None:
    x, weight, bias, values, index = inputs("plain")
    short = index.int()
    other = torch.where(torch.arange(len(index)) % 3 == 0, -1 - short, short)
    assert (other < 0).any()
    check(ours("plain"), plain("plain"), (x, weight, bias, values, short), upstream("plain"))
    check(ours("plain"), plain("plain"), (x, weight, bias, values, other), upstream("plain"))


def test_other_layouts() -> None:
    x, weight, bias, values, index = inputs("plain")
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    dy = upstream("plain")
    check(ours("plain"), plain("plain"), (last, weight, bias, values, index), dy)
    y = ours("plain")(last, weight, bias, values, index)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y, last, dy)[0].is_contiguous(memory_format=torch.channels_last)
    weights = weight.to(memory_format=torch.channels_last)
    check(ours("plain"), plain("plain"), (last, weights, bias, values, index), dy)
    gaps = torch.randn(2, 10, 9, 16)[:, ::2, :, ::2].requires_grad_()
    turned = torch.randn(dy.shape[::-1]).permute(3, 2, 1, 0)
    check(ours("plain"), plain("plain"), (gaps, weight.flip(0), bias, values, index), turned)


def test_what_is_kept_for_backward() -> None:
    x, weight, bias, values, index = inputs("plain")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours("plain")(x, weight, bias, values, index)
        own = {t.data_ptr() for t in (weight, values, index)}
        assert [t.data_ptr() for t in kept if t.data_ptr() not in own] == [x.data_ptr()]
        kept.clear()
        ours("plain")(x, weight, bias, values.detach(), index)
    assert all(t.data_ptr() in own for t in kept)


def test_autocast_keeps_no_weight_in_its_precision() -> None:
    x, weight, bias, values, index = inputs("plain")
    kept: list[Tensor] = []
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = ours("plain")(x, weight, bias, values, index)
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in kept if t.shape == weight.shape] == [torch.float32]
    change = torch.zeros_like(weight).flatten().index_add(0, index, values).view_as(weight).detach()
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = F.conv2d(x, weight + change, bias)
    assert torch.equal(y, expected)  # the sum of both is rounded once
    gradients = torch.autograd.grad(y.float().sum(), (x, bias, values))
    truth = torch.autograd.grad(plain("plain")(x, weight, bias, values, index).sum(), (x, bias, values))
    for gradient, true in zip(gradients, truth, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - true).norm() < 0.01 * true.norm()  # of bfloat16, which has a step of 2^-8


# of each weight; no two of the sizes below are the same
@pytest.mark.skipif(DEVICE != "cpu", reason="of the twin")
@pytest.mark.parametrize("n", [820, 4060])
def test_nothing_dense_lives_between_the_passes_and_one_piece_behind_them(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GRAD, "PIECE", 16)
    weights = [torch.randn(30, 30, 3, 3) for _ in range(3)]
    index = torch.randperm(8100)[:n].sort().values.int()
    values = [torch.randn(n, requires_grad=True) for _ in weights]
    small = 30 * 5 * 5 * 4  # bytes of x, or of an output
    piece = n // 270 * 270 * 4  # of whole channels
    x = torch.randn(1, 30, 5, 5)
    with Count() as forward:
        for weight, each in zip(weights, values, strict=True):
            x = conv_with_entries(x, weight, None, each, index, padding=1)
    assert forward.most[8100 * 4] == 1
    assert sorted(forward.live.values()) == [small] * 3
    with Count() as backward:
        x.sum().backward()
    assert backward.most[piece] == 1
    assert max(backward.most) < 8100 * 4
    # gradients; of one layer the places, a piece, and what belongs to the entries in it; some gradients of x
    in_piece = 2 * piece * n // 8100
    assert backward.peak <= 3 * 4 * n + 4 * n + piece + 6 * in_piece + 3 * small
    assert sorted(backward.live.values()) == [4 * n] * 3


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, values, index = inputs("groups")
    given = partial(conv_with_entries, groups=3)
    with pytest.raises(ValueError, match=r"conv_with_entries: x must be .* got \(2, 5, 7, 7\), \(9, 2, 3, 3\) and gr"):
        given(x[:, 1:], weight, bias, values, index)
    with pytest.raises(ValueError, match=r"groups=2\."):
        conv_with_entries(x[:, :4], weight, bias, values, index, groups=2)
    with pytest.raises(ValueError, match=r"x must be .* got \(2, 6, 7\)"):
        given(x[..., 0].reshape(1, 2, 6, 7)[0], weight[..., 0, 0][..., None, None, None, None], bias, values, index)
    with pytest.raises(ValueError, match=r"bias must be \(9,\) or None, got \(8,\)"):
        given(x, weight, bias[1:], values, index)
    with pytest.raises(ValueError, match=r"index must be \(n,\) int32 or int64, got .* torch.float32"):
        given(x, weight, bias, values, index.float())
    with pytest.raises(ValueError, match=r"values must be .* for weight \(9, 2, 3, 3\)"):
        given(x, weight, bias, values[1:], index)
    with pytest.raises(ValueError, match="weight gets no gradient"):
        given(x, weight.clone().requires_grad_(), bias, values, index)
    with pytest.raises(ValueError, match="weight must have the dtype of x"):
        given(x, weight.double(), bias, values, index)
    with pytest.raises(ValueError, match="padding must be numbers, 'same' or 'valid', got 'full'"):
        given(x, weight, bias, values, index, padding="full")
    if DEVICE != "cpu":
        return  # a GPU is not waited for
    for wrong in (index.flip(0), index.clamp(max=int(index[3])), index + 162):
        with pytest.raises(ValueError, match="conv_with_entries: index must ascend strictly from 0 .* to 161 at most"):
            given(x, weight, bias, values, wrong)


def test_a_place_that_nobody_finds_has_the_gradient_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, values, index = inputs("plain")
    monkeypatch.setattr(GRAD, "_can_ask", lambda places: False)
    back = sys.modules["lightning_peft.kernels.sparse_conv"]._conv_backward
    wrong = torch.cat([index[:-1], torch.tensor([weight.numel() + 5])])
    how = [1, 1], [0, 0], [1, 1], 1
    dvalues = back(torch.randn(2, 7, 7, 7), x.detach(), weight, values.detach(), wrong, x.shape, *how, False)[1]
    assert dvalues.isnan().tolist() == [False] * (len(index) - 1) + [True]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@every_case
def test_the_operation_is_well_behaved(case: str) -> None:
    x, weight, bias, values, index = inputs(case)
    spatial, how = weight.dim() - 2, CASES[case][2]
    if isinstance(how.get("padding"), str) or x.dim() == spatial + 1:
        return
    numbers = [how.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    rest = [[n] * spatial if isinstance(n, int) else list(n) for n in numbers]
    torch.library.opcheck(_conv, (x, weight, bias, values, index, *rest, how.get("groups", 1)))
    torch.library.opcheck(_conv, (x, weight, None, values.detach(), index.int(), *rest, how.get("groups", 1)))
    if spatial == 2:
        last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        torch.library.opcheck(_conv, (last, weight, bias, values, index, *rest, how.get("groups", 1)))


@pytest.mark.parametrize("case", ["plain", "groups", "same, one side more"])
def test_it_compiles_whole(case: str) -> None:
    given = inputs(case)
    compiled = torch.compile(ours(case), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), ours(case)(*given))
    wanted = [given[0], given[2], given[3]]
    grads = [torch.autograd.grad(f(*given).pow(3).sum(), wanted) for f in (compiled, ours(case))]
    torch.testing.assert_close(*grads)
