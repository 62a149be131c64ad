"""Linear layers of which some entries, columns or rows train: y = x (W + D)^T + b, where D is zero but for them.

What trains is D at those places, beside a W that stays as it is. With dD = dY^T X wherever D trains:
entries:  dvalues_i = dY[:, row_i] . X[:, column_i],   dX = dY (W + D);
columns I:  dvalues = dY^T X[:, I],   dX = dY W, plus dY values in the columns I;
rows I:  dvalues = dY[:, I]^T X,   dX = dY W + dY[:, I] values.
No dense gradient of W is built. Beside W and what trains, entries and rows save X, and columns save X[:, I] alone.
Entries put W + D together in the forward pass, and again in the backward pass instead of keeping it in between. There
the twin goes through the rows of W in pieces of about as many entries as train: of each piece, W + D and dY^T X are
there until the next.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, refuse_second, runs_triton

ELEMENTS = 2**22  # of products that the twin holds at a time
PIECE = 2**18  # entries of a weight that the twin may always look at together, however few train
# where fewer than one entry in so many trains, each by itself is faster than all of them in a product of matrices
FEW = 128


def linear_with_entries(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """A linear layer with a frozen weight and a trained change of some of its entries.

    Args:
        x: (..., K).
        weight: (N, K), frozen.
        bias: (N,), or None.
        values: (n,), added to the entries ``index`` of the weight, of any precision.
        index: (n,) int32 or int64, places in ``weight.flatten()``, ascending and each once; -1 - i stands for i too.

    Returns:
        (..., N) in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, ``weight`` requires a gradient, or ``index`` does not ascend within
            the weight. The last is seen on the CPU; an accelerator, which is not waited for, gives NaN as the gradient
            of what is out of order.
    """
    _check_rows("linear_with_entries", x, weight, bias)
    check_entries("linear_with_entries", x, weight, values, index, index.shape, (torch.int32, torch.int64))
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
    _check_rows("linear_with_columns", x, weight, bias)
    check_entries("linear_with_columns", x, weight, values, index, (weight.shape[0], *index.shape))
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
    _check_rows("linear_with_rows", x, weight, bias)
    check_entries("linear_with_rows", x, weight, values, index, (*index.shape, weight.shape[-1]))
    return _apply(_rows, x, weight, bias, values, index)


def _check_rows(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{name}: x must be (..., K), weight (N, K) and bias (N,) or None, got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
        )


def check_entries(
    name: str,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    kinds: tuple[torch.dtype, ...] = (torch.int64,),
) -> None:
    """What trains of ``weight``: values of this shape at (n,) places of one of these kinds.

    Raises:
        ValueError: they are not, or ``weight`` trains itself, or has another dtype than ``x``.
    """
    if not (torch.is_autocast_enabled(x.device.type) or x.dtype == weight.dtype):
        raise ValueError(
            f"{name}: weight must have the dtype of x, got {weight.dtype} and {x.dtype}. Cast one of them."
        )
    if index.dim() != 1 or index.dtype not in kinds:
        known = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise ValueError(
            f"{name}: index must be (n,) {known}, got {tuple(index.shape)} {index.dtype}. Use index.long()."
        )
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


def autocast_dtype(x: Tensor) -> torch.dtype:
    """That of ``x``, or of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _apply(op: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """``op`` on rows, in the dtype that autocast asks for; weight and values stay as they are, and are kept as such."""
    dtype = autocast_dtype(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)
    y = op(rows, weight, None if bias is None else bias.to(dtype), values, index)
    return y.view(*x.shape[:-1], weight.shape[0])


def places_of(index: Tensor) -> Tensor:
    """(n,) places, of those that stand for themselves and of those that -1 - i stands for."""
    return index ^ (index >> (8 * index.itemsize - 1))  # the bits of -1 - i are those of i turned over


def _can_ask(places: Tensor) -> bool:
    """Whether asking for a number keeps nobody waiting."""
    return places.device.type == "cpu"


def check_order(name: str, weight: Tensor, places: Tensor) -> None:
    """Look at the order of places where nobody has to wait for it.

    Raises:
        ValueError: they do not ascend within the weight.
    """
    if not _can_ask(places) or len(places) == 0:
        return
    # none is below 0: that would stand for another
    if places[-1] >= weight.numel() or (places[1:] <= places[:-1]).any():
        raise ValueError(
            f"{name}: index must ascend strictly from 0 at least to {weight.numel() - 1} at most. Sort it once, "
            "together with its values."
        )


def with_entries(weight: Tensor, values: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """A new weight, W + D, rounded once."""
    changed = weight.to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1)
    before = changed if weight.dtype == dtype else weight.flatten()
    wide = before.index_select(0, places).to(accumulator(weight)) + values
    return changed.scatter_(0, places.long(), wide.to(dtype)).view(weight.shape)


class Piece(NamedTuple):
    """Rows ``rows`` of a weight, and the entries in them that train."""

    rows: slice
    entries: slice | Tensor  # (n,) which of all they are, where how many there are is not known
    local: Tensor  # (m,), or (n,) then: their places in ``weight[rows].flatten()``; anywhere in it, for others

    def changed(self, weight: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """W + D, of these rows."""
        if isinstance(self.entries, slice):
            return with_entries(weight[self.rows], values[self.entries], self.local, dtype)
        wide = weight[self.rows].to(accumulator(weight), copy=True, memory_format=torch.contiguous_format)
        wide.view(-1).index_add_(0, self.local, torch.where(self.entries, values, 0).to(wide.dtype))
        return wide.to(dtype)

    def pick(self, gradient: Tensor, into: Tensor) -> None:
        """Put the entries of the gradient of these rows where they belong in ``into`` (n,)."""
        found = gradient.flatten().index_select(0, self.local).to(into.dtype)
        if isinstance(self.entries, slice):
            into[self.entries] = found
        else:
            into.copy_(torch.where(self.entries, found, into))


def pieces(weight: Tensor, places: Tensor, groups: int = 1) -> list[tuple[int, int]]:
    """First and last row (not included) of each piece: some whole groups, or a part of one."""
    of_group = len(weight) // groups
    rows = max(1, max(PIECE, len(places)) // weight.shape[1:].numel())
    block = max(of_group, rows // of_group * of_group)
    firsts = [row for start in range(0, len(weight), block) for row in range(start, start + block, min(rows, block))]
    firsts = [first for first in firsts if first < len(weight)]
    return list(zip(firsts, [*firsts[1:], len(weight)], strict=True))


def located(weight: Tensor, places: Tensor, parts: list[tuple[int, int]]) -> Iterator[Piece]:
    """These pieces, and what trains in them."""
    width = weight.shape[1:].numel()
    if _can_ask(places):
        firsts = torch.tensor([first * width for first, _ in parts], dtype=places.dtype, device=places.device)
        bounds = torch.searchsorted(places, firsts).tolist()
        for (first, last), start, end in zip(parts, bounds, [*bounds[1:], len(places)], strict=True):
            yield Piece(slice(first, last), slice(start, end), places[start:end] - first * width)
        return
    for first, last in parts:
        local = places - first * width
        there = (local >= 0) & (local < (last - first) * width)
        yield Piece(slice(first, last), there, local.where(there, 0))


@torch.library.custom_op("lightning_peft::linear_with_entries", mutates_args=())
def _entries(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    places = places_of(index)
    check_order("linear_with_entries", weight, places)
    return F.linear(x, with_entries(weight, values, places, x.dtype), bias).contiguous()


@torch.library.custom_op("lightning_peft::linear_with_columns", mutates_args=())
def _columns(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    y = F.linear(x, weight.to(x.dtype), bias)
    return y.addmm_(x.index_select(1, index), values.to(x.dtype).T).contiguous()


@torch.library.custom_op("lightning_peft::linear_with_rows", mutates_args=())
def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias).index_add_(1, index, x @ values.to(x.dtype).T).contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# the gradients; x is None if the values are frozen, and of the columns alone where they train
@torch.library.custom_op("lightning_peft::linear_with_entries_backward", mutates_args=())
def _entries_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    places = places_of(index)
    if runs_triton(dy):
        dx = (dy @ with_entries(weight, values, places, dy.dtype)).contiguous() if x_trains else dy.new_empty(0)
        return dx, values.new_empty(0) if x is None else _launch(dy, x, places.long()).to(values.dtype)
    dvalues, few = values.new_empty(0 if x is None else values.shape), FEW * len(places) < weight.numel()
    if x is not None and few:
        dvalues = _each(dy, x, places).to(values.dtype)
    parts = pieces(weight, places)
    dx = dy.new_zeros((len(dy), weight.shape[1]) if x_trains else 0, dtype=wide_enough(dy, parts))
    for piece in located(weight, places, parts):
        rows = dy[:, piece.rows]
        if x_trains:
            dx += rows @ piece.changed(weight, values, dy.dtype)
        if x is not None and not few:
            piece.pick(rows.T @ x, dvalues)
    return dx.to(dy.dtype), dvalues


def wide_enough(dy: Tensor, parts: list[Any]) -> torch.dtype:
    """The precision in which a gradient is added up over pieces."""
    return accumulator(dy) if len(parts) > 1 else dy.dtype


def _each(dy: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """The gradients of the values, one product of a row and a column each."""
    T, K = x.shape
    # turned, so that what is multiplied lies side by side
    dy_turned, x_turned = (each.to(accumulator(each)).T.contiguous() for each in (dy, x))
    sums = [
        (dy_turned.index_select(0, part // K) * x_turned.index_select(0, part % K)).sum(1)
        for part in places.split(max(1, ELEMENTS // max(T, 1)))
    ]
    return torch.cat(sums)


@torch.library.custom_op("lightning_peft::linear_with_columns_backward", mutates_args=())
def _columns_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(0)
    if x_trains:
        dx = (dy @ weight.to(dy.dtype)).contiguous().index_add_(1, index, dy @ values.to(dy.dtype))
    return dx, values.new_empty(0) if x is None else (dy.T @ x).to(values.dtype).contiguous()


@torch.library.custom_op("lightning_peft::linear_with_rows_backward", mutates_args=())
def _rows_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, values: Tensor, index: Tensor, x_trains: bool
) -> tuple[Tensor, Tensor]:
    chosen = dy.index_select(1, index)
    dx = dy.new_empty(0)
    if x_trains:
        dx = (dy @ weight.to(dy.dtype)).addmm_(chosen, values.to(dy.dtype)).contiguous()
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
