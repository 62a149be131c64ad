"""Cross-entropy of a linear head whose logits never exist as a whole.

With a = x C^T + b, l = cap tanh(a / cap) (or l = a), lse = logsumexp_v l, smoothing s, z weight z and label y:

    loss = lse - (1 - s) l_y - (s / V) sum_v l_v + z lse^2
    G_v  = d loss / d a_v = [(1 + 2 z lse) P_v - s / V - (1 - s) 1{v = y}] (1 - (l_v / cap)^2),  P = softmax(l)
    dx   = g G C,   dC = sum over rows of g G^T x,   db = sum over rows of g G,  for the gradient g of the row's loss.

Logits live in one private tile of at most ``LOGITS_BUDGET`` bytes, made by the matrix product of the device. Per tile
the state of a row is (max, sum of exp(l - max), sum of l, l_y); states are merged in a fixed order. max and log sum are
kept apart: their sum would swallow P_y - 1 where P_y is near 1.

*Chunked* (a tile of whole rows fits): if the head is frozen, G C is made in the forward, while the tile is there, since
dx is linear in g row by row. Saved for backward: G C, as large as x, and nothing else. *Cut* (the vocabulary is too
long for that), or a head that trains: saved are the inputs and two numbers per row; the backward makes the tiles again,
for a head that trains over all rows and a slice of the vocabulary, so that dC needs no buffer of its own.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, runs_triton

# bytes of logits that may exist at a time
LOGITS_BUDGET = 256 * 2**20
# a product with fewer rows takes longer to read the head than to compute; tiles of whole rows have multiples of it
FEWEST_ROWS = 256
# rows of a tile that holds a slice of the vocabulary: few, for the float32 sum of dx is as long
CUT_ROWS = 1024

Reduction = Literal["none", "mean", "sum"]


class _Loss(NamedTuple):
    """What defines the loss beside its tensors."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float


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
    _check_options(label_smoothing, softcap, z_loss, reduction, num_items)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    at_once = torch.is_grad_enabled() and x.requires_grad and not head_trains and _whole_rows(x, weight) > 0
    flat = labels.reshape(-1).long()
    losses = _forward(
        x.reshape(-1, x.shape[-1]), weight, bias, flat, ignore_index, label_smoothing, softcap, z_loss, at_once
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
    label_smoothing: float, softcap: float | None, z_loss: float, reduction: str, num_items: float | Tensor | None
) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be 0 to 1, got {label_smoothing}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"linear_cross_entropy: softcap must be positive, got {softcap}. None leaves logits as they are."
        )
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss must be >= 0, got {z_loss}.")
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"linear_cross_entropy: reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}."
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
        raise ValueError(f"linear_cross_entropy: num_items must be >= 0, got {num_items}.")


def _whole_rows(x: Tensor, weight: Tensor) -> int:
    """How many rows of logits fit into the budget; 0 if too few to be worth it."""
    return LOGITS_BUDGET // (weight.shape[0] * x.element_size()) // FEWEST_ROWS * FEWEST_ROWS


def _unit(x: Tensor) -> float:
    """The gradient that G C is made for: float16 has no room for the small entries of G."""
    return 64.0 if x.dtype == torch.float16 else 1.0


