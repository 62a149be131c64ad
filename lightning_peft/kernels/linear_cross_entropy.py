"""Cross-entropy of a linear head whose logits never exist as a whole.

With a = x C^T + b, l = cap tanh(a / cap) (or l = a), lse = logsumexp_v l, smoothing s, z weight z and label y:

    loss = lse - (1 - s) l_y - (s / V) sum_v l_v + z lse^2
    G_v  = d loss / d a_v = [(1 + 2 z lse) P_v - s / V - (1 - s) 1{v = y}] (1 - (l_v / cap)^2),  P = softmax(l)
    dx   = g G C,   dC = sum over rows of g G^T x,   db = sum over rows of g G,  for the gradient g of the row's loss.

Logits live in one private tile. Per tile the state of a row is (max, sum of exp(l - max), sum of l, l_y); states are
merged in a fixed order. max and log sum are kept apart: their sum would swallow P_y - 1 where P_y is near 1.

*Chunked* (whole rows fit into the budget): the product of the device makes the tile. If the head is frozen, G C is made
in the forward, while the tile is there, since dx is linear in g row by row. Saved for backward: G C, as large as x, and
nothing else. *Cut* (the vocabulary is too long for that), or a head that trains: saved are the inputs and two numbers
per row; the backward makes the tiles again, for a head that trains over all rows and a slice of the vocabulary, so that
dC needs no buffer of its own. On an accelerator a cut forward has no tile at all, and a cut backward makes g G in one
step: `linear_cross_entropy_cut`.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import lightning_peft.kernels.linear_cross_entropy_cut as cut
from lightning_peft.kernels.backend import accumulator, refuse_second, runs_triton
from lightning_peft.kernels.linear_cross_entropy_rows import Loss, steps

# bytes of logits that may exist at a time, unless the caller says how many
LOGITS_BUDGET = 256 * 2**20
# a product with fewer rows takes longer to read the head than to compute; tiles of whole rows have multiples of it
FEWEST_ROWS = 256
# more of them on a CPU fall out of its caches
CPU_ROWS = 256
# rows of a tile that holds a slice of the vocabulary: few, for the float32 sum of dx is as long
CUT_ROWS = 512
# numbers in a tile: fewer keep an accelerator busy for less time than it takes to ask for the next one
LEAST_TILE = CUT_ROWS * 4096

Reduction = Literal["none", "mean", "sum"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    budget: int | None = None,
) -> Tensor:
    """Cross-entropy of ``softmax(x weight^T + bias)``, without the logits in memory.

    Nothing waits for the accelerator. Under autocast the product runs in its dtype.

    Args:
        x: (..., D).
        weight: (V, D), the head.
        labels: (...), integers from 0 to V - 1, or ``ignore_index``.
        bias: (V,), or None.
        ignore_index: label of rows whose loss and gradient are 0.
        label_smoothing: share of the target that is spread evenly over the vocabulary, 0 to 1.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None leaves them.
        z_loss: weight of the squared logsumexp of the logits.
        reduction: ``"mean"`` over rows that are not ignored, ``"sum"``, or ``"none"`` for one loss per row.
        num_items: what ``"mean"`` divides by in place of the number of rows here that are not ignored: a number, or a
            tensor with one, for gradients that are accumulated over batches or devices.
        budget: bytes of logits that may exist at a time; None for 256 MiB. With room for 256 rows of them the loss is
            *chunked*: forward and backward of a frozen head take 4 T V D operations. With less it is *cut* into slices
            of the vocabulary: 6 T V D operations, and beside the gradient of ``x`` only a tile of logits (the budget,
            or 4 MiB if that is more, 8 MiB in float32) and 512 rows in float32. 0 asks for that. A head that trains
            takes 8 T V D in both, and a gradient of ``x`` in float32.

    Returns:
        In float32 (float64 for float64): (...) for ``"none"``, else a scalar; the mean of no rows at all is 0.

    Raises:
        ValueError: shapes, dtypes or options do not fit, or a label is out of range. Kernels on an accelerator cannot
            look at labels without waiting: there the row of such a label gets NaN, in the loss and in the gradient.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, labels, bias)
    _check_options(label_smoothing, softcap, z_loss, reduction, num_items, budget)
    budget = LOGITS_BUDGET if budget is None else budget
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    at_once = torch.is_grad_enabled() and x.requires_grad and not head_trains and _whole_rows(x, weight, budget) > 0
    flat = labels.reshape(-1).long()
    losses = _forward(
        x.reshape(-1, x.shape[-1]), weight, bias, flat, ignore_index, label_smoothing, softcap, z_loss, budget, at_once
    )[0]
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses.sum()
    count = (flat != ignore_index).sum() if num_items is None else num_items
    if isinstance(count, Tensor):
        count = count.reshape(())
        return losses.sum() / torch.where(count > 0, count, 1)
    return losses.sum() / (count or 1)


