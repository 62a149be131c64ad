"""NF4: weights in 4 bits, whose 16 levels are quantiles of the normal distribution (QLoRA, arXiv:2305.14314).

A weight is taken row by row and cut into blocks. A block keeps its largest absolute value, absmax, and for each weight
the code of the level that is nearest to w / absmax. Double quantisation keeps each absmax in 8 bits, in groups of 256
blocks. That is 4 + 32 / 64 = 4.5 bits a weight, or 4 + 8 / 64 + 32 / (64 * 256) = 4.127.

Codes and levels are those of bitsandbytes. Its double quantisation differs: it takes the mean off and rounds to levels
of 8-bit floats. Here an absmax is a multiple of 1/255 of the largest in its group, so that 0 and the largest are exact
and packing what was unpacked (in float32) gives the same again.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, runs_triton

GROUP = 256  # blocks that share a scale
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels read and write


def _levels() -> tuple[float, ...]:
    # as many quantiles on either side as there are codes for: 8 above zero, 7 below
    tail = 0.9677083  # as the authors round the mean of 1 - 1/32 and 1 - 1/30

    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(tail + (0.5 - tail) * i / n) for i in range(n)]

    values = sorted([*quantiles(8), 0.0, *(-q for q in quantiles(7))])
    return tuple(value / values[-1] for value in values)


LEVELS = _levels()
BETWEEN = tuple((a + b) / 2 for a, b in itertools.pairwise(LEVELS))  # the last value of each level but the highest


class Packed(NamedTuple):
    """A weight in 4 bits.

    Args:
        codes: uint8 (n_blocks * block_size / 2,), two codes a byte, the first one in the high half; the last block is
            filled up with zeros.
        absmax: of each block, (n_blocks,): float32, or uint8 if quantised again.
        scale: the largest absmax of each group, float32 (n_groups,); None if absmax is not quantised.
    """

    codes: Tensor
    absmax: Tensor
    scale: Tensor | None

    @property
    def block_size(self) -> int:
        """Weights that share an absmax; 0 if there are none."""
        return 2 * len(self.codes) // max(len(self.absmax), 1)


def nf4_pack(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Packed:
    """Round ``weight`` of any shape to 4 bits. Waits for the accelerator once, to see that all values are finite.

    Raises:
        ValueError: ``block_size`` is odd or less than 2, or ``weight`` has NaN or infinite values (in float32).
    """
    if block_size < 2 or block_size % 2:
        raise ValueError(f"nf4_pack: block_size must be an even integer >= 2, got {block_size}.")
    codes, absmax = _pack(weight.detach().reshape(-1), block_size)
    if not absmax.isfinite().all():
        raise ValueError("nf4_pack: the weight has NaN or infinite values, which no code stands for. Load it again.")
    if not double_quant:
        return Packed(codes, absmax, None)
    groups = F.pad(absmax, (0, -len(absmax) % GROUP)).view(-1, GROUP)
    scale = groups.amax(1)
    steps = (groups / scale.where(scale > 0, 1.0)[:, None] * 255).round()
    return Packed(codes, steps.to(torch.uint8).view(-1)[: len(absmax)], scale)


def nf4_unpack(packed: Packed, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of this shape, computed in float32 and rounded to ``dtype``.

    Raises:
        ValueError: ``packed`` is not what `nf4_pack` gives for a weight of this shape.
    """
    check_packed("nf4_unpack", packed, shape)
    return _unpack(*packed, math.prod(shape), dtype).view(tuple(shape))