def _pieces(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class _Tiles:
    """The private memory in which tiles of logits are made, one after the other."""

    def __init__(self, x: Tensor, weight: Tensor, rows: int, columns: int) -> None:
        self.x, self.weight = x, weight
        self.rows, self.columns = max(min(rows, x.shape[0]), 1), max(min(columns, weight.shape[0]), 1)
        # every row begins at a multiple of 16 numbers, so that it can be read 128 bits at a time
        self.memory = x.new_empty(self.rows, -(-self.columns // 16) * 16)

    def make(self, rows: slice, columns: slice) -> Tensor:
        tile = self.memory[: rows.stop - rows.start, : columns.stop - columns.start]
        return torch.mm(self.x[rows], self.weight[columns].t(), out=tile)


@torch.library.custom_op("lightning_peft::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float, at_once: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By row: loss, max of the logits, log of the sum of exp(l - max), and G C, which is empty unless ``at_once``."""
    loss = _Loss(ignore_index, label_smoothing, softcap, z_loss)
    T, V, D, whole = x.shape[0], weight.shape[0], x.shape[1], _whole_rows(x, weight)
    measure, merge, differentiate = _steps(x)
    if measure is _measure and not labels.is_cuda:
        _check_range(labels, V, ignore_index)
    x, labels, bias = x.contiguous(), labels.contiguous(), None if bias is None else bias.contiguous()
    per_row = [x.new_empty(T, dtype=accumulator(x)) for _ in range(3)]
    unit = x.new_empty(T if at_once else 0, D)
    columns_fitting = LOGITS_BUDGET // (CUT_ROWS * x.element_size())
    tiles = _Tiles(x, weight, whole or CUT_ROWS, V if whole else columns_fitting)
    for rows in _pieces(T, tiles.rows):
        # a label that is in no tile stays NaN
        target, parts = x.new_full((rows.stop - rows.start,), torch.nan, dtype=accumulator(x)), []
        for columns in _pieces(V, tiles.columns):
            tile = tiles.make(rows, columns)
            parts.append(measure(tile, _cut(bias, columns), labels[rows], columns.start, target, loss))
        _, shift, log_sum = results = [result[rows] for result in per_row]
        merge(torch.cat(parts, 1), target, labels[rows], V, loss, results)
        if at_once:
            upstream = torch.full_like(shift, _unit(x))
            differentiate(tile, bias, labels[rows], 0, shift, log_sum, upstream, V, loss)
            torch.mm(tile, weight, out=unit[rows])
    return per_row[0], per_row[1], per_row[2], unit


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float, at_once: bool,
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
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float,
    x_trains: bool, weight_trains: bool, bias_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias, empty for what is frozen."""
    loss = _Loss(ignore_index, label_smoothing, softcap, z_loss)
    T, V, D, wide = x.shape[0], weight.shape[0], x.shape[1], accumulator(x)
    differentiate = _steps(x)[2]
    x, labels, upstream = x.contiguous(), labels.contiguous(), upstream.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx = x.new_empty(T if x_trains else 0, D)
    dw = x.new_zeros(V if weight_trains else 0, D)
    db = x.new_zeros(V if bias_trains else 0)
    # with all rows at once a slice of dC is complete, and rounded once
    most = max(T, 1) if weight_trains or bias_trains else CUT_ROWS
    tiles = _Tiles(x, weight, most, LOGITS_BUDGET // (most * x.element_size()))
    for rows in _pieces(T, tiles.rows):
        total = None
        for columns in _pieces(V, tiles.columns):
            tile = tiles.make(rows, columns)
            differentiate(
                tile,
                _cut(bias, columns),
                labels[rows],
                columns.start,
                shift[rows],
                log_sum[rows],
                upstream[rows],
                V,
                loss,
            )
            if x_trains:
                part = torch.mm(tile, weight[columns])
                total = part.to(wide) if total is None else total.add_(part)
            if weight_trains:
                torch.mm(tile.t(), x[rows], out=dw[columns])
            if bias_trains:
                db[columns] = tile.sum(0, dtype=wide)
        if total is not None:
            dx[rows] = total
    return dx, dw, db


@_backward.register_fake
def _(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shift: Tensor, log_sum: Tensor,
    ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float,
    x_trains: bool, weight_trains: bool, bias_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, D), V = x.shape, weight.shape[0]
    dx, dw = x.new_empty(T if x_trains else 0, D), x.new_empty(V if weight_trains else 0, D)
    return dx, dw, x.new_empty(V if bias_trains else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, *ctx.loss, ctx.at_once = inputs
    _, shift, log_sum, unit = output
    ctx.mark_non_differentiable(shift, log_sum, unit)
    if ctx.at_once:
        ctx.save_for_backward(unit)
    else:
        ctx.save_for_backward(x, weight, bias, labels, shift, log_sum)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy: gradients of gradients are not there, for its logits are not. "
            "Take F.cross_entropy of F.linear, or leave out create_graph=True."
        )
    options = (None,) * 6  # labels, and what defines the loss
    if ctx.at_once:
        return _rescale(ctx.saved_tensors[0], upstream), None, None, *options
    trains = ctx.needs_input_grad[:3]
    gradients = _backward(upstream, *ctx.saved_tensors, *ctx.loss, *trains)
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


def _capped(tile: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = tile.to(accumulator(tile))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _find(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which labels are in a tile whose first column is ``first``, and at which of its columns (0 if they are not)."""
    place = labels - first
    inside = (place >= 0) & (place < columns)
    return inside, torch.where(inside, place, 0)


def _measure(
    tile: Tensor, bias: Tensor | None, labels: Tensor, first: int, target: Tensor, loss: _Loss
) -> Tensor:  # (3, 1, rows)
    """The state of each row in a tile; writes the logits of labels that are in it into ``target``."""
    logits = _capped(tile, bias, loss.softcap)
    peak = logits.amax(1)
    total = (logits - peak.masked_fill(peak == -torch.inf, 0)[:, None]).exp_().sum(1)
    inside, place = _find(labels, first, tile.shape[1])
    target.copy_(torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), target))
    plain = logits.sum(1) if loss.label_smoothing else torch.zeros_like(peak)
    return torch.stack([peak, total, plain])[:, None]


def _merge(parts: Tensor, target: Tensor, labels: Tensor, V: int, loss: _Loss, results: list[Tensor]) -> None:
    """From the states (3, parts, rows) of each row: loss, max, and log of the sum of exp(l - max)."""
    peaks, totals, plain = parts
    shift = peaks.amax(0)
    log_sum = (totals * (peaks - shift).exp()).sum(0).log()
    value = log_sum - (1 - loss.label_smoothing) * (target - shift)
    if loss.label_smoothing:
        value -= loss.label_smoothing * (plain.sum(0) / V - shift)
    if loss.z_loss:
        value += loss.z_loss * (shift + log_sum).square()
    value = value.masked_fill(labels == loss.ignore_index, 0)
    log_sum = log_sum.masked_fill(target.isnan() & (labels != loss.ignore_index), torch.nan)
    for result, computed in zip(results, (value, shift, log_sum), strict=True):
        result.copy_(computed)


def _differentiate_tile(
    tile: Tensor, bias: Tensor | None, labels: Tensor, first: int,
    shift: Tensor, log_sum: Tensor, upstream: Tensor, V: int, loss: _Loss,
) -> None:  # fmt: skip
    """Replaces the logits of a tile by ``upstream`` times G."""
    logits, keep = _capped(tile, bias, loss.softcap), labels != loss.ignore_index
    g = upstream * keep
    # the tile is private, and without a cap the logits are not needed again
    gradient = logits.sub_(shift[:, None]) if loss.softcap is None else logits - shift[:, None]
    gradient.exp_().mul_((g * (1 + 2 * loss.z_loss * (shift + log_sum)) * (-log_sum).exp())[:, None])
    if loss.label_smoothing:
        gradient -= (g * (loss.label_smoothing / V))[:, None]
    inside, place = _find(labels, first, tile.shape[1])
    gradient.scatter_add_(1, place[:, None], (g * (loss.label_smoothing - 1) * inside)[:, None])
    if loss.softcap is not None:
        gradient *= 1 - (logits / loss.softcap).square_()
    tile.copy_(gradient)


def _steps(x: Tensor) -> tuple[Any, Any, Any]:
    """What measures a tile, merges the states of its rows and differentiates it."""
    if runs_triton(x) and x.dtype != torch.float64:
        return _launch_measure, _launch_merge, _launch_differentiate
    return _measure, _merge, _differentiate_tile


if HAS_TRITON:
    import triton
    import triton.language as tl

    # columns at a time, and how many such blocks a program reads
    BLOCK, N_BLOCKS = 4096, 8

    @triton.jit
    def __logits(tile, bias, at, inside, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
        logits = tl.load(tile + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            logits += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            cap = tl.cast(softcap, tl.float32)
            small = tl.exp(-2.0 * tl.abs(logits) / cap)  # cannot overflow
            size = cap * ((1.0 - small) / (1.0 + small))
            logits = tl.where(logits < 0, -size, size)
        return logits

    @triton.jit
    def _lce_measure(
        tile_ptr, bias_ptr, labels_ptr, target_ptr, parts_ptr, rows, columns, stride, first, ignore_index, softcap,
        HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
        N_BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # before the first product: rows * stride can exceed 32 bits
        part, label = tl.program_id(1), tl.load(labels_ptr + row)
        if label != ignore_index:
            tile = tile_ptr + row * stride
            peak = tl.full((), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            plain = tl.zeros((BLOCK,), tl.float32)
            for block in range(N_BLOCKS):
                at = (part * N_BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
                inside = at < columns
                logits = __logits(tile, bias_ptr, at, inside, softcap, HAS_BIAS, HAS_CAP)
                if SMOOTHED:
                    plain += logits  # 0 outside
                logits = tl.where(inside, logits, float("-inf"))
                higher = tl.maximum(peak, tl.max(logits))
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(peak - shift) + tl.exp(logits - shift)
                peak = higher
            slot, plane = part * rows + row, tl.num_programs(1).to(tl.int64) * rows
            tl.store(parts_ptr + slot, peak)
            tl.store(parts_ptr + plane + slot, tl.sum(total))
            if SMOOTHED:
                tl.store(parts_ptr + 2 * plane + slot, tl.sum(plain))
            place = label - first
            here = (place >= part * N_BLOCKS * BLOCK) & (place < (part + 1) * N_BLOCKS * BLOCK)
            if here & (place < columns):
                tl.store(target_ptr + row, __logits(tile, bias_ptr, place, here, softcap, HAS_BIAS, HAS_CAP))

    @triton.jit
    def _lce_merge(
        parts_ptr, target_ptr, labels_ptr, losses_ptr, shift_ptr, log_sum_ptr, rows, parts, V, ignore_index,
        label_smoothing, z_loss, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, plane = at < rows, tl.cast(parts, tl.int64) * rows
        # nothing was measured of other rows: with zeros in its place their loss comes out as 0
        counts = inside & (tl.load(labels_ptr + at, mask=inside, other=0) != ignore_index)
        shift = tl.full((BLOCK,), float("-inf"), tl.float32)
        for part in range(parts):
            shift = tl.maximum(shift, tl.load(parts_ptr + part * rows + at, mask=counts, other=0.0))
        total = tl.zeros((BLOCK,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            slot = part * rows + at
            scale = tl.exp(tl.load(parts_ptr + slot, mask=counts, other=0.0) - shift)
            total += scale * tl.load(parts_ptr + plane + slot, mask=counts, other=0.0)
            if SMOOTHED:
                plain += tl.load(parts_ptr + 2 * plane + slot, mask=counts, other=0.0)
        smoothing, target = tl.cast(label_smoothing, tl.float32), tl.load(target_ptr + at, mask=counts, other=0.0)
        log_sum = tl.log(tl.where(counts, total, 1.0))
        loss = log_sum - (1.0 - smoothing) * (target - shift)
        if SMOOTHED:
            loss -= smoothing * (plain / V - shift)
        loss += tl.cast(z_loss, tl.float32) * (shift + log_sum) * (shift + log_sum)
        log_sum = tl.where(target == target, log_sum, float("nan"))
        tl.store(losses_ptr + at, loss, mask=inside)
        tl.store(shift_ptr + at, shift, mask=inside)
        tl.store(log_sum_ptr + at, log_sum, mask=inside)

    @triton.jit
    def _lce_differentiate(
        tile_ptr, bias_ptr, labels_ptr, shift_ptr, log_sum_ptr, upstream_ptr, columns, stride, first, V, ignore_index,
        label_smoothing, softcap, z_loss, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # before the first product: rows * stride can exceed 32 bits
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tile, inside, label = tile_ptr + row * stride, at < columns, tl.load(labels_ptr + row)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if label != ignore_index:
            logits = __logits(tile, bias_ptr, at, inside, softcap, HAS_BIAS, HAS_CAP)
            shift, log_sum = tl.load(shift_ptr + row), tl.load(log_sum_ptr + row)
            smoothing = tl.cast(label_smoothing, tl.float32)
            gradient = tl.exp((logits - shift) - log_sum)
            gradient = gradient * (1.0 + 2.0 * tl.cast(z_loss, tl.float32) * (shift + log_sum)) - smoothing / V
            # in float32, before anything is rounded: P is close to 1 where the row is learnt
            gradient = tl.where(at == label - first, gradient - (1.0 - smoothing), gradient)
            if HAS_CAP:
                size = logits / tl.cast(softcap, tl.float32)
                gradient *= 1.0 - size * size
            gradient *= tl.load(upstream_ptr + row)
        tl.store(tile + at, gradient.to(tile_ptr.dtype.element_ty), mask=inside)

    def _block(columns: int) -> dict[str, int]:
        block = min(triton.next_power_of_2(columns), BLOCK)
        return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}

    def _launch_measure(
        tile: Tensor, bias: Tensor | None, labels: Tensor, first: int, target: Tensor, loss: _Loss
    ) -> Tensor:  # (3, parts, rows)
        (rows, columns), block = tile.shape, _block(tile.shape[1])
        blocks = triton.cdiv(columns, block["BLOCK"])
        n_blocks = min(blocks, N_BLOCKS)
        parts = tile.new_empty(3, triton.cdiv(blocks, n_blocks), rows, dtype=torch.float32)
        with torch.cuda.device_of(tile):
            _lce_measure[(rows, parts.shape[1])](
                tile, tile if bias is None else bias, labels, target, parts, rows, columns, tile.stride(0), first,
                loss.ignore_index, loss.softcap or 1.0, HAS_BIAS=bias is not None, HAS_CAP=loss.softcap is not None,
                SMOOTHED=loss.label_smoothing > 0, N_BLOCKS=n_blocks, **block, **OPTIONS,
            )  # fmt: skip
        return parts

    def _launch_merge(
        parts: Tensor, target: Tensor, labels: Tensor, V: int, loss: _Loss, results: list[Tensor]
    ) -> None:
        rows = labels.shape[0]
        with torch.cuda.device_of(parts):
            _lce_merge[(triton.cdiv(rows, 128),)](
                parts, target, labels, *results, rows, parts.shape[1], V, loss.ignore_index, loss.label_smoothing,
                loss.z_loss, SMOOTHED=loss.label_smoothing > 0, BLOCK=128, num_warps=1, **OPTIONS,
            )  # fmt: skip

    def _launch_differentiate(
        tile: Tensor, bias: Tensor | None, labels: Tensor, first: int,
        shift: Tensor, log_sum: Tensor, upstream: Tensor, V: int, loss: _Loss,
    ) -> None:  # fmt: skip
        (rows, columns), block = tile.shape, _block(tile.shape[1])
        with torch.cuda.device_of(tile):
            _lce_differentiate[(rows, triton.cdiv(columns, block["BLOCK"]))](
                tile, tile if bias is None else bias, labels, shift, log_sum, upstream, columns, tile.stride(0), first,
                V, loss.ignore_index, loss.label_smoothing, loss.softcap or 1.0, loss.z_loss,
                HAS_BIAS=bias is not None, HAS_CAP=loss.softcap is not None, **block, **OPTIONS,
            )  # fmt: skip

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        variant
        for dtype in ("*bf16", "*fp16", "*fp32")
        for full in (False, True)
        for variant in (
            (
                _lce_measure,
                [dtype, dtype, "*i64", "*fp32", "*fp32", "i32", "i32", "i32", "i32", "i32", "fp32"],
                {"HAS_BIAS": full, "HAS_CAP": full, "SMOOTHED": full, "BLOCK": BLOCK, "N_BLOCKS": N_BLOCKS},
                {"num_warps": 8},
            ),
            (
                _lce_differentiate,
                [dtype, dtype, "*i64", "*fp32", "*fp32", "*fp32", *["i32"] * 5, *["fp32"] * 3],
                {"HAS_BIAS": full, "HAS_CAP": full, "BLOCK": BLOCK},
                {"num_warps": 8},
            ),
        )
    ] + [
        (
            _lce_merge,
            ["*fp32", "*fp32", "*i64", "*fp32", "*fp32", "*fp32", *["i32"] * 4, "fp32", "fp32"],
            {"SMOOTHED": smoothed, "BLOCK": 128},
            {"num_warps": 1},
        )
        for smoothed in (False, True)
    ]
