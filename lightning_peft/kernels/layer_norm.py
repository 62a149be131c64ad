"""LayerNorm: y = xhat (offset + w) + b,  xhat = (x - mu) rho,  rho = (mean (x - mu)^2 + eps)^(-1/2), over the last dim.

Modulated, as diffusion transformers have it (adaLN), w and b are the scale and the shift of a sample, and offset is 1.
Backward: with m = dy (offset + w):  dx = rho (m - mean m - xhat mean(m xhat)),  dw = sum over rows of dy xhat,
db = sum over rows of dy. Saves x, which the neighbours hold anyway, and mu and rho in float32. What is frozen gets no
gradient computed: for frozen w and b that leaves dx alone, for a frozen x dw and db.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, refuse_second, runs_triton
from lightning_peft.kernels.recipes import leave

PROGRAMS = 512  # enough for every core, where each leaves a partial sum


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalisation of the last dimension to mean 0 and variance 1, accumulated in float32.

    Args:
        x: (..., C).
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        eps: added to the variance.

    Returns:
        (..., C) in the dtype of ``x``.

    Raises:
        ValueError: ``weight`` or ``bias`` does not fit.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name} must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(vector.shape)}. "
                "Other dimensions than the last are not normalised: flatten them first."
            )
    rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    w, b = (None if vector is None else vector[None] for vector in (weight, bias))
    y, mu, rho = _forward(rows, w, b, eps, 0.0)
    return leave(y.view(x.shape), _again, x, weight, bias, mu, rho)


def _again(x: Tensor, weight: Tensor | None, bias: Tensor | None, mu: Tensor, rho: Tensor) -> Tensor:
    y = (x.to(rho.dtype) - mu.view(*x.shape[:-1], 1)) * rho.view(*x.shape[:-1], 1)
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then y = xhat (1 + scale) + shift with a scale and a shift for each sample.

    Args:
        x: (B, ..., C).
        scale: (B, C).
        shift: (B, C).
        eps: added to the variance.

    Returns:
        (B, ..., C) in the dtype of ``x``.

    Raises:
        ValueError: ``x`` has no samples, or ``scale`` or ``shift`` does not fit.
    """
    if x.dim() < 2:
        raise ValueError(f"modulated_layer_norm: x must be (B, ..., C), got {tuple(x.shape)}. For one sample: x[None].")
    wanted = (x.shape[0], x.shape[-1])
    for name, each in (("scale", scale), ("shift", shift)):
        if each.shape != wanted:
            raise ValueError(
                f"modulated_layer_norm: {name} must be {wanted} for x {tuple(x.shape)}, got {tuple(each.shape)}. "
                "Squeeze or expand it to one vector per sample."
            )
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return _forward(rows, scale, shift, eps, 1.0)[0].view(x.shape)


