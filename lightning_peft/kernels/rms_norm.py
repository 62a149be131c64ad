"""RMSNorm: y = x rho (offset + w),  rho = (mean x^2 + eps)^(-1/2) over the last dimension.

Backward: with xhat = x rho and m = dy (offset + w):  dx = rho (m - xhat mean(m xhat)),  dw = sum over rows of dy xhat.
Saves x, which the neighbours hold anyway, and rho in float32; dw is not computed for a frozen weight.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.backend import (
    HAS_TRITON,
    OPTIONS,
    accumulator,
    eager,
    refuse_second,
    runs_eagerly,
    runs_triton,
)
from lightning_peft.kernels.recipes import leave


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """Root mean square normalisation of the last dimension, accumulated in float32.

    Args:
        x: (..., C).
        weight: (C,), or None for ones.
        eps: added to the mean square.
        offset: added to the weight (1 in Gemma).

    Returns:
        (..., C) in the dtype of ``x``.

    Raises:
        ValueError: ``weight`` does not fit.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(weight.shape)}."
        )
    y, rho = (_eager if runs_eagerly(x) else _forward)(x, weight, eps, offset)
    return leave(y, functools.partial(_again, offset), x, weight, rho)


def _again(offset: float, x: Tensor, weight: Tensor | None, rho: Tensor) -> Tensor:
    y = x * rho[..., None]
    return (y if weight is None else y.mul_(offset + weight.to(y.dtype))).to(x.dtype)


@torch.library.custom_op("lightning_peft::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        return _launch_forward(x, weight, eps, offset)
    return _twin(x, weight, eps, offset)


def _twin(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=accumulator(x))  # in one pass, without x^2 in memory
    rho = (norm.square_() / x.shape[-1] + eps).rsqrt_()
    return _again(offset, x, weight, rho).contiguous(), rho


@_forward.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulator(x))


@torch.library.custom_op("lightning_peft::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rho: Tensor, offset: float, weight_trains: bool
) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        return _launch_backward(dy, x, weight, rho, offset, weight_trains)
    return _twin_backward(dy, x, weight, rho, offset, weight_trains)