def _check(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "linear_cross_entropy: weight is sharded, expected all of it. Call it in the forward of the module that "
            "owns the weight, or pass weight.full_tensor()."
        )
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"linear_cross_entropy: weight must be (V, D) for x (..., D), got {tuple(weight.shape)} for "
            f"{tuple(x.shape)}. The weight of nn.Linear has this form."
        )
    if labels.shape != x.shape[:-1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"linear_cross_entropy: labels must be integers of shape {tuple(x.shape[:-1])} for x {tuple(x.shape)}, "
            f"got {labels.dtype} {tuple(labels.shape)}. To predict the next token, pass x[:, :-1] and labels[:, 1:]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, "
            f"got {tuple(bias.shape)}."
        )
    dtypes = [t.dtype for t in (x, weight, bias) if t is not None]
    if len(set(dtypes)) > 1 or not x.is_floating_point():
        raise ValueError(
            "linear_cross_entropy: x, weight and bias must have one floating dtype, got "
            f"{', '.join(map(str, dtypes))}. Cast x to {weight.dtype}, or use torch.autocast."
        )


def _check_options(
    label_smoothing: float, softcap: float | None, z_loss: float, reduction: str, num_items: float | Tensor | None,
    budget: int | None,
) -> None:  # fmt: skip
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be a number in [0, 1], got {label_smoothing}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"linear_cross_entropy: softcap must be a number > 0, got {softcap}. None leaves logits as they are."
        )
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss must be a number >= 0, got {z_loss}.")
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"linear_cross_entropy: reduction must be one of {', '.join(map(repr, get_args(Reduction)))}, got "
            f"{reduction!r}."
        )
    if budget is not None and budget < 0:
        raise ValueError(
            f"linear_cross_entropy: budget must be a number of bytes >= 0, got {budget}. None is {LOGITS_BUDGET}."
        )
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"linear_cross_entropy: num_items is what reduction='mean' divides by, got reduction={reduction!r}. "
            "Leave out num_items, or take 'mean'."
        )
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"linear_cross_entropy: num_items must be one number, got shape {tuple(num_items.shape)}.")
    if not isinstance(num_items, Tensor) and not num_items >= 0:
        raise ValueError(f"linear_cross_entropy: num_items must be a number >= 0, got {num_items}.")


def _whole_rows(x: Tensor, weight: Tensor, budget: int) -> int:
    """How many rows of logits fit into the budget; 0 if too few to be worth it."""
    rows = budget // (weight.shape[0] * x.element_size()) // FEWEST_ROWS * FEWEST_ROWS
    return min(rows, CPU_ROWS) if x.device.type == "cpu" else rows


def _unit(x: Tensor) -> float:
    """The gradient that G C is made for: float16 has no room for the small entries of G."""
    return 64.0 if x.dtype == torch.float16 else 1.0


