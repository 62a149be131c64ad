"""A mixture of low-rank updates: y = sum over experts of p_e s B_e A_e x, with a gate p_e for each token and expert.

All experts at once: with A (E r, K) and B (N, E r) side by side, h = x A^T and y = (h p) B^T, where p has s in it and
h p multiplies the r numbers of each expert by its gate. Backward, with dz = dy B:  dh = dz p,  dp_e = sum over r of
dz h,  dA = dh^T x,  dB = dy^T (h p),  dx = dh A.  Beside x, or what it is made from (`recipes`), and p, h (..., E r) is
saved.

The thin products are the vendor's. Between them one pass over h multiplies by the gates, and one goes back.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, refuse_second, runs_triton
from lightning_peft.kernels.recipes import keep, kept


def mixture_lora(x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    """The experts' low-rank updates, each times its gate, in one sum; the caller routes, and adds it to the base.

    Every expert is computed for every token, chosen or not: two products and no sorting, which is least work while
    E r is at most about 256. Beyond that it stays right, and does more than a choice of few experts needs. Gates get
    their exact gradient, those that are 0 as well.

    Args:
        x: (..., K), in any precision.
        lora_A: (E, r, K), the factors of E experts.
        lora_B: (E, N, r).
        gates: (..., E), 0 for experts that were not chosen, in any precision.
        scaling: factor of all updates.

    Returns:
        (..., N) in the dtype of the factors, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(x, lora_A, lora_B, gates)
    (E, r, K), N = lora_A.shape, lora_B.shape[1]
    down, up = lora_A.reshape(E * r, K), lora_B.transpose(0, 1).reshape(N, E * r)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora_A.dtype
    return _forward(x, down.to(dtype), up.to(dtype), scaling * gates.to(accumulator(lora_A)))[0]


def _check(x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor) -> None:
    fits = lora_A.dim() == lora_B.dim() == 3 and x.shape[-1:] == lora_A.shape[2:]
    if not fits or lora_A.shape[:2] != (lora_B.shape[0], lora_B.shape[2]):
        raise ValueError(
            f"mixture_lora: x must be (..., K), lora_A (E, r, K) and lora_B (E, N, r), got {tuple(x.shape)}, "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    if gates.shape != (*x.shape[:-1], len(lora_A)):
        raise ValueError(
            f"mixture_lora: gates must be {(*x.shape[:-1], len(lora_A))}, one for each token and expert, got "
            f"{tuple(gates.shape)}. Those of the top k alone: torch.zeros(...).scatter(-1, chosen, gates)."
        )
    dtypes = [each.dtype for each in (x, lora_A, lora_B, gates)]
    if lora_A.dtype != lora_B.dtype or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            "mixture_lora: x and gates must have floating dtypes, lora_A and lora_B the same one, got "
            f"{', '.join(map(str, dtypes))} for x, lora_A, lora_B and gates. Cast the odd one."
        )


