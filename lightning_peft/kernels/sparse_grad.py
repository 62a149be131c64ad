"""Linear layers of which some entries, columns or rows train: y = x (W + D)^T + b, where D is zero but for them.

What trains is D at those places, beside a W that stays as it is. With dD = dY^T X wherever D trains:
entries:  dvalues_i = dY[:, row_i] . X[:, column_i],   dX = dY (W + D);
columns I:  dvalues = dY^T X[:, I],   dX = dY W, plus dY values in the columns I;
rows I:  dvalues = dY[:, I]^T X,   dX = dY W + dY[:, I] values.
No dense gradient of W is built. Beside W and what trains, entries and rows save X, and columns save X[:, I] alone.
Entries put W + D together in the forward pass, and again in the backward pass instead of keeping it in between.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, refuse_second, runs_triton

ELEMENTS = 2**22  # of products that the twin holds at a time


def linear_with_entries(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """A linear layer with a frozen weight and a trained change of some of its entries.

    Args:
        x: (..., K).
        weight: (N, K), frozen.
        bias: (N,), or None.
        values: (n,), added to the entries ``index`` of the weight, of any precision.
        index: (n,) int64, places in ``weight.flatten()``, ascending and each once.

    Returns:
        (..., N) in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, ``weight`` requires a gradient, or ``index`` does not ascend within
            the weight. The last is seen on the CPU; an accelerator, which is not waited for, gives NaN as the gradient
            of what is out of order.
    """
    _check("linear_with_entries", x, weight, bias, values, index, index.shape)
    looked_at = index.device.type == "cpu" and not torch.compiler.is_compiling() and len(index) > 0
    if looked_at and (index[0] < 0 or index[-1] >= weight.numel() or (index[1:] <= index[:-1]).any()):
        raise ValueError(
            f"linear_with_entries: index must ascend strictly from 0 at least to {weight.numel() - 1} at most. Sort it "
            "once, together with its values."
        )
    return _apply(_entries, x, weight, bias, values, index)


def linear_with_columns(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """A linear layer with a frozen weight and a trained change of some of its columns (input features).

    Args:
        x: (..., K).
        weight: (N, K), frozen.
        bias: (N,), or None.
        values: (N, n), added to the columns ``index`` of the weight, of any precision.
        index: (n,) int64, input features; one that occurs twice gets both changes.

    Returns:
        (..., N) in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``weight`` requires a gradient.
    """
    _check("linear_with_columns", x, weight, bias, values, index, (weight.shape[0], *index.shape))
    return _apply(_columns, x, weight, bias, values, index)


def linear_with_rows(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """A linear layer with a frozen weight and a trained change of some of its rows (output features).

    Args:
        x: (..., K).
        weight: (N, K), frozen.
        bias: (N,), or None.
        values: (n, K), added to the rows ``index`` of the weight, of any precision.
        index: (n,) int64, output features; one that occurs twice gets both changes.

    Returns:
        (..., N) in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``weight`` requires a gradient.
    """
    _check("linear_with_rows", x, weight, bias, values, index, (*index.shape, weight.shape[-1]))
    return _apply(_rows, x, weight, bias, values, index)


def _check(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, shape: tuple[int, ...]
) -> None:
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{name}: x must be (..., K), weight (N, K) and bias (N,) or None, got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
        )
    if not (torch.is_autocast_enabled(x.device.type) or x.dtype == weight.dtype):
        raise ValueError(
            f"{name}: weight must have the dtype of x, got {weight.dtype} and {x.dtype}. Cast one of them."
        )
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"{name}: index must be (n,) int64, got {tuple(index.shape)} {index.dtype}. Use index.long().")
    if values.shape != shape:
        raise ValueError(
            f"{name}: values must be {tuple(shape)} for weight {tuple(weight.shape)} and {len(index)} places in index, "
            f"got {tuple(values.shape)}."
        )
    if weight.requires_grad:
        raise ValueError(
            f"{name}: weight gets no gradient, but requires one. Freeze it with requires_grad_(False), or train it "
            "whole without this function."
        )


def _apply(op: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """``op`` on rows, in the dtype that autocast asks for; values stay as fine as they are."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)
    y = op(rows, weight.to(dtype), None if bias is None else bias.to(dtype), values, index)
    return y.view(*x.shape[:-1], weight.shape[0])


