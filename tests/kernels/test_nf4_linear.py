"""nf4_linear against the product with the weight that its codes stand for; as its kernel where interpreted."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import nf4_linear, nf4_pack, nf4_unpack
from lightning_peft.kernels.nf4 import GROUP, Packed
from lightning_peft.kernels.nf4_linear import _product, nf4_product
from tests.kernels.rule import DEVICE, DTYPES, INTERPRETED, check, every_dtype, upstreams

# the table that the authors' library ships
TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def weight_of(packed: Packed, shape: tuple[int, int]) -> Tensor:
    """What is packed, by the definition, in float64."""
    codes, absmax, scale = packed
    levels = torch.tensor(TABLE, dtype=torch.float64)[torch.stack([codes >> 4, codes & 15], 1).flatten().int()]
    absmax = absmax.double()
    if scale is not None:
        absmax = absmax / 255 * torch.cat([s.expand(GROUP) for s in scale])[: len(absmax)]
    values = levels * absmax.repeat_interleave(packed.block_size)
    return values[: shape[0] * shape[1]].view(shape)


def functions(packed: Packed, shape: tuple[int, int]) -> list[Callable[[Tensor, Tensor | None], Tensor]]:
    """Ours, and the product in plain PyTorch."""
    weight = weight_of(packed, shape)
    return [
        lambda x, bias: nf4_linear(x, packed, shape, bias),
        lambda x, bias: F.linear(x, weight.to(x.dtype), bias),
    ]


def inputs(T: tuple[int, ...], N: int, K: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*T, K, dtype=dtype, requires_grad=True), torch.randn(N, dtype=dtype, requires_grad=True)]


# rows, output and input features: for the kernel more than one tile, and ragged, where their number is not odd
SIZES = [((1,), 1, 1), ((2, 3), 67, 128), ((33,), 65, 192), ((63,), 17, 64), ((64,), 65, 64), ((70,), 33, 63)]


@every_dtype
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients(sizes: tuple[tuple[int, ...], int, int], double_quant: bool, dtype: torch.dtype) -> None:
    T, N, K = sizes
    packed = nf4_pack(torch.randn(N, K), 64, double_quant)
    check(*functions(packed, (N, K)), inputs(T, N, K, dtype), torch.randn(*T, N))


def test_gradients_of_the_output_in_any_form() -> None:
    packed = nf4_pack(torch.randn(17, 64))
    for upstream in upstreams((2, 3, 17)):
        check(*functions(packed, (17, 64)), inputs((2, 3), 17, 64), upstream)


@pytest.mark.parametrize(
    ("block_size", "K"), [(32, 96), (128, 64), (96, 192), (16, 64), (2, 10), (64, 96), (8192, 128)]
)
def test_blocks_of_any_size(block_size: int, K: int) -> None:
    packed = nf4_pack(torch.randn(70, K), block_size)
    for dtype in DTYPES:
        check(*functions(packed, (70, K)), inputs((5,), 70, K, dtype), torch.randn(5, 70))


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
@pytest.mark.parametrize("programs", [1, 4, 6])
def test_parts_of_the_input_are_added_up(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_peft.kernels.nf4_linear"], "PROGRAMS", programs)
    packed = nf4_pack(torch.randn(70, 320))
    check(*functions(packed, (70, 320)), inputs((5,), 70, 320, torch.float16), torch.randn(5, 70))


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
def test_few_rows_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, launched = sys.modules["lightning_peft.kernels.nf4_linear"], []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda *args: launched.append(1) or launch(*args))

    def launches(T: int, K: int, block_size: int = 64, dtype: torch.dtype = torch.float32) -> int:
        launched.clear()
        packed = nf4_pack(torch.randn(5, K), block_size)
        y = nf4_linear(torch.randn(T, K, dtype=dtype, requires_grad=True), packed, (5, K))
        y.sum().backward()
        return len(launched)

    assert launches(63, 64) == launches(1, 128) == launches(2, 96, 32) == launches(2, 64, dtype=torch.float16) == 1
    assert launches(64, 64) == launches(0, 64) == launches(2, 48) == launches(2, 64, 16) == 0
    assert launches(2, 64, dtype=torch.float64) == 0


@pytest.mark.parametrize("frozen", [("x",), ("bias",)])
def test_parts_may_be_frozen_or_missing(frozen: tuple[str, ...]) -> None:
    packed, (x, bias) = nf4_pack(torch.randn(7, 64)), inputs((5,), 7, 64)
    x.requires_grad_("x" not in frozen), bias.requires_grad_("bias" not in frozen)
    check(*functions(packed, (7, 64)), (x, bias), torch.randn(5, 7))
    if "x" not in frozen:
        check(*functions(packed, (7, 64)), (x, None), torch.randn(5, 7))


def test_a_weight_may_stand_the_other_way_round() -> None:
    packed, (x, bias) = nf4_pack(torch.randn(64, 128)), inputs((5,), 128, 64)
    weight = weight_of(packed, (64, 128))
    check(
        lambda x, bias: nf4_product(x, packed, (64, 128), bias, transposed=True),
        lambda x, bias: torch.addmm(bias, x, weight.to(x.dtype)),
        (x, bias),
        torch.randn(5, 128),
    )


def test_inputs_with_gaps_and_empty_ones() -> None:
    packed = nf4_pack(torch.randn(6, 64))
    gaps = Packed(*(torch.stack([part, part], 1)[:, 0] for part in packed))
    x, bias = torch.randn(64, 5).T.requires_grad_(), torch.randn(12)[::2].requires_grad_()
    check(functions(gaps, (6, 64))[0], functions(packed, (6, 64))[1], (x, bias), torch.randn(6, 5).T)
    none = torch.randn(0, 64, requires_grad=True)
    y = nf4_linear(none, packed, (6, 64), bias)
    assert y.shape == (0, 6)
    assert not torch.autograd.grad(y.sum(), bias)[0].any()
    for N, K in ((0, 5), (5, 0)):
        b = torch.randn(N)
        assert torch.equal(nf4_linear(torch.randn(3, K), nf4_pack(torch.randn(N, K)), (N, K), b), b.expand(3, N))


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(T=st.integers(1, 70), N=st.integers(1, 70), K=st.sampled_from([1, 30, 32, 64, 96]), double=st.booleans())
def test_properties(T: int, N: int, K: int, double: bool) -> None:
    packed, x = nf4_pack(torch.randn(N, K), 32, double), torch.randn(T, K)
    y = nf4_linear(x, packed, (N, K))
    assert torch.equal(nf4_linear(-2 * x, packed, (N, K)), -2 * y), "a power of two rounds nothing"
    parts = torch.cat([nf4_linear(rows, packed, (N, K)) for rows in x.split(29)])
    torch.testing.assert_close(parts, y, rtol=1e-5, atol=1e-4)  # K numbers near 1 are added in another order
    assert torch.equal(nf4_linear(torch.eye(K), packed, (N, K)).T, nf4_unpack(packed, (N, K)))


def test_codes_are_kept_for_backward_and_nothing_else() -> None:
    packed, (x, bias) = nf4_pack(torch.randn(70, 64)), inputs((5,), 70, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4_linear(x, packed, (70, 64), bias)
    assert {t.data_ptr() for t in kept} == {part.data_ptr() for part in packed}


@pytest.mark.skipif(INTERPRETED, reason="the product in float64 is the twin's")
def test_gradients_and_their_gradients() -> None:
    # of a function of the output, which is linear in x itself
    packed, (x, bias) = nf4_pack(torch.randn(3, 5)), inputs((2,), 3, 5, torch.float64)
    cubed = lambda x, bias: nf4_linear(x, packed, (3, 5), bias).pow(3)  # noqa: E731
    assert torch.autograd.gradcheck(cubed, (x, bias))
    assert torch.autograd.gradgradcheck(cubed, (x, bias))


def test_autocast_decides_on_the_precision() -> None:
    packed, (x, bias) = nf4_pack(torch.randn(6, 64)), inputs((5,), 6, 64)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(DEVICE, dtype):
        y = nf4_linear(x, packed, (6, 64), bias)
        assert nf4_linear(x.double(), packed, (6, 64), bias.double()).dtype == torch.float64
    assert torch.equal(y, nf4_linear(x.to(dtype), packed, (6, 64), bias.to(dtype)))
    gradients = torch.autograd.grad(y.float().sum(), (x, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_wrong_arguments_are_named() -> None:
    packed, (x, bias) = nf4_pack(torch.randn(6, 8), 16, double_quant=False), inputs((5,), 6, 8)
    for wrong in ((x[:, 1:], packed, (6, 8), bias), (x, packed, (8, 6), bias), (x, packed, (48,), bias)):
        with pytest.raises(ValueError, match=r"nf4_linear: x must be \(\.\.\., K\), shape \(N, K\) and bias"):
            nf4_linear(*wrong)
    with pytest.raises(ValueError, match=r"got \(5, 8\), \(6, 8\) and \(5,\)"):
        nf4_linear(x, packed, (6, 8), bias[1:])
    with pytest.raises(ValueError, match="nf4_linear: shape .* has 72 weights, and packed are 3 blocks of 16"):
        nf4_linear(x, packed, (9, 8), bias)
    with pytest.raises(
        ValueError, match="x must be of a floating dtype, and bias of the same, got torch.int64 and None"
    ):
        nf4_linear(x.long(), packed, (6, 8))
    with pytest.raises(ValueError, match="got torch.float32 and torch.float64. Cast one"):
        nf4_linear(x, packed, (6, 8), bias.double())
    with pytest.raises(ValueError, match="gets no gradient, but absmax or scale requires one"):
        nf4_linear(x, packed._replace(absmax=packed.absmax.clone().requires_grad_()), (6, 8))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    packed, (x, bias) = nf4_pack(torch.randn(6, 8)), inputs((5,), 6, 8)
    torch.library.opcheck(_product, (x, *packed, bias, 6, 8, False))
    torch.library.opcheck(_product, (torch.randn(6, 5).T, *packed, None, 6, 8, True))


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
@pytest.mark.parametrize("double_quant", [True, False])
def test_it_compiles_whole(double_quant: bool) -> None:
    torch._dynamo.reset()
    packed, (x, bias) = nf4_pack(torch.randn(6, 8), 64, double_quant), inputs((5,), 6, 8)
    compiled = torch.compile(nf4_linear, backend="aot_eager", fullgraph=True)
    results: list[Any] = []
    for f in (compiled, nf4_linear):
        y = f(x, packed, (6, 8), bias)
        results.append((y, *torch.autograd.grad(y.pow(3).sum(), (x, bias))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