def _pieces(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class _Tiles:
    """The private memory in which tiles of logits are made, one after the other."""

    def __init__(self, x: Tensor, weight: Tensor, rows: int, budget: int) -> None:
        self.x, self.weight, self.rows = x, weight, max(min(rows, x.shape[0]), 1)
        columns = max(budget // x.element_size(), LEAST_TILE) // self.rows
        self.columns = max(min(columns, weight.shape[0]), 1)
        # every row begins at a multiple of 16 numbers, so that it can be read 128 bits at a time
        self.memory = x.new_empty(self.rows, -(-self.columns // 16) * 16)

    def at(self, rows: slice, columns: slice) -> Tensor:
        return self.memory[: rows.stop - rows.start, : columns.stop - columns.start]

    def make(self, rows: slice, columns: slice) -> Tensor:
        return torch.mm(self.x[rows], self.weight[columns].t(), out=self.at(rows, columns))


@torch.library.custom_op("lightning_peft::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float, budget: int, at_once: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By row: loss, max of the logits, log of the sum of exp(l - max), and G C, which is empty unless ``at_once``."""
    loss = Loss(ignore_index, label_smoothing, softcap, z_loss)
    T, V, D, whole = x.shape[0], weight.shape[0], x.shape[1], _whole_rows(x, weight, budget)
    measure, merge, differentiate = steps(x)
    if not runs_triton(x) and not labels.is_cuda:
        _check_range(labels, V, ignore_index)
    x, labels, bias = x.contiguous(), labels.contiguous(), None if bias is None else bias.contiguous()
    per_row = [x.new_empty(T, dtype=accumulator(x)) for _ in range(3)]
    unit = x.new_empty(T if at_once else 0, D)
    if runs_triton(x) and not whole:
        target = x.new_full((T,), torch.nan, dtype=torch.float32)  # which a label that is nowhere stays
        merge(cut.measure(x, weight, bias, labels, target, loss), target, labels, V, loss, per_row)
        return per_row[0], per_row[1], per_row[2], unit
    tiles = _Tiles(x, weight, whole or CUT_ROWS, budget)
    for rows in _pieces(T, tiles.rows):
        # a label that is in no tile stays NaN
        target, parts = x.new_full((rows.stop - rows.start,), torch.nan, dtype=accumulator(x)), []
        for columns in _pieces(V, tiles.columns):
            tile = tiles.make(rows, columns)
            parts.append(measure(tile, _of(bias, columns), columns.start, labels[rows], target, loss))
        _, shift, log_sum = results = [result[rows] for result in per_row]
        merge(torch.cat(parts, 1), target, labels[rows], V, loss, results)
        if at_once:
            upstream = torch.full_like(shift, _unit(x))
            differentiate(tile, bias, 0, labels[rows], shift, log_sum, upstream, V, loss)
            torch.mm(tile, weight, out=unit[rows])
    return per_row[0], per_row[1], per_row[2], unit


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float, budget: int, at_once: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, dtype = x.shape[0], accumulator(x)
    a, b, c = x.new_empty(T, dtype=dtype), x.new_empty(T, dtype=dtype), x.new_empty(T, dtype=dtype)
    return a, b, c, x.new_empty(T if at_once else 0, x.shape[1])


@torch.library.custom_op("lightning_peft::linear_cross_entropy_rescaled", mutates_args=())
def _rescale(unit: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of x where G C is there already."""
    return torch.mul(unit, (upstream / _unit(unit))[:, None], out=torch.empty_like(unit))


@_rescale.register_fake
def _(unit: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(unit)


@torch.library.custom_op("lightning_peft::linear_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shift: Tensor, log_sum: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float, budget: int,
    x_trains: bool, weight_trains: bool, bias_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias, empty for what is frozen."""
    loss = Loss(ignore_index, label_smoothing, softcap, z_loss)
    T, V, D, wide = x.shape[0], weight.shape[0], x.shape[1], accumulator(x)
    in_one_step = runs_triton(x) and not _whole_rows(x, weight, budget)
    differentiate = steps(x)[2]
    x, labels, upstream = x.contiguous(), labels.contiguous(), upstream.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx = x.new_empty(T if x_trains else 0, D)
    dw = x.new_zeros(V if weight_trains else 0, D)
    db = x.new_zeros(V if bias_trains else 0)
    # with all rows at once a slice of dC is complete, and rounded once
    tiles = _Tiles(x, weight, T if weight_trains or bias_trains else CUT_ROWS, budget)
    sums = x.new_empty(tiles.rows if x_trains else 0, D, dtype=wide)
    for rows in _pieces(T, tiles.rows):
        x_rows, per_row = x[rows], (labels[rows], shift[rows], log_sum[rows], upstream[rows])
        total = sums[: rows.stop - rows.start].zero_()
        for columns in _pieces(V, tiles.columns):
            c, b = weight[columns], _of(bias, columns)
            if in_one_step:
                tile = tiles.at(rows, columns)
                cut.differentiate(tile, x_rows, c, b, columns.start, *per_row, V, loss)
            else:
                tile = tiles.make(rows, columns)
                differentiate(tile, b, columns.start, *per_row, V, loss)
            if x_trains:
                _add_product(total, tile, c)
            if weight_trains:
                torch.mm(tile.t(), x_rows, out=dw[columns])
            if bias_trains:
                db[columns] = tile.sum(0, dtype=wide)
        if x_trains:
            dx[rows] = total
    return dx, dw, db


@_backward.register_fake
def _(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shift: Tensor, log_sum: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float, budget: int,
    x_trains: bool, weight_trains: bool, bias_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, D), V = x.shape, weight.shape[0]
    dx, dw = x.new_empty(T if x_trains else 0, D), x.new_empty(V if weight_trains else 0, D)
    return dx, dw, x.new_empty(V if bias_trains else 0)


def _add_product(total: Tensor, tile: Tensor, weight: Tensor) -> None:
    """Adds ``tile @ weight`` to ``total``, without rounding the product if the device can do so."""
    if total.dtype == tile.dtype:
        total.addmm_(tile, weight)
    elif _adds_in_float32(tile):
        torch.addmm(total, tile, weight, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(tile, weight)


def _adds_in_float32(x: Tensor) -> bool:
    """Whether a product of 16-bit numbers can be added to a sum in float32: by cuBLAS, if it is left as it is."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    return not (torch.backends.cuda.matmul.allow_fp16_accumulation or torch.cuda.tunable.is_enabled())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, *ctx.options, ctx.at_once = inputs
    _, shift, log_sum, unit = output
    ctx.mark_non_differentiable(shift, log_sum, unit)
    if ctx.at_once:
        ctx.save_for_backward(unit)
    else:
        ctx.save_for_backward(x, weight, bias, labels, shift, log_sum)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second("linear_cross_entropy")
    options = (None,) * 7  # labels, and what is no tensor
    if ctx.at_once:
        return _rescale(ctx.saved_tensors[0], upstream), None, None, *options
    trains = ctx.needs_input_grad[:3]
    gradients = _backward(upstream, *ctx.saved_tensors, *ctx.options, *trains)
    return *(d if wanted else None for d, wanted in zip(gradients, trains, strict=True)), *options


_forward.register_autograd(_differentiate, setup_context=_setup)


def _check_range(labels: Tensor, V: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) | (labels >= V)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy: labels must be 0 to {V - 1} or ignore_index={ignore_index}, got {int(wrong[0])} "
            f"(of {wrong.numel()} such). Set labels of rows to leave out to {ignore_index}."
        )


def _cut(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]


def _of(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]