# groups of rows that share a weight and a bias: x (G, T, C), weight and bias (G, C), mu and rho (G, T)
@torch.library.custom_op("lightning_peft::layer_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(x):
        return _launch_forward(x, weight, bias, eps, offset)
    wide = x.to(accumulator(x))
    first = wide.mean(-1, keepdim=True)  # torch's own sums cancel where the mean is large, forward and backward
    y, rest, rho = torch.native_layer_norm(wide - first, x.shape[-1:], None, None, eps)
    mu = first + rest
    if weight is not None:
        y *= offset + weight.to(y.dtype)[:, None]
    if bias is not None:
        y += bias.to(y.dtype)[:, None]
    return y.to(x.dtype).contiguous(), mu.squeeze(-1), rho.squeeze(-1)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    mu = x.new_empty(x.shape[:2], dtype=accumulator(x))
    return x.new_empty(x.shape), mu, torch.empty_like(mu)


@torch.library.custom_op("lightning_peft::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    offset: float,
    x_trains: bool,
    weight_trains: bool,
    bias_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(x):
        return _launch_backward(dy, x, weight, mu, rho, offset, x_trains, weight_trains, bias_trains)
    m, mu, rho = dy.to(rho.dtype), mu[..., None], rho[..., None]
    centred = x.to(rho.dtype) - mu
    dw = (m * centred * rho).sum(1) if weight_trains else rho.new_empty(0)
    db = m.sum(1) if bias_trains else rho.new_empty(0)
    if not x_trains:
        return x.new_empty(0), dw, db
    if weight is not None:
        m = m * (offset + weight.to(m.dtype)[:, None])
    parts, zero = [True, False, False], torch.zeros_like(mu)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(m, centred, x.shape[-1:], zero, rho, None, None, parts)
    return dx.to(x.dtype).contiguous(), dw, db


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    offset: float,
    x_trains: bool,
    weight_trains: bool,
    bias_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    G, _, C = x.shape
    dx = x.new_empty(x.shape if x_trains else 0)
    dw, db = (rho.new_empty((G, C) if trains else 0) for trains in (weight_trains, bias_trains))
    return dx, dw, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.offset = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second("layer_norm")
    x, weight, mu, rho = ctx.saved_tensors
    trains = ctx.needs_input_grad[:3]
    dx, dw, db = _backward(dy, x, weight, mu, rho, ctx.offset, *trains)
    return (
        dx if trains[0] else None,
        dw.to(weight.dtype) if trains[1] else None,
        db.to(ctx.bias_dtype) if trains[2] else None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _layer_norm_forward(
        x_ptr, w_ptr, b_ptr, y_ptr, mu_ptr, rho_ptr, T, C, eps, offset,
        HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # before the first product: rows * C can exceed 32 bits
        group = row // T
        total = tl.zeros((BLOCK,), tl.float32)
        for block in tl.static_range(N_BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
            total += x
        mu = tl.sum(total) / C
        total = tl.zeros((BLOCK,), tl.float32)
        for block in tl.static_range(N_BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            if N_BLOCKS > 1:  # else x is still there
                x = tl.load(x_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
            total += tl.where(columns < C, (x - mu) * (x - mu), 0.0)
        rho = tl.rsqrt(tl.sum(total) / C + tl.cast(eps, tl.float32))
        tl.store(mu_ptr + row, mu)
        tl.store(rho_ptr + row, rho)
        for block in tl.static_range(N_BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            inside = columns < C
            if N_BLOCKS > 1:
                x = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
            y = (x - mu) * rho
            if HAS_WEIGHT:
                w = tl.load(w_ptr + group * C + columns, mask=inside, other=0.0).to(tl.float32)
                y = y * (w + tl.cast(offset, tl.float32))
            if HAS_BIAS:
                y += tl.load(b_ptr + group * C + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + row * C + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _layer_norm_backward(
        dy_ptr, x_ptr, w_ptr, mu_ptr, rho_ptr, dx_ptr, dw_ptr, db_ptr, T, C, chunks, offset,
        HAS_WEIGHT: tl.constexpr, X_TRAINS: tl.constexpr, WEIGHT_TRAINS: tl.constexpr, BIAS_TRAINS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # each program owns ROWS rows of a group, so that dw and db are added up in a fixed order
        program = tl.program_id(0).to(tl.int64)
        group, first = program // chunks, (program % chunks) * ROWS
        dw, db = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(ROWS):
            there = first + i < T
            row, end = group * T + first + i, tl.where(there, C, 0)
            mu = tl.load(mu_ptr + row, mask=there, other=0.0)
            rho = tl.load(rho_ptr + row, mask=there, other=0.0)
            total, total_xhat = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for block in tl.static_range(N_BLOCKS):
                columns = block * BLOCK + tl.arange(0, BLOCK)
                inside = columns < end
                m = tl.load(dy_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                xhat = (x - mu) * rho
                if N_BLOCKS > 1:  # too long a row to keep its sums in registers
                    partial = program * C + columns
                    if WEIGHT_TRAINS:
                        dw = tl.load(dw_ptr + partial, mask=inside, other=0.0)
                        tl.store(dw_ptr + partial, dw + m * xhat, mask=inside)
                    if BIAS_TRAINS:
                        db = tl.load(db_ptr + partial, mask=inside, other=0.0)
                        tl.store(db_ptr + partial, db + m, mask=inside)
                else:
                    dw += m * xhat
                    db += m
                if HAS_WEIGHT:
                    w = tl.load(w_ptr + group * C + columns, mask=inside, other=0.0).to(tl.float32)
                    m = m * (w + tl.cast(offset, tl.float32))
                total += m
                total_xhat += m * xhat
            if X_TRAINS:
                mean, mean_xhat = tl.sum(total) / C, tl.sum(total_xhat) / C
                for block in tl.static_range(N_BLOCKS):
                    columns = block * BLOCK + tl.arange(0, BLOCK)
                    inside = columns < end
                    if N_BLOCKS > 1:  # else m and xhat are still there
                        m = tl.load(dy_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                        x = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                        xhat = (x - mu) * rho
                        if HAS_WEIGHT:
                            w = tl.load(w_ptr + group * C + columns, mask=inside, other=0.0).to(tl.float32)
                            m = m * (w + tl.cast(offset, tl.float32))
                    dx = rho * (m - mean - xhat * mean_xhat)
                    tl.store(dx_ptr + row * C + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if N_BLOCKS == 1:
            columns = tl.arange(0, BLOCK)
            if WEIGHT_TRAINS:
                tl.store(dw_ptr + program * C + columns, dw, mask=columns < C)
            if BIAS_TRAINS:
                tl.store(db_ptr + program * C + columns, db, mask=columns < C)

    def _blocks(C: int) -> dict[str, int]:
        if C > 8192:  # more does not fit into registers
            return {"BLOCK": 4096, "N_BLOCKS": triton.cdiv(C, 4096), "num_warps": 8}
        block = triton.next_power_of_2(max(C, 1))
        return {"BLOCK": block, "N_BLOCKS": 1, "num_warps": max(1, block // 512)}

    def _launch_forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        G, T, C = x.shape
        y, mu, rho = torch.empty_like(x), *(x.new_empty(G, T, dtype=torch.float32) for _ in range(2))
        if x.numel():
            w, b = (x if each is None else each.contiguous() for each in (weight, bias))
            with torch.cuda.device_of(x):
                _layer_norm_forward[(G * T,)](
                    x, w, b, y, mu, rho, T, C, eps, offset, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
                    **_blocks(C), **OPTIONS,
                )  # fmt: skip
        return y, mu, rho

    def _launch_backward(
        dy: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, rho: Tensor, offset: float, x_trains: bool,
        weight_trains: bool, bias_trains: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dy, x = dy.contiguous(), x.contiguous()
        G, T, C = x.shape
        sums = weight_trains or bias_trains
        rows = min(64, triton.next_power_of_2(triton.cdiv(G * T, PROGRAMS))) if sums and x.numel() else 1
        chunks = triton.cdiv(T, rows)
        dx = x.new_empty(x.shape if x_trains else 0)
        dw, db = (rho.new_zeros((G, chunks, C) if trains else 0) for trains in (weight_trains, bias_trains))
        if x.numel():
            w = x if weight is None else weight.contiguous()
            with torch.cuda.device_of(x):
                _layer_norm_backward[(G * chunks,)](
                    dy, x, w, mu, rho, dx, dw, db, T, C, chunks, offset, HAS_WEIGHT=weight is not None,
                    X_TRAINS=x_trains, WEIGHT_TRAINS=weight_trains, BIAS_TRAINS=bias_trains, ROWS=rows, **_blocks(C),
                    **OPTIONS,
                )  # fmt: skip
        return dx, dw.sum(1) if weight_trains else dw, db.sum(1) if bias_trains else db

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, types, {**constants, "BLOCK": block, "N_BLOCKS": n}, {"num_warps": warps})
        for block, n, warps in ((4096, 1, 8), (8192, 1, 16), (4096, 3, 8))
        for dtype in ("*bf16", "*fp32")
        for kernel, types, constants in (
            (
                _layer_norm_forward,
                [dtype, dtype, dtype, dtype, "*fp32", "*fp32", "i32", "i32", "fp32", "fp32"],
                {"HAS_WEIGHT": True, "HAS_BIAS": True},
            ),
            (
                _layer_norm_backward,
                [dtype, dtype, dtype, "*fp32", "*fp32", dtype, "*fp32", "*fp32", "i32", "i32", "i32", "fp32"],
                {"HAS_WEIGHT": True, "X_TRAINS": True, "WEIGHT_TRAINS": True, "BIAS_TRAINS": True, "ROWS": 32},
            ),
        )
    ]
