"""Rotary position embedding of queries and keys, in the half-split form of Llama.

With x1 and x2 the halves of the first d_rot features of a head, and c and s the cosines and sines of its position:
y1 = x1 c1 - x2 s1,  y2 = x2 c2 + x1 s2;  further features stay as they are.
Backward, the transposed map (the rotation back, for c1 = c2 and s1 = s2):  dx1 = dy1 c1 + dy2 s2,
dx2 = dy2 c2 - dy1 s1.
Saves c and s, which all layers share, and neither queries nor keys.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, runs_triton


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated by their positions, in float32 and rounded once.

    Args:
        q: (B, H, T, d). A transposed view, as (B, T, H, d) gives it, is read where it lies.
        k: (B, H_k, T, d), with fewer heads if they are shared.
        cos: (T, d_rot) or (B, T, d_rot), both halves filled as transformers does; a batch of 1 serves all. Only the
            first d_rot features of a head are rotated.
        sin: as ``cos``.

    Returns:
        The rotated q and k, contiguous, in their dtypes.

    Raises:
        ValueError: the shapes do not fit, d_rot is odd or larger than d, or ``cos`` or ``sin`` requires a gradient.
    """
    fits = q.dim() == 4 and k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not fits:
        raise ValueError(
            f"rope: q must be (B, H, T, d) and k (B, H_k, T, d), got {tuple(q.shape)} and {tuple(k.shape)}. "
            "Heads come before positions: transpose(1, 2) of (B, T, H, d)."
        )
    B, _, T, d = q.shape
    fits = cos.shape == sin.shape and cos.shape[-2:-1] == (T,) and cos.shape[:-2] in ((), (1,), (B,))
    if not fits or cos.shape[-1] > d or cos.shape[-1] % 2:
        raise ValueError(
            f"rope: cos and sin must be ({T}, d_rot) or ({B}, {T}, d_rot) with an even d_rot <= {d} for q "
            f"{tuple(q.shape)}, got {tuple(cos.shape)} and {tuple(sin.shape)}. Take the rows of the positions first."
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: cos and sin get no gradient, but one of them requires it. Detach them.")
    cos, sin = (each if each.dim() == 3 else each[None] for each in (cos, sin))
    return _rotate(q, k, cos, sin, False, True, True)


@torch.library.custom_op("lightning_peft::rope", mutates_args=())
def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, q_wanted: bool, k_wanted: bool
) -> tuple[Tensor, Tensor]:
    if runs_triton(q):
        return _launch(q, k, cos, sin, transposed, q_wanted, k_wanted)
    half = cos.shape[-1] // 2
    c, s = (each.to(accumulator(q))[:, None] for each in (cos, sin))
    s1, s2 = s.tensor_split(2, -1)
    if transposed:
        s1, s2 = -s2, -s1

    def turned(x: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return x.new_empty(0)
        y = x.new_empty(x.shape, dtype=c.dtype)
        wide = x.to(c.dtype)
        x1, x2 = wide[..., :half], wide[..., half : 2 * half]
        torch.mul(wide[..., : 2 * half], c, out=y[..., : 2 * half])
        y[..., :half].addcmul_(x2, s1, value=-1)
        y[..., half : 2 * half].addcmul_(x1, s2)
        y[..., 2 * half :] = wide[..., 2 * half :]
        return y.to(x.dtype)

    return turned(q, q_wanted), turned(k, k_wanted)


@_rotate.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, q_wanted: bool, k_wanted: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape if q_wanted else 0), k.new_empty(k.shape if k_wanted else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.transposed, *ctx.wanted = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    q_trains, k_trains = (a and b for a, b in zip(ctx.needs_input_grad, ctx.wanted, strict=False))
    dq, dk = _rotate(dq, dk, *ctx.saved_tensors, not ctx.transposed, q_trains, k_trains)
    return dq if q_trains else None, dk if k_trains else None, None, None, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_setup)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def rotate_heads(
        x_ptr, y_ptr, b, t, H, T, half, rest, batch_stride, head_stride, stride, c1, c2, s1, s2,
        HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        for start in range(0, H, HEADS):
            heads = (start + tl.arange(0, HEADS))[:, None].to(tl.int64)
            x_row = x_ptr + b * batch_stride + heads * head_stride + t * stride
            y_row = y_ptr + ((b * H + heads) * T + t) * (2 * half + rest)
            columns = tl.arange(0, HALF)[None]
            inside = (heads < H) & (columns < half)
            x1 = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(x_row + half + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_row + columns, (x1 * c1 - x2 * s1).to(y_ptr.dtype.element_ty), mask=inside)
            tl.store(y_row + half + columns, (x2 * c2 + x1 * s2).to(y_ptr.dtype.element_ty), mask=inside)
            if REST > 0:
                columns = tl.arange(0, REST)[None]
                inside = (heads < H) & (columns < rest)
                x = tl.load(x_row + 2 * half + columns, mask=inside, other=0.0)
                tl.store(y_row + 2 * half + columns, x, mask=inside)

    @triton.jit
    def _rope(
        q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, H_q, H_k, T, half, rest,
        q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride, angle_batch_stride,
        TRANSPOSED: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HALF: tl.constexpr,
        REST: tl.constexpr,
    ):  # fmt: skip
        # one program for all heads of a position: its angles are read once
        program = tl.program_id(0).to(tl.int64)  # before the first product: offsets can exceed 32 bits
        b, t = program // T, program % T
        columns = tl.arange(0, HALF)[None]
        inside = columns < half
        angle = b * angle_batch_stride + t * 2 * half + columns
        c1 = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        c2 = tl.load(cos_ptr + angle + half, mask=inside, other=0.0).to(tl.float32)
        s1 = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        s2 = tl.load(sin_ptr + angle + half, mask=inside, other=0.0).to(tl.float32)
        if TRANSPOSED:
            s1, s2 = -s2, -s1
        if HEADS_Q > 0:
            rotate_heads(
                q_ptr, q_out_ptr, b, t, H_q, T, half, rest, q_batch_stride, q_head_stride, q_stride, c1, c2, s1, s2,
                HEADS_Q, HALF, REST,
            )  # fmt: skip
        if HEADS_K > 0:
            rotate_heads(
                k_ptr, k_out_ptr, b, t, H_k, T, half, rest, k_batch_stride, k_head_stride, k_stride, c1, c2, s1, s2,
                HEADS_K, HALF, REST,
            )  # fmt: skip

    def _heads(H: int, HALF: int, wanted: bool) -> int:
        """How many heads at a time: about 2048 numbers in each half."""
        return min(triton.next_power_of_2(max(H, 1)), max(1, 2048 // HALF)) if wanted else 0

    def _launch(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, q_wanted: bool, k_wanted: bool
    ) -> tuple[Tensor, Tensor]:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        cos, sin = cos.contiguous(), sin.contiguous()
        B, H_q, T, d = q.shape
        half = cos.shape[-1] // 2
        HALF, rest = triton.next_power_of_2(max(half, 1)), d - 2 * half
        q_out, k_out = (x.new_empty(x.shape if wanted else 0) for x, wanted in ((q, q_wanted), (k, k_wanted)))
        if q_out.numel() or k_out.numel():
            with torch.cuda.device_of(q):
                _rope[(B * T,)](
                    q, k, cos, sin, q_out, k_out, H_q, k.shape[1], T, half, rest, *q.stride()[:3], *k.stride()[:3],
                    cos.stride(0) if cos.shape[0] > 1 else 0, TRANSPOSED=transposed,
                    HEADS_Q=_heads(H_q, HALF, q_wanted), HEADS_K=_heads(k.shape[1], HALF, k_wanted), HALF=HALF,
                    REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4, **OPTIONS,
                )  # fmt: skip
        return q_out, k_out

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (
            _rope,
            [dtype, dtype, angles, angles, dtype, dtype, *["i32"] * 12],
            {"TRANSPOSED": transposed, "HEADS_Q": 2048 // half, "HEADS_K": 8, "HALF": half, "REST": rest},
            {"num_warps": 4},
        )
        for dtype, angles in (("*bf16", "*bf16"), ("*bf16", "*fp32"), ("*fp32", "*fp32"))
        for transposed, half, rest in ((False, 64, 0), (True, 64, 0), (False, 16, 64))
    ]
