"""A linear layer whose frozen weight is kept in NF4: y = x W^T + b.

Backward: dx = dy W, db = sum over rows of dy. Saved for it are the codes, neither W nor x.

For many rows W is unpacked, multiplied by the product of the device, and forgotten: unpacking reads and writes little
beside what the product computes. For few rows (``FEW``) the time is that of reading W, so a kernel reads codes alone
and unpacks them in registers. Its sums over parts of K are added in a fixed order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, runs_triton
from lightning_peft.kernels.nf4 import GROUP, KERNEL_DTYPES, LEVELS, Packed, check_packed, table, unpack_flat

FEW = 64  # rows: with fewer, reading the weight takes longer than the product
PROGRAMS = 512  # enough for every core, where each adds up a part of K


def nf4_linear(x: Tensor, packed: Packed, shape: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """A linear layer with a weight in 4 bits, unpacked to the dtype of ``x``.

    Args:
        x: (..., K).
        packed: the weight, as `nf4_pack` gives it; it gets no gradient.
        shape: of the weight, (N, K).
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, or a part of ``packed`` requires a gradient.
    """
    check_packed("nf4_linear", packed, shape)
    if len(shape) != 2 or x.shape[-1:] != shape[1:] or (bias is not None and bias.shape != shape[:1]):
        raise ValueError(
            f"nf4_linear: x must be (..., K), shape (N, K) and bias (N,) or None, got {tuple(x.shape)}, {tuple(shape)} "
            f"and {None if bias is None else tuple(bias.shape)}."
        )
    if any(part is not None and part.requires_grad for part in packed):
        raise ValueError(
            "nf4_linear: a weight in 4 bits gets no gradient, but absmax or scale requires one. Freeze it with "
            "requires_grad_(False)."
        )
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
    if not dtype.is_floating_point or not (cast or bias is None or bias.dtype == dtype):
        raise ValueError(
            f"nf4_linear: x must be of a floating dtype, and bias of the same, got {x.dtype} and "
            f"{None if bias is None else bias.dtype}. Cast one of them."
        )
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)
    y = nf4_product(rows, packed, shape, None if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], shape[0])


def nf4_product(
    x: Tensor, packed: Packed, shape: Sequence[int], bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """`nf4_linear` of rows, unchecked: x W^T + b, or x W + b if ``transposed``, for W of this shape."""
    return _product(x, *packed, bias, shape[0], shape[1], transposed)


@torch.library.custom_op("lightning_peft::nf4_linear", mutates_args=())
def _product(
    x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, bias: Tensor | None,
    N: int, K: int, transposed: bool,
) -> Tensor:  # fmt: skip
    packed = Packed(codes, absmax, scale)
    few = 0 < len(x) < FEW and len(absmax) > 0
    if few and not transposed and x.dtype in KERNEL_DTYPES and runs_triton(x):
        tile = _tile(x, packed)
        if tile["WIDTH"] >= NARROWEST:
            return _launch(x, packed, bias, N, tile)
    weight = unpack_flat(*packed, N * K, x.dtype).view(N, K)
    weight = weight if transposed else weight.t()
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


@_product.register_fake
def _(
    x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, bias: Tensor | None,
    N: int, K: int, transposed: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], K if transposed else N)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, scale, _, *ctx.form = inputs
    ctx.save_for_backward(codes, absmax, scale)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x_trains, *_, bias_trains, _, _, _ = ctx.needs_input_grad
    N, K, transposed = ctx.form
    dx = _product(dy, *ctx.saved_tensors, None, N, K, not transposed) if x_trains else None
    return dx, None, None, None, dy.sum(0) if bias_trains else None, None, None, None


_product.register_autograd(_differentiate, setup_context=_setup)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from lightning_peft.kernels.nf4 import unpack_tile

    NARROWEST = 32  # part of K that is worth a product

    @triton.jit
    def _nf4_linear(
        x_ptr, codes_ptr, absmax_ptr, scale_ptr, levels_ptr, part_ptr, T, N, K, steps,
        DOUBLE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        # W in the first place: its rows fill the multiplying units, whose other side may be as short as T
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # N * K can exceed 32 bits
        part = tl.program_id(1).to(tl.int64)
        t, k = tl.arange(0, BLOCK_T), tl.arange(0, WIDTH)
        y, levels = tl.zeros((BLOCK_N, BLOCK_T), tl.float32), tl.load(levels_ptr + tl.arange(0, 16))
        first = part * steps * WIDTH
        for start in range(first, tl.minimum(first + steps * WIDTH, K), WIDTH):
            place = tl.multiple_of(n * K + start, WIDTH)
            w = unpack_tile(
                codes_ptr, absmax_ptr, scale_ptr, levels, place // 2, place // BLOCK, n < N, DOUBLE, GROUP, WIDTH
            )  # fmt: skip
            x = tl.load(x_ptr + t[:, None] * K + start + k[None], mask=t[:, None] < T, other=0.0)
            y = tl.dot(w.to(x.dtype), tl.trans(x), y, input_precision="ieee")
        out = part_ptr + (part * T + t[:, None]) * N + n[None]
        tl.store(out, tl.trans(y), mask=(t[:, None] < T) & (n[None] < N))

    def _tile(x: Tensor, packed: Packed) -> dict[str, int]:
        """WIDTH of K at a time, so that one absmax stands for all of a row; float32 needs twice the registers."""
        width = math.gcd(x.shape[1], packed.block_size, 32 if x.dtype == torch.float32 else 64)
        rows = max(16, triton.next_power_of_2(len(x)))
        return {"BLOCK_N": 64, "BLOCK_T": rows, "WIDTH": width, "num_warps": 4, "num_stages": 4}

    def _launch(x: Tensor, packed: Packed, bias: Tensor | None, N: int, tile: dict[str, int]) -> Tensor:
        x, codes, absmax = x.contiguous(), packed.codes.contiguous(), packed.absmax.contiguous()
        scale = absmax if packed.scale is None else packed.scale.contiguous()
        T, K = x.shape
        row_blocks, total = triton.cdiv(N, tile["BLOCK_N"]), K // tile["WIDTH"]
        steps = triton.cdiv(total, max(1, min(total, PROGRAMS // row_blocks)))
        parts = triton.cdiv(total, steps)
        sums = x.new_empty(parts, T, N, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _nf4_linear[(row_blocks, parts)](
                x, codes, absmax, scale, table(LEVELS, x.device), sums, T, N, K, steps,
                DOUBLE=packed.scale is not None, GROUP=GROUP, BLOCK=packed.block_size, **tile, **OPTIONS,
            )  # fmt: skip
        y = sums.sum(0)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (
            _nf4_linear,
            [kind, "*u8", "*u8" if double else "*fp32", "*fp32", "*fp32", "*fp32", *["i32"] * 4],
            {"DOUBLE": double, "GROUP": GROUP, "BLOCK": 64, "BLOCK_N": 64, "BLOCK_T": rows, "WIDTH": width},
            {"num_warps": 4, "num_stages": 4},
        )
        for kind, width in (("*bf16", 64), ("*fp16", 64), ("*fp32", 32))
        for rows, double in ((16, True), (32, False), (64, True))
    ]