def _twin_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rho: Tensor, offset: float, weight_trains: bool
) -> tuple[Tensor, Tensor]:
    m, wide, rho = dy.to(rho.dtype), x.to(rho.dtype), rho[..., None]
    dw = (m * wide).mul_(rho).flatten(0, -2).sum(0) if weight_trains else rho.new_empty(0)
    if weight is not None:
        m = m * (offset + weight.to(m.dtype))
    share = (m * wide).mean(-1, keepdim=True) * rho * rho.square()  # in this order: rho^3 could overflow
    dx = (m * rho).addcmul_(wide, share, value=-1)
    return dx.to(x.dtype).contiguous(), dw


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, rho: Tensor, offset: float, weight_trains: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), rho.new_empty(x.shape[-1] if weight_trains else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    refuse_second("rms_norm")
    x, weight, rho = ctx.saved_tensors
    weight_trains = weight is not None and ctx.needs_input_grad[1]
    backward = _twin_backward if runs_eagerly(x) else _backward
    dx, dw = backward(dy, x, weight, rho, ctx.offset, weight_trains)
    return dx, dw.to(weight.dtype) if weight_trains else None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
_eager = eager(_twin, _setup, _differentiate)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _rms_norm_forward(
        x_ptr, w_ptr, y_ptr, rho_ptr, C, eps, offset,
        HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # before the first product: rows * C can exceed 32 bits
        total = tl.zeros((BLOCK,), tl.float32)
        for block in tl.static_range(N_BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
            total += x * x
        rho = tl.rsqrt(tl.sum(total) / C + tl.cast(eps, tl.float32))
        tl.store(rho_ptr + row, rho)
        for block in tl.static_range(N_BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            inside = columns < C
            y = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32) * rho
            if HAS_WEIGHT:
                w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                y = y * (w + tl.cast(offset, tl.float32))
            tl.store(y_ptr + row * C + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _rms_norm_backward(
        dy_ptr, x_ptr, w_ptr, rho_ptr, dx_ptr, dw_ptr, T, C, offset,
        HAS_WEIGHT: tl.constexpr, WEIGHT_TRAINS: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        # each program owns ROWS rows, so that dw is added up in a fixed order
        program = tl.program_id(0).to(tl.int64)
        for i in range(ROWS):
            row = program * ROWS + i
            if row < T:
                rho = tl.load(rho_ptr + row)
                total = tl.zeros((BLOCK,), tl.float32)
                for block in tl.static_range(N_BLOCKS):
                    columns = block * BLOCK + tl.arange(0, BLOCK)
                    inside = columns < C
                    m = tl.load(dy_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                    xhat = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32) * rho
                    if WEIGHT_TRAINS:
                        dw = tl.load(dw_ptr + program * C + columns, mask=inside, other=0.0)
                        tl.store(dw_ptr + program * C + columns, dw + m * xhat, mask=inside)
                    if HAS_WEIGHT:
                        w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                        m = m * (w + tl.cast(offset, tl.float32))
                    total += m * xhat
                mean = tl.sum(total) / C
                for block in tl.static_range(N_BLOCKS):
                    columns = block * BLOCK + tl.arange(0, BLOCK)
                    inside = columns < C
                    m = tl.load(dy_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                    xhat = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32) * rho
                    if HAS_WEIGHT:
                        w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                        m = m * (w + tl.cast(offset, tl.float32))
                    dx = rho * (m - xhat * mean)
                    tl.store(dx_ptr + row * C + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    def _blocks(C: int) -> dict[str, int]:
        block = min(triton.next_power_of_2(max(C, 1)), 4096)
        return {"BLOCK": block, "N_BLOCKS": triton.cdiv(C, block), "num_warps": max(1, min(8, block // 512))}

    def _launch_forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        C = x.shape[-1]
        y, rho = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
        if x.numel():
            x = x.contiguous()
            w = x if weight is None else weight.contiguous()
            with torch.cuda.device_of(x):
                _rms_norm_forward[(rho.numel(),)](
                    x, w, y, rho, C, eps, offset, HAS_WEIGHT=weight is not None, **_blocks(C), **OPTIONS
                )  # fmt: skip
        return y, rho

    def _launch_backward(
        dy: Tensor, x: Tensor, weight: Tensor | None, rho: Tensor, offset: float, weight_trains: bool
    ) -> tuple[Tensor, Tensor]:
        T, C = rho.numel(), x.shape[-1]
        rows = 32 if weight_trains else 1
        programs = triton.cdiv(T, rows)
        dx, dw = x.new_empty(x.shape), x.new_zeros(programs if weight_trains else 0, C, dtype=torch.float32)
        if x.numel():
            dy, x = dy.contiguous(), x.contiguous()
            w = x if weight is None else weight.contiguous()
            with torch.cuda.device_of(x):
                _rms_norm_backward[(programs,)](
                    dy, x, w, rho, dx, dw, T, C, offset, HAS_WEIGHT=weight is not None, WEIGHT_TRAINS=weight_trains,
                    ROWS=rows, **_blocks(C), **OPTIONS,
                )  # fmt: skip
        return dx, dw.sum(0) if weight_trains else rho.new_empty(0)

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, types, {**constants, "BLOCK": 4096, "N_BLOCKS": n}, {"num_warps": 8})
        for n in (1, 4)
        for dtype in ("*bf16", "*fp32")
        for kernel, types, constants in (
            (
                _rms_norm_forward,
                [dtype, dtype, dtype, "*fp32", "i32", "fp32", "fp32"],
                {"HAS_WEIGHT": True},
            ),
            (
                _rms_norm_backward,
                [dtype, dtype, dtype, "*fp32", dtype, "*fp32", "i32", "i32", "fp32"],
                {"HAS_WEIGHT": True, "WEIGHT_TRAINS": True, "ROWS": 32},
            ),
        )
    ]
