"""NF4 beside its definition: each weight of a block is the nearest of 16 levels times the largest of the block."""

import math

import pytest
import torch
from torch import Tensor

from lightning_peft.kernels.nf4 import GROUP, LEVELS, Packed, nf4_pack, nf4_unpack

# the table that the authors' library ships
TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
WIDEST = 0.1519  # half of the largest gap between two levels

shapes = pytest.mark.parametrize("shape", [(1,), (63,), (127,), (7, 11), (64, 64), (5, 3, 3, 3), (130, 257)])
quantised = pytest.mark.parametrize("double_quant", [True, False])


def rounded(weight: Tensor, block_size: int) -> Tensor:
    """By the definition, one block after the other, in float64."""
    table, values = torch.tensor(TABLE, dtype=torch.float64), []
    for block in weight.double().flatten().split(block_size):
        absmax = block.abs().max()
        distance = (block[:, None] / absmax.clamp(min=1e-300) - table).abs()
        values.append(table[distance.argmin(1)] * absmax)
    return torch.cat(values).view(weight.shape)


def there_and_back(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Tensor:
    return nf4_unpack(nf4_pack(weight, block_size, double_quant), weight.shape)


def bits(packed: Packed) -> int:
    return sum(8 * part.nbytes for part in packed if part is not None)


def test_levels_are_those_of_the_table() -> None:
    # the table was computed in float32
    torch.testing.assert_close(torch.tensor(LEVELS), torch.tensor(TABLE), rtol=0, atol=2e-7)


@shapes
@pytest.mark.parametrize("block_size", [2, 64, 128])
def test_each_weight_takes_the_nearest_level(shape: tuple[int, ...], block_size: int) -> None:
    weight = torch.randn(shape)
    found = there_and_back(weight, block_size, double_quant=False)
    torch.testing.assert_close(found, rounded(weight, block_size).float(), rtol=1e-6, atol=1e-6)


@shapes
def test_a_second_quantisation_moves_each_block_by_at_most_half_a_step(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    once, twice = (there_and_back(weight, 64, d).flatten() for d in (False, True))
    largest = torch.stack([block.abs().max() for block in once.split(64)])
    for group, one, two in zip(largest.split(GROUP), once.split(64 * GROUP), twice.split(64 * GROUP), strict=True):
        assert (one - two).abs().max() <= group.max() / 510 * (1 + 1e-5)
        assert two.abs().max() == group.max(), "the largest of a group is kept as it is"


@quantised
def test_the_largest_of_a_block_and_zero_are_kept(double_quant: bool) -> None:
    weight = torch.randn(64, 64).clamp(-2, 2)
    weight[:, 3], weight[:, 5], weight[:, 7] = 0.0, 2.5, -2.5
    found = there_and_back(weight, 64, double_quant)
    assert found[:, 3].eq(0).all()
    assert found[:, 5].eq(2.5).all()
    assert found[:, 7].eq(-2.5).all()
    assert (found - weight).abs().max() <= WIDEST * 2.5


@shapes
@quantised
def test_packing_what_was_unpacked_gives_the_same_again(shape: tuple[int, ...], double_quant: bool) -> None:
    first = there_and_back(torch.randn(shape), 64, double_quant)
    assert torch.equal(there_and_back(first, 64, double_quant), first)


@quantised
@pytest.mark.parametrize("shape", [(0,), (3, 0), (200,), (3, 100)])
def test_empty_weights_and_zeros_stay(shape: tuple[int, ...], double_quant: bool) -> None:
    assert torch.equal(there_and_back(torch.zeros(shape), 64, double_quant), torch.zeros(shape))
    assert nf4_pack(torch.zeros(shape)).codes.eq(0x77).all(), "zero has a code of its own"
    mixed = torch.cat([torch.zeros(64), torch.randn(64), torch.zeros(64)])  # blocks of zeros beside others
    assert not there_and_back(mixed, 64, double_quant).view(3, 64)[[0, 2]].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_scale_of_a_weight_does_not_matter(scale: float) -> None:
    weight = torch.randn(7, 64)
    torch.testing.assert_close(there_and_back(scale * weight) / scale, there_and_back(weight), rtol=1e-5, atol=1e-6)


def test_the_first_code_is_in_the_high_half() -> None:
    packed = nf4_pack(torch.tensor([-1.0, 1.0, 0.0, 1.0]), 4, double_quant=False)
    assert packed.codes.tolist() == [0x0F, 0x7F]


@pytest.mark.parametrize(("double_quant", "expected"), [(True, 4.127), (False, 4.5)])
def test_bits_of_a_weight(double_quant: bool, expected: float) -> None:
    weight = torch.randn(1024, 1024)
    assert bits(nf4_pack(weight, 64, double_quant)) / weight.numel() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_in_another_precision_is_rounded_once(dtype: torch.dtype) -> None:
    weight = torch.randn(13, 64).to(dtype)
    packed = nf4_pack(weight)
    assert torch.equal(nf4_unpack(packed, weight.shape, dtype), nf4_unpack(packed, weight.shape).to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(packed, nf4_pack(weight.float()), strict=True))


def test_a_weight_that_is_not_contiguous_is_read_row_by_row() -> None:
    weight = torch.randn(64, 31)
    assert torch.equal(there_and_back(weight.T), there_and_back(weight.T.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_has_no_level_is_refused(bad: float) -> None:
    weight = torch.randn(3, 5)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        nf4_pack(weight)


@pytest.mark.parametrize("block_size", [0, -2, 1, 63])
def test_a_block_that_does_not_fill_bytes_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size must be even"):
        nf4_pack(torch.randn(3, 5), block_size)