def check_packed(who: str, packed: Packed, shape: Sequence[int]) -> None:
    """Raise a `ValueError` if ``packed`` is not a weight of this shape."""
    codes, absmax, scale = packed
    n_groups = None if scale is None else -(-len(absmax) // GROUP)
    kinds = codes.dtype, absmax.dtype, None if scale is None else scale.dtype
    once, twice = (torch.uint8, torch.float32, None), (torch.uint8, torch.uint8, torch.float32)
    if kinds not in (once, twice):
        raise ValueError(
            f"{who}: codes, absmax and scale must be {once}, or {twice}, got {kinds}. Take what nf4_pack gives, as "
            "it is: a cast of a whole model casts them too."
        )
    n, block_size = math.prod(shape), packed.block_size
    if block_size * len(absmax) != 2 * len(codes) or (scale is not None and len(scale) != n_groups):
        raise ValueError(
            f"{who}: {len(codes)} bytes of codes, {len(absmax)} absmax and {None if scale is None else len(scale)} "
            f"scales do not belong together: {GROUP} blocks share a scale. Take what nf4_pack gives."
        )
    if -(-n // max(block_size, 1)) != len(absmax):
        raise ValueError(
            f"{who}: shape {tuple(shape)} has {n} weights, and packed are {len(absmax)} blocks of {block_size}. Give "
            "the shape of the weight that was packed."
        )


@torch.library.custom_op("lightning_peft::nf4_pack", mutates_args=())
def _pack(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, and absmax of each block: NaN or infinite if one of its values is."""
    if runs_triton(weight) and is_tile(block_size):
        return _launch_pack(weight, block_size)
    flat = weight.float()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    unit = blocks / absmax.where(absmax > 0, 1.0)[:, None]
    between = torch.tensor(BETWEEN, dtype=torch.float32, device=flat.device)
    codes = torch.bucketize(unit, between, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax


@_pack.register_fake
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n_blocks = -(-weight.shape[0] // block_size)
    codes = weight.new_empty(n_blocks * (block_size // 2), dtype=torch.uint8)
    return codes, weight.new_empty(n_blocks, dtype=torch.float32)


def unpack_flat(codes: Tensor, absmax: Tensor, scale: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    """The first ``n`` weights; what `nf4_unpack` computes, for operations that use it on their way."""
    block_size = Packed(codes, absmax, scale).block_size
    if runs_triton(codes) and is_tile(block_size):
        return _launch_unpack(codes, absmax, scale, n, dtype)
    if scale is not None:
        # by a tensor, for an accelerator takes a division by a number for a product with its inverse
        parts = absmax / torch.full((), 255.0, device=absmax.device)
        absmax = scale.repeat_interleave(GROUP)[: len(absmax)] * parts
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): the two weights of each byte
    blocks = F.embedding(codes.int(), pairs).view(len(absmax), block_size) * absmax[:, None]
    return blocks.view(-1)[:n].to(dtype)


_unpack = torch.library.custom_op("lightning_peft::nf4_unpack", unpack_flat, mutates_args=())


@_unpack.register_fake
def _(codes: Tensor, absmax: Tensor, scale: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(n, dtype=dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    ELEMENTS = 4096  # of a tile, which holds whole blocks
    GROUP_, LEVELS_, BETWEEN_ = tl.constexpr(GROUP), tl.constexpr(LEVELS), tl.constexpr(BETWEEN)  # for kernels

    def is_tile(block_size: int) -> bool:
        """Whether blocks of this size fill a tile; the twin takes others."""
        return 2 <= block_size <= ELEMENTS and ELEMENTS % block_size == 0

    @triton.jit
    def _nf4_pack(w_ptr, codes_ptr, absmax_ptr, n, n_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # a weight can exceed 32 bits
        places = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None]
        w = tl.load(w_ptr + places, mask=places < n, other=0.0).to(tl.float32)
        infinity = float("inf")
        absmax = tl.max(tl.where(tl.abs(w) < infinity, tl.abs(w), infinity), 1)  # no maximum sees NaN on every device
        unit = tl.div_rn(w, tl.where((absmax > 0) & (absmax < infinity), absmax, 1.0)[:, None])
        code = tl.zeros((ROWS, BLOCK), tl.int32)
        for i in tl.static_range(15):
            code += (unit > BETWEEN_[i]).to(tl.int32)
        high, low = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
        pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None]
        tl.store(codes_ptr + pairs, (high * 16 + low).to(tl.uint8), mask=blocks[:, None] < n_blocks)
        tl.store(absmax_ptr + blocks, absmax, mask=blocks < n_blocks)

    @triton.jit
    def all_levels():
        """(16,): what codes stand for."""
        code = tl.arange(0, 16)
        levels = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            levels = tl.where(code == i, LEVELS_[i], levels)
        return levels

    @triton.jit
    def unpack_tile(
        codes_ptr, absmax_ptr, scale_ptr, levels, first, blocks, inside, DOUBLE: tl.constexpr, WIDTH: tl.constexpr
    ):  # fmt: skip
        """(rows, WIDTH) weights in float32: of each row, those of one block from byte ``first`` on."""
        absmax = tl.load(absmax_ptr + blocks, mask=inside, other=0).to(tl.float32)
        if DOUBLE:
            scale = tl.load(scale_ptr + blocks // GROUP_, mask=inside, other=0.0)
            absmax = scale * tl.div_rn(absmax, tl.full(absmax.shape, 255.0, tl.float32))
        pairs = first[:, None] + tl.arange(0, WIDTH // 2)[None]
        codes = tl.load(codes_ptr + pairs, mask=inside[:, None], other=0)
        codes = tl.reshape(tl.join(codes >> 4, codes & 15), (codes.shape[0] * WIDTH,))
        return tl.reshape(tl.gather(levels, codes.to(tl.int32), 0), (first.shape[0], WIDTH)) * absmax[:, None]

    @triton.jit
    def _nf4_unpack(
        codes_ptr, absmax_ptr, scale_ptr, w_ptr, n, n_blocks,
        DOUBLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        w = unpack_tile(
            codes_ptr, absmax_ptr, scale_ptr, all_levels(), blocks * (BLOCK // 2), blocks, blocks < n_blocks,
            DOUBLE, BLOCK,
        )  # fmt: skip
        places = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None]
        tl.store(w_ptr + places, w.to(w_ptr.dtype.element_ty), mask=places < n)

    def _tile(block_size: int) -> dict[str, int]:
        return {"ROWS": ELEMENTS // block_size, "BLOCK": block_size, "num_warps": 16}

    def _launch_pack(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        weight = (weight if weight.dtype in KERNEL_DTYPES else weight.float()).contiguous()
        n_blocks = triton.cdiv(len(weight), block_size)
        codes = weight.new_empty(n_blocks * (block_size // 2), dtype=torch.uint8)
        absmax, tile = weight.new_empty(n_blocks, dtype=torch.float32), _tile(block_size)
        if n_blocks:
            with torch.cuda.device_of(weight):
                _nf4_pack[(triton.cdiv(n_blocks, tile["ROWS"]),)](
                    weight, codes, absmax, len(weight), n_blocks, **tile, **OPTIONS
                )  # fmt: skip
        return codes, absmax

    def _launch_unpack(codes: Tensor, absmax: Tensor, scale: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
        codes, absmax = codes.contiguous(), absmax.contiguous()
        n_blocks, tile = len(absmax), _tile(Packed(codes, absmax, scale).block_size)
        w = codes.new_empty(n, dtype=dtype if dtype in KERNEL_DTYPES else torch.float32)
        if n:
            with torch.cuda.device_of(codes):
                _nf4_unpack[(triton.cdiv(n_blocks, tile["ROWS"]),)](
                    codes, absmax, absmax if scale is None else scale.contiguous(), w, n, n_blocks,
                    DOUBLE=scale is not None, **tile, **OPTIONS,
                )  # fmt: skip
        return w.to(dtype)

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, types, {**constants, "ROWS": ELEMENTS // block_size, "BLOCK": block_size}, {"num_warps": 16})
        for block_size in (64, ELEMENTS)
        for kind in ("*bf16", "*fp32")
        for kernel, types, constants in (
            (_nf4_pack, [kind, "*u8", "*fp32", "i32", "i32"], {}),
            *(
                (
                    _nf4_unpack,
                    ["*u8", "*u8" if double else "*fp32", "*fp32", kind, "i32", "i32"],
                    {"DOUBLE": double},
                )
                for double in (True, False)
            ),
        )
    ]
