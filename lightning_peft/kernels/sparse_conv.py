"""Convolutions of which some entries train: y = x * (W + D) + b, where D is zero but for them.

What trains is D at those places, beside a W that stays as it is. The gradient of a value is that of the weight at its
place, and that of x is that of a convolution with W + D.
Beside W and what trains, x is saved. W + D is put together in the forward pass, and again in the backward pass instead
of keeping it in between; there in pieces of output channels, of about as many entries as train. Of each piece, first
W + D and then the gradient is there, and gone before the next.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import refuse_second
from lightning_peft.kernels.sparse_grad import (
    autocast_dtype,
    check_entries,
    check_order,
    located,
    pieces,
    places_of,
    wide_enough,
    with_entries,
)


def conv_with_entries(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with a frozen weight and a trained change of some of its entries.

    Beside ``x`` and its gradient, the backward pass holds at a time the larger of n and 2^18 entries of the weight, or
    of its gradient, or those of one output channel if there are more in it.

    Args:
        x: (B, C_in, ...) with one, two or three more dimensions, or without B.
        weight: (C_out, C_in / groups, ...), frozen.
        bias: (C_out,), or None.
        values: (n,), added to the entries ``index`` of the weight, of any precision.
        index: (n,) int32 or int64, places in ``weight.flatten()``, ascending and each once; -1 - i stands for i too.
        stride: as in ``F.conv2d``; so for the arguments that follow it.
        padding: zeros on both sides; ``"same"`` and ``"valid"`` are known too.
        dilation: distance of the points of the kernel.
        groups: of channels, which do not see each other.

    Returns:
        (B, C_out, ...) in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, ``weight`` requires a gradient, or ``index`` does not ascend within
            the weight. The last is seen on the CPU; an accelerator is not waited for.
    """
    name, spatial = "conv_with_entries", weight.dim() - 2
    fits = 1 <= spatial <= 3 and x.dim() in (spatial + 1, spatial + 2)
    if not fits or x.shape[-spatial - 1] != weight.shape[1] * groups or len(weight) % groups:
        raise ValueError(
            f"{name}: x must be (B, C_in, ...) and weight (C_out, C_in / groups, ...), got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and groups={groups}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({len(weight)},) or None, got {tuple(bias.shape)}.")
    check_entries(name, x, weight, values, index, index.shape, (torch.int32, torch.int64))
    stride, dilation = _each(stride, spatial), _each(dilation, spatial)
    if isinstance(padding, str):
        x, padding = _padded(x, weight, padding, dilation)
    dtype = autocast_dtype(x)
    batch = (x if x.dim() == spatial + 2 else x[None]).to(dtype)
    offset = None if bias is None else bias.to(dtype)
    y = _conv(batch, weight, offset, values, index, stride, _each(padding, spatial), dilation, groups)
    return y if x.dim() == spatial + 2 else y[0]


def _each(number: int | Sequence[int], spatial: int) -> list[int]:
    return [number] * spatial if isinstance(number, int) else list(number)


def _padded(x: Tensor, weight: Tensor, padding: str, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """``x``, and the zeros to add on both sides; where one side needs more, they are added to ``x``."""
    if padding not in ("same", "valid"):
        raise ValueError(f"conv_with_entries: padding must be numbers, 'same' or 'valid', got {padding!r}.")
    both = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    more = [side for total in reversed(both) for side in (0, total % 2)]
    return F.pad(x, more) if any(more) else x, [total // 2 for total in both]


@torch.library.custom_op("lightning_peft::conv_with_entries", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    places = places_of(index)
    check_order("conv_with_entries", weight, places)
    changed = with_entries(weight, values, places, x.dtype)
    y = torch.convolution(x, changed, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return y.clone() if y._is_view() else y  # in one dimension, torch answers with a part of two


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    changed = weight.to(x.dtype).contiguous()
    return torch.convolution(x, changed, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, how: Any, groups: int, wanted: list[bool]) -> list[Tensor]:
    none = [0] * (dy.dim() - 2)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *how, False, none, groups, wanted)


# the gradients; x is None if the values are frozen
@torch.library.custom_op("lightning_peft::conv_with_entries_backward", mutates_args=())
def _conv_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_trains: bool,
) -> tuple[Tensor, Tensor]:
    places = places_of(index)
    parts = pieces(weight, places, groups)
    # a place that no piece has, because it is out of order, must not pass for zero
    dvalues = values.new_full((0,) if x is None else values.shape, torch.nan)
    dx = _like(dy, x, shape, x_trains).to(wide_enough(dy, parts)).zero_()
    of_group, channels = len(weight) // groups, weight.shape[1]
    how = stride, padding, dilation
    given = dy.new_empty(1).expand(shape) if x is None else x  # for its own gradient, its shape alone counts
    for piece in located(weight, places, parts):
        first, last = piece.rows.start // of_group, (piece.rows.stop - 1) // of_group + 1
        seen, dy_seen = slice(first * channels, last * channels), dy[:, piece.rows]
        if x_trains:
            changed = piece.changed(weight, values, dy.dtype)
            dx[:, seen] += _backward(dy_seen, given[:, seen], changed, how, last - first, [True, False, False])[0]
            del changed
        if x is not None:
            like = weight[piece.rows].to(dy.dtype)  # torch asks for the shape alone
            piece.pick(_backward(dy_seen, x[:, seen], like, how, last - first, [False, True, False])[1], dvalues)
    return dx.to(dy.dtype), dvalues


@_conv_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_trains: bool,
) -> tuple[Tensor, Tensor]:
    return _like(dy, x, shape, x_trains), values.new_empty(0 if x is None else values.shape)


def _like(dy: Tensor, x: Tensor | None, shape: Sequence[int], x_trains: bool) -> Tensor:
    """Memory for the gradient of x, in its layout."""
    if not x_trains:
        return dy.new_empty(0)
    return dy.new_empty(shape) if x is None else torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, index, *ctx.how = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, values, index)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    refuse_second("conv_with_entries")
    x_trains, _, bias_trains, values_train, *_ = ctx.needs_input_grad
    dx, dvalues = _conv_backward(dy, *ctx.saved_tensors, ctx.shape, *ctx.how, x_trains)
    dbias = dy.sum([0, *range(2, dy.dim())]) if bias_trains else None
    return dx if x_trains else None, None, dbias, dvalues if values_train else None, *[None] * 5


_conv.register_autograd(_differentiate, setup_context=_setup)
