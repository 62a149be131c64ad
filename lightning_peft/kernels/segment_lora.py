"""Low-rank updates of many adapters in one batch: y_t = s_i B_i A_i x_t, where i is the adapter of token t.

Tokens are sorted by adapter once, so that each adapter has one segment of them. With h_t = s_i A_i x_t:
y_t = B_i h_t. Backward, with z_t = s_i B_i^T dy_t:  dx_t = A_i^T z_t,  dA_i = sum over its segment of z_t x_t^T,
dB_i = sum over its segment of dy_t h_t^T, in a fixed order. Beside x, or what it is made from (`recipes`), and the
order of the tokens, h (T, r) is saved.

Kernels are launched for as many blocks of tokens as there may be, and find theirs in a table that the accelerator made
itself: nobody waits for it. The twin reads on the CPU where segments begin.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, refuse_second, runs_triton
from lightning_peft.kernels.recipes import keep, kept

TOKENS = 32  # of one segment, that a program works on at a time


def segment_lora(x: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor, scaling: float | Tensor) -> Tensor:
    """The low-rank update of each token by the adapter of its own; the caller adds it to the output of the base.

    Args:
        x: (..., K), in any precision.
        lora_A: (n, r, K), the factors of n adapters; those of a smaller rank are filled up with zeros.
        lora_B: (n, N, r), likewise.
        index: (...) int64, the adapter of each token, from 0 to n - 1; -1 for none, whose update is 0.
        scaling: factor of the updates, a number or (n,). A constant for autograd.

    Returns:
        (..., N) in the dtype of the factors, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, ``scaling`` requires a gradient, or ``index`` is out of range. The last
            is seen on the CPU; an accelerator, which is not waited for, gives NaN as the update of such a token, and as
            the gradient of its ``x``.
    """
    _check(x, lora_A, lora_B, index, scaling)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    n, factor = len(lora_A), scaling
    if not isinstance(factor, Tensor):
        factor = torch.full((n,), factor, dtype=accumulator(lora_A), device=x.device)
    return _forward(x, lora_A, lora_B, factor.expand(n), *_plan(index, n))[0]


def _check(x: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor, scaling: float | Tensor) -> None:
    fits = lora_A.dim() == lora_B.dim() == 3 and x.shape[-1:] == lora_A.shape[2:]
    if not fits or lora_A.shape[:2] != (lora_B.shape[0], lora_B.shape[2]):
        raise ValueError(
            f"segment_lora: x must be (..., K), lora_A (n, r, K) and lora_B (n, N, r), got {tuple(x.shape)}, "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}. Fill smaller ranks up with zeros to stack them."
        )
    if lora_A.dtype != lora_B.dtype or not (lora_A.is_floating_point() and x.is_floating_point()):
        raise ValueError(
            "segment_lora: lora_A and lora_B must have one floating dtype, and x a floating one, got "
            f"{lora_A.dtype}, {lora_B.dtype} and {x.dtype}. Cast the odd one."
        )
    n = len(lora_A)
    if index.shape != x.shape[:-1] or index.dtype != torch.int64:
        raise ValueError(
            f"segment_lora: index must be {tuple(x.shape[:-1])} int64, an adapter for each token of x, got "
            f"{tuple(index.shape)} {index.dtype}. From one for each sample: index[:, None].expand(B, T)."
        )
    if isinstance(scaling, Tensor) and scaling.shape not in ((), (n,)):
        raise ValueError(f"segment_lora: scaling must be a number or ({n},), got {tuple(scaling.shape)}.")
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise ValueError(
            "segment_lora: scaling gets no gradient, but requires one. Pass scaling.detach(), or "
            "scaling[:, None, None] * lora_B with a scaling of 1."
        )
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= n:
            raise ValueError(
                f"segment_lora: index must be from 0 to {n - 1} for {n} adapters, or -1 for none, got {low} to {high}."
            )


def _plan(index: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in the order of their segments; where segments begin and the last ends; and blocks of tokens.

    There are n + 2 segments: behind those of the adapters follow tokens without one, and those of a wrong index. A
    block is (segment, first, end); those that turn out not to be needed are empty.
    """
    nobody = torch.where(index == -1, n, n + 1)
    ordered, order = torch.where((index >= 0) & (index < n), index, nobody).flatten().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(n + 3, device=index.device))
    counts = (bounds.diff() + (TOKENS - 1)) // TOKENS
    total = counts.cumsum(0)
    block = torch.arange(len(order) // TOKENS + min(len(order), n + 2), device=index.device)
    segment = torch.searchsorted(total, block, right=True).clamp(max=n + 1)
    first = bounds[segment] + (block - (total - counts)[segment]) * TOKENS
    return order, bounds, torch.stack([segment, first, bounds[segment + 1]], 1)


# order, bounds and blocks are those of _plan
@torch.library.custom_op("lightning_peft::segment_lora", mutates_args=())
def _forward(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """y, and h in the order of the segments."""
    shrink, expand, _ = _steps(lora_A)
    T, N = len(order), lora_B.shape[1]
    h = shrink(x.reshape(T, x.shape[-1]), lora_A, scaling, order, bounds, blocks)
    y = h.new_empty(*x.shape[:-1], N)
    expand(h, lora_B.mT, order, bounds, blocks, y.view(T, N))
    return y, h


@_forward.register_fake
def _(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    return lora_A.new_empty(*x.shape[:-1], lora_B.shape[1]), lora_A.new_empty(order.shape[0], lora_A.shape[1])


@torch.library.custom_op("lightning_peft::segment_lora_backward", mutates_args=())
def _backward(
    dy: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor,
    h: Tensor, x: Tensor | None, x_dtype: torch.dtype, x_trains: bool, B_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, lora_A and lora_B, empty for what is frozen; x is None if lora_A is."""
    shrink, expand, outer = _steps(lora_A)
    T, K = len(order), lora_A.shape[2]
    rows = dy.reshape(T, dy.shape[-1])
    dx = dy.new_empty((*dy.shape[:-1], K) if x_trains else 0, dtype=x_dtype)
    dA, dB = lora_A.new_empty(0 if x is None else lora_A.shape), lora_B.new_empty(lora_B.shape if B_trains else 0)
    if x_trains or x is not None:
        z = shrink(rows, lora_B.mT, scaling, order, bounds, blocks)
        if x_trains:
            expand(z, lora_A, order, bounds, blocks, dx.view(T, K))
        if x is not None:
            outer(z, x.reshape(T, K), order, bounds, dA)
    if B_trains:
        outer(h, rows, order, bounds, dB.mT)
    return dx, dA, dB


@_backward.register_fake
def _(
    dy: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor,
    h: Tensor, x: Tensor | None, x_dtype: torch.dtype, x_trains: bool, B_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], lora_A.shape[2]) if x_trains else 0, dtype=x_dtype)
    dA = lora_A.new_empty(0 if x is None else lora_A.shape)
    return dx, dA, lora_B.new_empty(lora_B.shape if B_trains else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *others = inputs
    ctx.x_dtype = x.dtype
    ctx.mark_non_differentiable(output[1])
    keep(ctx, x if ctx.needs_input_grad[1] else None, *others, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:3]
    refuse_second("segment_lora")
    gradients = _backward(dy, *kept(ctx), ctx.x_dtype, wanted[0], wanted[2])
    return *(each if trains else None for each, trains in zip(gradients, wanted, strict=True)), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _steps(lora_A: Tensor) -> tuple[Any, Any, Any]:
    """Shrink, expand and outer: kernels or twins. A factor is (n, r, C) for all of them, however it lies in memory."""
    if runs_triton(lora_A):
        return _launch_shrink, _launch_expand, _launch_outer
    return _shrink, _expand, _outer


def _segments(bounds: Tensor) -> list[tuple[int, slice]]:
    """(segment, its part of the order) of those that have tokens."""
    return [(i, slice(*ends)) for i, ends in enumerate(pairwise(bounds.tolist())) if ends[0] < ends[1]]


def _shrink(x: Tensor, factor: Tensor, scaling: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor) -> Tensor:
    """x (T, C) to (T, r), in the order of the segments; 0 for tokens without an adapter."""
    h = factor.new_zeros(len(order), factor.shape[1])
    for i, part in _segments(bounds[:-2]):
        h[part] = scaling[i] * (x[order[part]].to(h.dtype) @ factor[i].T)
    return h


def _expand(h: Tensor, factor: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor, out: Tensor) -> None:
    """h (T, r) to (T, C), in the order of the tokens; 0 for tokens without an adapter, NaN for a wrong one."""
    out.zero_()
    for i, part in _segments(bounds[:-2]):
        out[order[part]] = (h[part] @ factor[i]).to(out.dtype)
    out[order[bounds[-2] :]] = torch.nan


def _outer(h: Tensor, x: Tensor, order: Tensor, bounds: Tensor, out: Tensor) -> None:
    """h^T x (n, r, C), segment by segment; 0 for adapters without a token."""
    out.zero_()
    for i, part in _segments(bounds[:-2]):
        out[i] = h[part].T @ x[order[part]].to(h.dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def factor_offsets(adapter, ranks, columns, C, RANK: tl.constexpr, RANK_LAST: tl.constexpr):
        """In the factor of one adapter: (C, RANK) in memory if the rank is last, else (RANK, C)."""
        return (adapter * C + columns) * RANK + ranks if RANK_LAST else (adapter * RANK + ranks) * C + columns

    @triton.jit
    def _segment_shrink(
        x_ptr, w_ptr, scaling_ptr, order_ptr, blocks_ptr, h_ptr, n, C,
        RANK: tl.constexpr, RANK_LAST: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        block = blocks_ptr + tl.program_id(0) * 3
        # int64, as all that is multiplied by them below
        segment, first, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
        if first < end:
            places = (first + tl.arange(0, TOKENS))[:, None]
            ranks = (tl.program_id(1) * R + tl.arange(0, R))[None]
            h = tl.zeros((TOKENS, R), tl.float32)
            if segment < n:
                tokens = tl.load(order_ptr + places, mask=places < end, other=0)
                for start in range(0, C, BLOCK_C):
                    columns = start + tl.arange(0, BLOCK_C)
                    inside = (places < end) & (columns[None] < C)
                    x = tl.load(x_ptr + tokens * C + columns[None], mask=inside, other=0.0)
                    at = factor_offsets(segment, ranks, columns[:, None], C, RANK, RANK_LAST)
                    w = tl.load(w_ptr + at, mask=(ranks < RANK) & (columns[:, None] < C), other=0.0)
                    h = tl.dot(x.to(w.dtype), w, h, input_precision="ieee")
                h *= tl.load(scaling_ptr + segment).to(tl.float32)
            inside = (places < end) & (ranks < RANK)
            tl.store(h_ptr + places * RANK + ranks, h.to(h_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _segment_expand(
        h_ptr, w_ptr, order_ptr, blocks_ptr, y_ptr, n, C,
        RANK: tl.constexpr, RANK_LAST: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        block = blocks_ptr + tl.program_id(0) * 3
        segment, first, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
        if first < end:
            places = (first + tl.arange(0, TOKENS))[:, None]
            columns = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None]
            y = tl.zeros((TOKENS, BLOCK_C), tl.float32)
            if segment < n:
                for start in range(0, RANK, R):
                    ranks = start + tl.arange(0, R)
                    inside = (places < end) & (ranks[None] < RANK)
                    h = tl.load(h_ptr + places * RANK + ranks[None], mask=inside, other=0.0)
                    at = factor_offsets(segment, ranks[:, None], columns, C, RANK, RANK_LAST)
                    w = tl.load(w_ptr + at, mask=(ranks[:, None] < RANK) & (columns < C), other=0.0)
                    y = tl.dot(h, w, y, input_precision="ieee")
            if segment > n:
                y += float("nan")
            tokens = tl.load(order_ptr + places, mask=places < end, other=0)
            inside = (places < end) & (columns < C)
            tl.store(y_ptr + tokens * C + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _segment_outer(
        h_ptr, x_ptr, order_ptr, bounds_ptr, out_ptr, C, column_blocks,
        RANK: tl.constexpr, RANK_LAST: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        adapter = tl.program_id(0).to(tl.int64)  # before the first product: n * r * C can exceed 32 bits
        ranks = (tl.program_id(1) // column_blocks) * R + tl.arange(0, R)
        columns = (tl.program_id(1) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        first, end = tl.load(bounds_ptr + adapter), tl.load(bounds_ptr + adapter + 1)
        out = tl.zeros((R, BLOCK_C), tl.float32)
        for start in range(first, end, TOKENS):
            places = (start + tl.arange(0, TOKENS))[:, None]
            tokens = tl.load(order_ptr + places, mask=places < end, other=0)
            h = tl.load(h_ptr + places * RANK + ranks[None], mask=(places < end) & (ranks[None] < RANK), other=0.0)
            x = tl.load(x_ptr + tokens * C + columns[None], mask=(places < end) & (columns[None] < C), other=0.0)
            out = tl.dot(tl.trans(h), x.to(h.dtype), out, input_precision="ieee")
        at = factor_offsets(adapter, ranks[:, None], columns[None], C, RANK, RANK_LAST)
        inside = (ranks[:, None] < RANK) & (columns[None] < C)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)

    def _tile(dtype: torch.dtype, r: int, block: int) -> dict[str, int]:
        """Ranks and columns at a time, as many as fit into registers; products in float32 need more of them."""
        R = triton.next_power_of_2(max(r, 16))
        if dtype == torch.float32:
            return {"RANK": r, "TOKENS": TOKENS, "R": min(R, 32), "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}
        return {"RANK": r, "TOKENS": TOKENS, "R": min(R, 64), "BLOCK_C": block, "num_warps": 4, "num_stages": 3}

    def _stored(factor: Tensor) -> tuple[Tensor, bool]:
        """A factor (n, r, C) without gaps, and whether the rank is last in memory."""
        rank_last = factor.mT.is_contiguous()
        return factor if rank_last else factor.contiguous(), rank_last

    def _launch_shrink(
        x: Tensor, factor: Tensor, scaling: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor
    ) -> Tensor:
        x, (factor, rank_last), scaling = x.contiguous(), _stored(factor), scaling.contiguous()
        n, r, C = factor.shape
        h, tile = factor.new_empty(len(order), r), _tile(factor.dtype, r, 128)
        if h.numel():
            with torch.cuda.device_of(x):
                _segment_shrink[(len(blocks), triton.cdiv(r, tile["R"]))](
                    x, factor, scaling, order, blocks, h, n, C, RANK_LAST=rank_last, **tile, **OPTIONS
                )
        return h

    def _launch_expand(h: Tensor, factor: Tensor, order: Tensor, bounds: Tensor, blocks: Tensor, out: Tensor) -> None:
        factor, rank_last = _stored(factor)
        n, r, C = factor.shape
        tile = _tile(h.dtype, r, 128)
        if out.numel():
            with torch.cuda.device_of(h):
                _segment_expand[(len(blocks), triton.cdiv(C, tile["BLOCK_C"]))](
                    h, factor, order, blocks, out, n, C, RANK_LAST=rank_last, **tile, **OPTIONS
                )

    def _launch_outer(h: Tensor, x: Tensor, order: Tensor, bounds: Tensor, out: Tensor) -> None:
        x, (n, r, C) = x.contiguous(), out.shape
        tile = _tile(h.dtype, r, 64)
        if out.numel():
            column_blocks = triton.cdiv(C, tile["BLOCK_C"])
            with torch.cuda.device_of(h):
                _segment_outer[(n, column_blocks * triton.cdiv(r, tile["R"]))](
                    h, x, order, bounds, out, C, column_blocks, RANK_LAST=not out.is_contiguous(), **tile, **OPTIONS
                )

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (
            kernel,
            types,
            {key: value for key, value in tile.items() if key.isupper()} | {"RANK_LAST": rank_last},
            {key: value for key, value in tile.items() if key.islower()},
        )
        for x, w, dtype in (
            ("*bf16", "*bf16", torch.bfloat16),
            ("*bf16", "*fp32", torch.float32),
            ("*fp32", "*fp32", torch.float32),
        )
        for r, rank_last in ((8, False), (24, True), (64, False), (64, True))
        for kernel, types, tile in (
            (_segment_shrink, [x, w, "*fp32", "*i64", "*i64", w, "i32", "i32"], _tile(dtype, r, 128)),
            (_segment_expand, [w, w, "*i64", "*i64", x, "i32", "i32"], _tile(dtype, r, 128)),
            (_segment_outer, [w, x, "*i64", "*i64", w, "i32", "i32"], _tile(dtype, r, 64)),
        )
    ]
