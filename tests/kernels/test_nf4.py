"""NF4 beside its definition: each weight of a block is the nearest of 16 levels times the largest of the block.

As its twin here, as its kernels where interpreted.
"""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_peft.kernels import nf4_pack, nf4_unpack
from lightning_peft.kernels.nf4 import BETWEEN, GROUP, LEVELS, Packed, _pack, _unpack
from tests.kernels.rule import DEVICE, DTYPES, INTERPRETED

# the table that the authors' library ships
TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# and what it compares with, in float32, to find a code
THRESHOLDS = [
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
]
WIDEST = 0.1519  # half of the largest gap between two levels

shapes = pytest.mark.parametrize("shape", [(), (63,), (127,), (7, 11), (64, 64), (5, 3, 3, 3), (130, 257)])
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


def same(one: Packed, other: Packed) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


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
    packed = nf4_pack(torch.tensor([[3.0 * level for level in TABLE], [0.5 * level for level in TABLE]]), 16, False)
    assert packed.codes.tolist() == 2 * [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed.absmax.tolist() == [3.0, 0.5]


def codes_of(weight: Tensor) -> list[int]:
    """The codes of ``weight``, of which 1 is the largest, in one block of 64."""
    filled = torch.zeros(64)
    filled[: len(weight)], filled[-1] = weight, 1.0
    codes = nf4_pack(filled, double_quant=False).codes
    return torch.stack([codes >> 4, codes & 15], 1).flatten()[: len(weight)].tolist()


def test_codes_change_where_they_do_in_the_authors_library() -> None:
    steps = torch.tensor(THRESHOLDS)
    assert codes_of(steps - 3e-7) == list(range(15))
    assert codes_of(steps + 3e-7) == list(range(1, 16))


def test_half_way_the_lower_code_is_taken() -> None:
    half = torch.tensor(BETWEEN)
    assert codes_of(half) == list(range(15))
    assert codes_of(torch.nextafter(half, torch.tensor(2.0))) == list(range(1, 16))


def test_an_absmax_in_8_bits_is_a_multiple_of_a_255th_of_the_largest_of_its_group() -> None:
    absmax = torch.rand(GROUP + 5) + 0.1
    absmax[3], absmax[GROUP + 1] = 2.0, 5.0
    packed = nf4_pack(absmax.repeat_interleave(2), 2)
    assert packed.scale.tolist() == [2.0, 5.0]
    scale = torch.tensor(GROUP * [2.0] + 5 * [5.0], dtype=torch.float64)
    assert packed.absmax.tolist() == (absmax / scale * 255).round().tolist()
    expected = packed.absmax / 255 * scale
    torch.testing.assert_close(nf4_unpack(packed, (GROUP + 5, 2))[:, 0], expected.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize(("double_quant", "expected"), [(True, 4.127), (False, 4.5)])
def test_bits_of_a_weight(double_quant: bool, expected: float) -> None:
    weight = torch.randn(64, GROUP)  # as many blocks as share a scale
    assert bits(nf4_pack(weight, 64, double_quant)) / weight.numel() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_in_another_precision_is_rounded_once(dtype: torch.dtype) -> None:
    weight = torch.randn(13, 64).to(dtype)
    packed = nf4_pack(weight)
    assert same(packed, nf4_pack(weight.float()))
    if dtype in (*DTYPES, torch.float64):
        assert torch.equal(nf4_unpack(packed, weight.shape, dtype), nf4_unpack(packed, weight.shape).to(dtype))


def test_what_is_not_contiguous_is_read_row_by_row() -> None:
    weight = torch.randn(64, 31)
    packed = nf4_pack(weight.T)
    assert same(packed, nf4_pack(weight.T.contiguous()))
    gaps = Packed(*(torch.stack([part, part], 1)[:, 0] for part in packed))
    assert torch.equal(nf4_unpack(gaps, (31, 64)), nf4_unpack(packed, (31, 64)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_has_no_level_is_refused(bad: float) -> None:
    weight = torch.randn(3, 5)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        nf4_pack(weight)
    with pytest.raises(ValueError, match="NaN or infinite"):
        nf4_pack(torch.tensor([1.0, 1e39], dtype=torch.float64))


@pytest.mark.parametrize("block_size", [0, -2, 1, 63])
def test_a_block_that_does_not_fill_bytes_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size must be an even integer >= 2"):
        nf4_pack(torch.randn(3, 5), block_size)


def test_what_does_not_belong_together_is_refused() -> None:
    once, twice = (nf4_pack(torch.randn(40, 5), 64, d) for d in (False, True))
    assert len(once.absmax) == 4
    for shape in ((3, 64), (257,), (0,)):
        with pytest.raises(ValueError, match=r"nf4_unpack: shape .* packed are 4 blocks of 64. Give the shape"):
            nf4_unpack(once, shape)
    for packed in (once._replace(absmax=once.absmax[:3]), once._replace(codes=once.codes[1:])):
        with pytest.raises(ValueError, match=r"bytes of codes, . absmax and None scales do not belong together"):
            nf4_unpack(packed, (40, 5))
    with pytest.raises(ValueError, match=r"4 absmax and 0 scales do not belong together: 256 blocks share a scale"):
        nf4_unpack(twice._replace(scale=twice.scale[:0]), (40, 5))
    for packed in (once._replace(absmax=once.absmax.half()), twice._replace(scale=None), once._replace(scale=once[1])):
        with pytest.raises(ValueError, match="codes, absmax and scale must be .* Take what nf4_pack gives"):
            nf4_unpack(packed, (40, 5))


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(n=st.integers(0, 300), half=st.integers(1, 40), double_quant=st.booleans(), seed=st.integers(0, 99))
def test_properties(n: int, half: int, double_quant: bool, seed: int) -> None:
    weight = torch.randn(n, generator=torch.Generator(DEVICE).manual_seed(seed))
    found = there_and_back(weight, 2 * half, double_quant)
    assert torch.equal(there_and_back(4 * weight, 2 * half, double_quant), 4 * found), "a power of two changes no code"
    order = torch.randperm(n // (2 * half))
    blocks = weight[: len(order) * 2 * half].view(-1, 2 * half)
    if not double_quant:
        assert torch.equal(
            there_and_back(blocks[order], 2 * half, False), found[: blocks.numel()].view_as(blocks)[order]
        )


def by_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_peft.kernels.nf4"], "runs_triton", lambda x: False)


def near_thresholds(n: int) -> Tensor:
    """Values that the last bit of a division decides about, in blocks of 16 with an absmax of their own."""
    absmax = torch.rand(n // 16, 1) + 0.5
    values = torch.tensor([*BETWEEN, 1.0]) * absmax
    bits = values.view(torch.int32)
    bits[:, :15] += torch.randint(-2, 3, (len(values), 15), dtype=torch.int32)
    return bits.view(torch.float32).flatten()


WEIGHTS = {
    "near thresholds": lambda: (near_thresholds(16 * 530), 16),
    "normal": lambda: (torch.randn(97, 131), 64),
    "blocks of two": lambda: (torch.randn(4099), 2),
    "one block a tile": lambda: (torch.randn(4 * 4096 - 5), 4096),
    "too long for a tile": lambda: (torch.randn(9000), 8192),
    "blocks of 48": lambda: (torch.randn(500), 48),
    "float16": lambda: (torch.randn(70, 64).half(), 64),
    "bfloat16": lambda: (torch.randn(70, 64).bfloat16(), 64),
    "float64": lambda: (torch.randn(70, 64).double(), 64),
    "tiny": lambda: (torch.randn(70, 64) * 1e-40, 64),
    "zeros": lambda: (torch.cat([torch.randn(64), torch.zeros(64), -torch.zeros(64)]), 64),
}


@pytest.mark.skipif(not INTERPRETED, reason="of the kernels")
@quantised
@pytest.mark.parametrize("name", WEIGHTS)
def test_kernels_give_the_bits_of_the_twin(name: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, block_size = WEIGHTS[name]()
    dtypes = (torch.float32, torch.float16, torch.float64)
    packed = nf4_pack(weight, block_size, double_quant)
    unpacked = [nf4_unpack(packed, weight.shape, dtype) for dtype in dtypes]
    by_the_twin(monkeypatch)
    assert same(packed, nf4_pack(weight, block_size, double_quant))
    for found, dtype in zip(unpacked, dtypes, strict=True):
        assert torch.equal(found, nf4_unpack(packed, weight.shape, dtype))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_divide_as_the_twin(target: str) -> None:
    # the quick division of accelerators is off in the last bit, which decides on a code
    pytest.importorskip("triton")
    from lightning_peft.kernels.nf4 import VARIANTS
    from tests.kernels.ahead_of_time import build

    for kernel, types, constants, options in VARIANTS[:2]:
        assembly = build(kernel, types, constants, options, target).assembly
        assert "div.rn.f32" in assembly
        assert "div.full" not in assembly
        assert "rcp." not in assembly


@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
@quantised
def test_the_operations_are_well_behaved(double_quant: bool) -> None:
    for weight, block_size in ((torch.randn(77).half(), 10), (torch.randn(0), 64)):
        torch.library.opcheck(_pack, (weight, block_size))
        packed = nf4_pack(weight, block_size, double_quant)
        torch.library.opcheck(_unpack, (*packed, len(weight), torch.bfloat16))


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
def test_unpacking_compiles_whole() -> None:
    packed = nf4_pack(torch.randn(7, 11))
    compiled = torch.compile(nf4_unpack, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(packed, (7, 11)), nf4_unpack(packed, (7, 11)))
