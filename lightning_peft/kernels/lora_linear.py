"""A linear layer with a low-rank update, y = x W^T + b + s (x A^T) B^T, that keeps no activation of its own.

Backward, with z = s dy B:  dA = z^T x,  dB = s dy^T (x A^T),  dx = dy W + z A,  in this order of products, so that
nothing of size (d_out, d_in) is made. Beside x, or what it is made from (`recipes`), x A^T (..., r) is saved.

Three thin products have nothing to gain from a kernel of their own that the vendor's would not give: they run as they
are on every device; on a CPU those with r columns are made as their transpose, in a third of the time. Dropout draws
its mask from a seed, and draws it again in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import refuse_second
from lightning_peft.kernels.recipes import keep, kept


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A linear layer and its low-rank update.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in).
        bias: (d_out,) or None.
        lora_A: (r, d_in).
        lora_B: (d_out, r).
        scaling: factor of the update.
        dropout: probability of dropping a feature of ``x`` on its way to the update, in training only.
        training: whether there is dropout.

    Returns:
        (..., d_out) in the dtype of ``F.linear(x, weight, bias)``.

    Raises:
        ValueError: shapes do not fit.
    """
    d_out, d_in = weight.shape
    r = lora_A.shape[0]
    if lora_A.shape != (r, d_in) or lora_B.shape != (d_out, r):
        raise ValueError(
            f"lora_linear: for a weight ({d_out}, {d_in}) lora_A must be (r, {d_in}) and lora_B ({d_out}, r), got "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    y = F.linear(x, weight, bias)
    return y + lora_product(x, lora_A, scaling * lora_B, dropout=dropout if training else 0.0).to(y.dtype)


def lora_product(x: Tensor, down: Tensor, up: Tensor, *, dropout: float = 0.0) -> Tensor:
    """``(dropout(x) down^T) up^T`` in the precision of the factors: (..., d_out) for x (..., d_in).

    Args:
        x: (..., d_in), in any precision.
        down: (r, d_in).
        up: (d_out, r), the scaling in it.
        dropout: probability of dropping a feature.
    """
    if not dropout and not (torch.is_grad_enabled() and _saves_less(x, down)):
        return F.linear(F.linear(x.to(down.dtype), down), up)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.linear(F.linear(F.dropout(x.to(down.dtype), dropout), down), up)
    # from the generator that everybody uses, so that a run repeats; on the CPU, so that nobody waits
    seed = int(torch.randint(2**31 - 1, (), device="cpu")) if dropout else None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else down.dtype
    if not torch.is_grad_enabled():
        return F.linear(F.linear(_dropped(x.to(dtype), dropout, seed), down.to(dtype)), up.to(dtype))
    return _Product.apply(x, down, up, dtype, dropout, seed)


def _saves_less(x: Tensor, down: Tensor) -> bool:
    """Whether plain products would save another tensor than ``x`` itself, or one that can be made again."""
    return x.dtype != down.dtype or hasattr(x, "recipe") or torch.is_autocast_enabled(x.device.type)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype, dropout: float, seed: int | None
    ) -> Tensor:
        ctx.dtype, ctx.x_dtype, ctx.dropout, ctx.seed = dtype, x.dtype, dropout, seed
        rows = _dropped(x.to(dtype), dropout, seed).reshape(-1, x.shape[-1])
        h = _few_columns(rows, down.to(dtype).T)
        if ctx.needs_input_grad[1]:
            keep(ctx, x, down, up, h)
        else:  # without a gradient of A nobody needs x
            ctx.save_for_backward(down, up, h)
        return F.linear(h, up.to(dtype)).view(*x.shape[:-1], up.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_second("lora_linear")
        x_wanted, down_wanted, up_wanted = ctx.needs_input_grad[:3]
        down, up, h, *rest = kept(ctx) if down_wanted else ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]).to(ctx.dtype)
        z = _few_columns(rows, up.to(ctx.dtype))
        dx = ddown = dup = None
        if up_wanted:
            dup = _few_columns(rows.T, h).to(up.dtype)
        if down_wanted:
            x = _dropped(rest[0].to(ctx.dtype), ctx.dropout, ctx.seed)
            ddown = (z.T @ x.reshape(-1, x.shape[-1])).to(down.dtype)
        if x_wanted:
            dx = (z @ down.to(ctx.dtype)).view(*dy.shape[:-1], down.shape[1])
            dx = _dropped(dx, ctx.dropout, ctx.seed).to(ctx.x_dtype)
        return dx, ddown, dup, None, None, None


def _few_columns(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, tall and thin: on a CPU by its transpose, whose long rows are made many numbers at a time."""
    return (b.T @ a.T).T if a.device.type == "cpu" else a @ b


def _dropped(x: Tensor, dropout: float, seed: int | None) -> Tensor:
    if seed is None:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - dropout, generator=generator)
    return x * mask.div_(1 - dropout)
