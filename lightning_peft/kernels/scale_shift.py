"""Scale and shift of features: y = scale x + shift over the last dimension (SSF; without shift IA3, DiffFit's gamma).

Backward:  dx = scale dy,  dscale = sum over rows of dy x,  dshift = sum over rows of dy,  in one pass. The sums are
made in a fixed order: partial sums of some rows each, then of those. Saves x only if the scale trains.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, runs_triton

PROGRAMS = 512  # enough for every core, where each leaves partial sums


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """scale * x + shift, in float32 and rounded once; a scale of one and a shift of zero change no bit.

    Args:
        x: (..., C).
        scale: (C,), of any precision.
        shift: (C,), or None for zeros.

    Returns:
        (..., C) in the dtype of ``x``.

    Raises:
        ValueError: ``scale`` or ``shift`` does not fit.
    """
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(
                f"scale_shift: {name} must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(vector.shape)}. "
                "Channels come last: movedim(1, -1) of (B, C, H, W)."
            )
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _forward(rows, scale, shift).view(x.shape)


@torch.library.custom_op("lightning_peft::scale_shift", mutates_args=())
def _forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    if runs_triton(x):
        return _launch_forward(x, scale, shift)
    y = x.to(accumulator(x)) * scale.to(accumulator(x))
    if shift is not None:
        y += shift.to(y.dtype)
    return y.to(x.dtype).contiguous()


@_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lightning_peft::scale_shift_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor | None, scale: Tensor, x_trains: bool, scale_trains: bool, shift_trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(dy):
        return _launch_backward(dy, x, scale, x_trains, scale_trains, shift_trains)
    return _gradients(dy, x, scale, x_trains, scale_trains, shift_trains)


def _gradients(
    dy: Tensor, x: Tensor | None, scale: Tensor, x_trains: bool, scale_trains: bool, shift_trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = dy.to(accumulator(dy))
    dx = (wide * scale.to(wide.dtype)).to(dy.dtype).contiguous() if x_trains else dy.new_empty(0)
    dscale = wide.new_empty(0) if x is None or not scale_trains else (wide * x).sum(0)
    return dx, dscale, wide.sum(0) if shift_trains else wide.new_empty(0)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, scale: Tensor, x_trains: bool, scale_trains: bool, shift_trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dscale, dshift = (
        dy.new_empty(dy.shape[1] if trains else 0, dtype=accumulator(dy)) for trains in (scale_trains, shift_trains)
    )
    return dy.new_empty(dy.shape if x_trains else 0), dscale, dshift


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift = inputs
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, scale = ctx.saved_tensors
    trains = ctx.needs_input_grad
    # with a graph of it, by plain operations
    compute = _gradients if torch.is_grad_enabled() else _backward
    dx, dscale, dshift = compute(dy, x, scale, *trains)
    return (
        dx if trains[0] else None,
        dscale.to(scale.dtype) if trains[1] else None,
        dshift.to(ctx.shift_dtype) if trains[2] else None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _scale_shift_forward(
        x_ptr, scale_ptr, shift_ptr, y_ptr, T, C, column_blocks,
        HAS_SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)  # before the first product: rows * C can exceed 32 bits
        rows = ((program // column_blocks) * ROWS + tl.arange(0, ROWS))[:, None]
        columns = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)[None]
        inside = (rows < T) & (columns < C)
        x = tl.load(x_ptr + rows * C + columns, mask=inside, other=0.0).to(tl.float32)
        y = x * tl.load(scale_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            y += tl.load(shift_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + rows * C + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _scale_shift_backward(
        dy_ptr, x_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr, T, C, column_blocks,
        X_TRAINS: tl.constexpr, SCALE_TRAINS: tl.constexpr, SHIFT_TRAINS: tl.constexpr,
        STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # each program owns some columns of STEPS * ROWS rows, and leaves one partial sum for each column
        program = tl.program_id(0).to(tl.int64)
        chunk = program // column_blocks
        columns = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)[None]
        scale = tl.load(scale_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
        dscale, dshift = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for step in range(STEPS):
            rows = ((chunk * STEPS + step) * ROWS + tl.arange(0, ROWS))[:, None]
            inside = (rows < T) & (columns < C)
            dy = tl.load(dy_ptr + rows * C + columns, mask=inside, other=0.0).to(tl.float32)
            if X_TRAINS:
                tl.store(dx_ptr + rows * C + columns, (dy * scale).to(dx_ptr.dtype.element_ty), mask=inside)
            if SCALE_TRAINS:
                dscale += dy * tl.load(x_ptr + rows * C + columns, mask=inside, other=0.0).to(tl.float32)
            if SHIFT_TRAINS:
                dshift += dy
        if SCALE_TRAINS:
            tl.store(dscale_ptr + chunk * C + columns, tl.sum(dscale, 0, keep_dims=True), mask=columns < C)
        if SHIFT_TRAINS:
            tl.store(dshift_ptr + chunk * C + columns, tl.sum(dshift, 0, keep_dims=True), mask=columns < C)

    def _tile(C: int) -> dict[str, int]:
        """4096 numbers, as wide as the rows if they are short."""
        block = min(triton.next_power_of_2(max(C, 1)), 1024)
        return {"ROWS": 4096 // block, "BLOCK": block, "num_warps": 8}

    def _launch_forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        x, scale = x.contiguous(), scale.contiguous()
        T, C = x.shape
        y, tile = torch.empty_like(x), _tile(C)
        if x.numel():
            column_blocks = triton.cdiv(C, tile["BLOCK"])
            with torch.cuda.device_of(x):
                _scale_shift_forward[(triton.cdiv(T, tile["ROWS"]) * column_blocks,)](
                    x, scale, x if shift is None else shift.contiguous(), y, T, C, column_blocks,
                    HAS_SHIFT=shift is not None, **tile, **OPTIONS,
                )  # fmt: skip
        return y

    def _launch_backward(
        dy: Tensor, x: Tensor | None, scale: Tensor, x_trains: bool, scale_trains: bool, shift_trains: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, scale = dy.contiguous(), scale.contiguous()
        T, C = dy.shape
        tile = _tile(C)
        column_blocks, row_blocks = triton.cdiv(C, tile["BLOCK"]), triton.cdiv(T, tile["ROWS"])
        sums = scale_trains or shift_trains
        steps = min(64, triton.next_power_of_2(triton.cdiv(row_blocks * column_blocks, PROGRAMS))) if sums else 1
        chunks = triton.cdiv(row_blocks, max(steps, 1))
        dx = dy.new_empty(dy.shape if x_trains else 0)
        dscale, dshift = (
            dy.new_empty((chunks, C) if trains else 0, dtype=torch.float32) for trains in (scale_trains, shift_trains)
        )
        if dy.numel():
            with torch.cuda.device_of(dy):
                _scale_shift_backward[(chunks * column_blocks,)](
                    dy, dy if x is None else x.contiguous(), scale, dx, dscale, dshift, T, C, column_blocks,
                    X_TRAINS=x_trains, SCALE_TRAINS=scale_trains, SHIFT_TRAINS=shift_trains, STEPS=steps, **tile,
                    **OPTIONS,
                )  # fmt: skip
        return dx, dscale.sum(0) if scale_trains else dscale, dshift.sum(0) if shift_trains else dshift

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, types, {**constants, "ROWS": 4096 // block, "BLOCK": block}, {"num_warps": 8})
        for block in (1024, 64)
        for dtype, vector in (("*bf16", "*bf16"), ("*bf16", "*fp32"), ("*fp32", "*fp32"))
        for kernel, types, constants in (
            (_scale_shift_forward, [dtype, vector, vector, dtype, *["i32"] * 3], {"HAS_SHIFT": True}),
            (
                _scale_shift_backward,
                [dtype, dtype, vector, dtype, "*fp32", "*fp32", *["i32"] * 3],
                {"X_TRAINS": True, "SCALE_TRAINS": True, "SHIFT_TRAINS": True, "STEPS": 32},
            ),
        )
    ]