def _with_entries(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """A new weight, W + D."""
    changed = weight.clone(memory_format=torch.contiguous_format).view(-1)
    wide = changed[index].to(accumulator(weight)) + values
    return changed.index_copy_(0, index, wide.to(weight.dtype)).view(weight.shape)


@torch.library.custom_op("lightning_peft::linear_with_entries", mutates_args=())
def _entries(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    return F.linear(x, _with_entries(weight, values, index), bias).contiguous()


@torch.library.custom_op("lightning_peft::linear_with_columns", mutates_args=())
def _columns(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    return F.linear(x, weight, bias).addmm_(x.index_select(1, index), values.to(x.dtype).T).contiguous()


@torch.library.custom_op("lightning_peft::linear_with_rows", mutates_args=())
def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    return F.linear(x, weight, bias).index_add_(1, index, x @ values.to(x.dtype).T).contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# the gradients; x is None if the values are frozen, and of the columns alone where they train
@torch.library.custom_op("lightning_peft::linear_with_entries_backward", mutates_args=())
def _entries_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    dx = (dy @ _with_entries(weight, values, index)).contiguous() if x_trains else dy.new_empty(0)
    if x is None:
        return dx, values.new_empty(0)
    if runs_triton(dy):
        return dx, _launch(dy, x, index).to(values.dtype)
    T, K = x.shape
    # turned, so that what is multiplied lies side by side
    dy_turned, x_turned = (each.to(accumulator(each)).T.contiguous() for each in (dy, x))
    sums = [
        (dy_turned.index_select(0, part // K) * x_turned.index_select(0, part % K)).sum(1)
        for part in index.split(max(1, ELEMENTS // max(T, 1)))
    ]
    return dx, torch.cat(sums).to(values.dtype)


@torch.library.custom_op("lightning_peft::linear_with_columns_backward", mutates_args=())
def _columns_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(0)
    if x_trains:
        dx = (dy @ weight).contiguous().index_add_(1, index, dy @ values.to(dy.dtype))
    return dx, values.new_empty(0) if x is None else (dy.T @ x).to(values.dtype).contiguous()


@torch.library.custom_op("lightning_peft::linear_with_rows_backward", mutates_args=())
def _rows_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    chosen = dy.index_select(1, index)
    dx = (dy @ weight).addmm_(chosen, values.to(dy.dtype)).contiguous() if x_trains else dy.new_empty(0)
    return dx, values.new_empty(0) if x is None else (chosen.T @ x).to(values.dtype).contiguous()


def _fake_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty((dy.shape[0], weight.shape[1]) if x_trains else 0)
    return dx, values.new_empty(0 if x is None else values.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, index = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, values, index)


def _setup_columns(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, index = inputs
    ctx.save_for_backward(x.index_select(1, index) if ctx.needs_input_grad[3] else None, weight, values, index)


def _differentiate(backward: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    refuse_second(backward._name.removesuffix("_backward"))
    x_trains, _, bias_trains, values_train, _ = ctx.needs_input_grad
    dx, dvalues = backward(dy, *ctx.saved_tensors, x_trains)
    dbias = dy.sum(0) if bias_trains else None
    return dx if x_trains else None, None, dbias, dvalues if values_train else None, None


for _op, _op_backward, _op_setup in (
    (_entries, _entries_backward, _setup),
    (_columns, _columns_backward, _setup_columns),
    (_rows, _rows_backward, _setup),
):
    _op.register_fake(_fake)
    _op_backward.register_fake(_fake_backward)
    _op.register_autograd(
        lambda ctx, dy, backward=_op_backward: _differentiate(backward, ctx, dy), setup_context=_op_setup
    )


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _entry_gradients(
        dy_ptr, x_ptr, index_ptr, first_ptr, out_ptr, T, N, K, column_blocks,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        # one tile of dY^T X stays in registers; of each of its rows, the entries lie between two places in index
        program = tl.program_id(0).to(tl.int64)  # before the first product: N * K can exceed 32 bits
        row_block, column_block = program // column_blocks, program % column_blocks
        rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        width = tl.minimum(K - column_block * BLOCK_K, BLOCK_K)  # of the tile, the last one may be narrower
        bounds = first_ptr + rows * column_blocks + column_block
        entry = tl.load(bounds, mask=rows < N, other=0)
        end = tl.load(bounds + 1, mask=rows < N, other=0)
        most = tl.max(end - entry)
        if most > 0:
            tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            t = tl.arange(0, BLOCK_T)[:, None]
            n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
            for start in range(0, T, BLOCK_T):
                first_t = tl.cast(start, tl.int64)
                dy_start = dy_ptr + first_t * N + row_block * BLOCK_N
                x_start = x_ptr + first_t * K + column_block * BLOCK_K
                dy = tl.load(dy_start + t * N + n[None], mask=(t < T - start) & (rows[None] < N), other=0.0)
                x = tl.load(x_start + t * K + k[None], mask=(t < T - start) & (k[None] < width), other=0.0)
                tile = tl.dot(tl.trans(dy), x, tile, input_precision="ieee")
            for _ in range(most):
                there = entry < end
                place = tl.load(index_ptr + entry, mask=there, other=0) - rows * K - column_block * BLOCK_K
                value = tl.sum(tl.where(k[None] == place[:, None].to(tl.int32), tile, 0.0), 1)
                found = (place >= 0) & (place < width)
                tl.store(out_ptr + entry, tl.where(found, value, float("nan")), mask=there)
                entry += 1

    def _tile(dtype: torch.dtype) -> dict[str, int]:
        if dtype == torch.float32:
            return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_T": 16, "num_warps": 8, "num_stages": 2}
        return {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_T": 64, "num_warps": 8, "num_stages": 3}

    def _launch(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
        dy, x, index = dy.contiguous(), x.contiguous(), index.contiguous()
        (T, N), K, tile = dy.shape, x.shape[1], _tile(x.dtype)
        # what is out of order is found by no tile, and must not pass for zero
        out = x.new_full(index.shape, torch.nan if T else 0.0, dtype=torch.float32)
        if T and len(index):
            row_blocks, column_blocks = triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(K, tile["BLOCK_K"])
            starts = torch.arange(N, device=x.device)[:, None] * K
            starts = (starts + torch.arange(column_blocks, device=x.device) * tile["BLOCK_K"]).flatten()
            first = torch.searchsorted(index, torch.cat([starts, starts.new_full((1,), N * K)]))
            with torch.cuda.device_of(x):
                _entry_gradients[(row_blocks * column_blocks,)](
                    dy, x, index, first, out, T, N, K, column_blocks, **tile, **OPTIONS
                )  # fmt: skip
        return out

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (
            _entry_gradients,
            [f"*{name}", f"*{name}", "*i64", "*i64", "*fp32", *["i32"] * 4],
            {key: value for key, value in _tile(dtype).items() if key.isupper()},
            {key: value for key, value in _tile(dtype).items() if key.islower()},
        )
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    ]