@torch.library.custom_op("lightning_peft::mixture_lora", mutates_args=())
def _forward(x: Tensor, down: Tensor, up: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """y, and h; gates in the precision of `accumulator`."""
    h = F.linear(x.to(down.dtype), down).contiguous()
    return F.linear(_gate(h, gates), up).contiguous(), h


@_forward.register_fake
def _(x: Tensor, down: Tensor, up: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return down.new_empty(*x.shape[:-1], up.shape[0]), down.new_empty(*x.shape[:-1], down.shape[0])


@torch.library.custom_op("lightning_peft::mixture_lora_backward", mutates_args=())
def _backward(
    dy: Tensor, down: Tensor, up: Tensor, gates: Tensor, h: Tensor, x: Tensor | None, x_dtype: torch.dtype,
    x_trains: bool, up_trains: bool, gates_train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, down, up and gates, empty for what is frozen; x is None if down is."""
    T, (N, ranks) = math.prod(dy.shape[:-1]), up.shape
    rows = dy.reshape(T, N)
    dx, ddown, dup, dgates = dy.new_empty(0, dtype=x_dtype), down.new_empty(0), up.new_empty(0), gates.new_empty(0)
    if up_trains:
        dup = rows.T @ _gate(h, gates).view(T, ranks)
    if x_trains or gates_train or x is not None:
        dz = (rows @ up).view(h.shape)
        dh, dgates = _gate_backward(dz, h, gates) if gates_train else (_gate(dz, gates), dgates)
        if x_trains:
            dx = (dh @ down).to(x_dtype)
        if x is not None:
            ddown = dh.view(T, ranks).T @ x.reshape(T, x.shape[-1]).to(down.dtype)
    return dx, ddown, dup, dgates


@_backward.register_fake
def _(
    dy: Tensor, down: Tensor, up: Tensor, gates: Tensor, h: Tensor, x: Tensor | None, x_dtype: torch.dtype,
    x_trains: bool, up_trains: bool, gates_train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], down.shape[1]) if x_trains else 0, dtype=x_dtype)
    dup, dgates = up.new_empty(up.shape if up_trains else 0), gates.new_empty(gates.shape if gates_train else 0)
    return dx, down.new_empty(0 if x is None else down.shape), dup, dgates


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *others = inputs
    ctx.x_dtype = x.dtype
    ctx.mark_non_differentiable(output[1])
    keep(ctx, x if ctx.needs_input_grad[1] else None, *others, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    x_trains, _, up_trains, gates_train = wanted = ctx.needs_input_grad
    refuse_second("mixture_lora")
    gradients = _backward(dy, *kept(ctx), ctx.x_dtype, x_trains, up_trains, gates_train)
    return tuple(each if trains else None for each, trains in zip(gradients, wanted, strict=True))


_forward.register_autograd(_differentiate, setup_context=_setup)


def _gate(h: Tensor, gates: Tensor) -> Tensor:
    """h (..., E r), the r numbers of each expert times its gate."""
    if runs_triton(h):
        return _launch(h, gates)
    return (_by_expert(h, gates) * gates[..., None]).to(h.dtype).view(h.shape)


def _gate_backward(dz: Tensor, h: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of h and of the gates."""
    if runs_triton(h):
        return _launch_backward(dz, h, gates)
    return _gate(dz, gates), (_by_expert(dz, gates) * _by_expert(h, gates)).sum(-1)


def _by_expert(h: Tensor, gates: Tensor) -> Tensor:  # (..., E, r)
    return h.view(*gates.shape, h.shape[-1] // max(gates.shape[-1], 1)).to(gates.dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _mixture_gate(h_ptr, gates_ptr, z_ptr, T, RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
        # a row for each token and expert; rows * RANK can exceed 32 bits
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        ranks = tl.arange(0, R)[None]
        at, inside = rows[:, None] * RANK + ranks, (rows[:, None] < T) & (ranks < RANK)
        gates = tl.load(gates_ptr + rows, mask=rows < T, other=0.0)
        z = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32) * gates[:, None]
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _mixture_gate_backward(
        dz_ptr, h_ptr, gates_ptr, dh_ptr, dgates_ptr, T, RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        ranks = tl.arange(0, R)[None]
        at, inside = rows[:, None] * RANK + ranks, (rows[:, None] < T) & (ranks < RANK)
        gates = tl.load(gates_ptr + rows, mask=rows < T, other=0.0)
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dh_ptr + at, (dz * gates[:, None]).to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(dgates_ptr + rows, tl.sum(dz * h, 1), mask=rows < T)

    def _tile(r: int) -> dict[str, int]:
        """2048 numbers; the rank is a constant, which tells how many bits can be read at a time."""
        R = triton.next_power_of_2(max(r, 1))
        return {"RANK": r, "R": R, "ROWS": max(1, 2048 // R)}

    def _launch(h: Tensor, gates: Tensor) -> Tensor:
        gates, z = gates.contiguous(), torch.empty_like(h)
        if h.numel():
            T, tile = gates.numel(), _tile(h.numel() // gates.numel())
            with torch.cuda.device_of(h):
                _mixture_gate[(triton.cdiv(T, tile["ROWS"]),)](h, gates, z, T, **tile, num_warps=4, **OPTIONS)
        return z

    def _launch_backward(dz: Tensor, h: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        gates, dh, dgates = gates.contiguous(), torch.empty_like(h), gates.new_zeros(gates.shape)
        if h.numel():
            T, tile = gates.numel(), _tile(h.numel() // gates.numel())
            with torch.cuda.device_of(h):
                _mixture_gate_backward[(triton.cdiv(T, tile["ROWS"]),)](
                    dz, h, gates, dh, dgates, T, **tile, num_warps=4, **OPTIONS
                )
        return dh, dgates

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, types, _tile(r), {"num_warps": 4})
        for dtype in ("*bf16", "*fp16", "*fp32")
        for r in (8, 24, 64)
        for kernel, types in (
            (_mixture_gate, [dtype, "*fp32", dtype, "i32"]),
            (_mixture_gate_backward, [dtype, dtype, "*fp32", dtype, "*fp32", "i32"]),
        )
    ]
