"""What cross-entropy does with a tile of logits: measure its rows, merge their states, turn it into its gradient.

Twins and Triton kernels of the formulas in `linear_cross_entropy`. The state of a row in a tile is (max, sum of
exp(l - max), sum of l), and l_y where y is in it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, runs_triton


class Loss(NamedTuple):
    """What defines the loss beside its tensors."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float


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
    tile: Tensor, bias: Tensor | None, first: int, labels: Tensor, target: Tensor, loss: Loss
) -> Tensor:  # (3, 1, rows)
    """The state of each row in a tile; writes the logits of labels that are in it into ``target``."""
    logits = _capped(tile, bias, loss.softcap)
    peak = logits.amax(1)
    total = (logits - peak.masked_fill(peak == -torch.inf, 0)[:, None]).exp_().sum(1)
    inside, place = _find(labels, first, tile.shape[1])
    target.copy_(torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), target))
    plain = logits.sum(1) if loss.label_smoothing else torch.zeros_like(peak)
    return torch.stack([peak, total, plain])[:, None]


def _merge(parts: Tensor, target: Tensor, labels: Tensor, V: int, loss: Loss, results: list[Tensor]) -> None:
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


def _differentiate(
    tile: Tensor, bias: Tensor | None, first: int, labels: Tensor,
    shift: Tensor, log_sum: Tensor, upstream: Tensor, V: int, loss: Loss,
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


def steps(x: Tensor) -> tuple[Any, Any, Any]:
    """What measures a tile, merges the states of its rows and differentiates it."""
    if runs_triton(x):
        return _launch_measure, _launch_merge, _launch_differentiate
    return _measure, _merge, _differentiate


if HAS_TRITON:
    import triton
    import triton.language as tl

    # columns at a time, and how many such blocks a program reads
    BLOCK, N_BLOCKS = 4096, 8

    @triton.jit
    def __capped(logits, softcap):
        cap = tl.cast(softcap, tl.float32)
        small = tl.exp(-2.0 * tl.abs(logits) / cap)  # cannot overflow
        size = cap * ((1.0 - small) / (1.0 + small))
        return tl.where(logits < 0, -size, size)

    @triton.jit
    def __gradient(
        logits, is_label, shift, log_sum, upstream, V, label_smoothing, softcap, z_loss, HAS_CAP: tl.constexpr
    ):  # fmt: skip
        smoothing = tl.cast(label_smoothing, tl.float32)
        gradient = tl.exp((logits - shift) - log_sum)
        gradient = gradient * (1.0 + 2.0 * tl.cast(z_loss, tl.float32) * (shift + log_sum)) - smoothing / V
        # in float32, before anything is rounded: P is close to 1 where the row is learnt
        gradient = tl.where(is_label, gradient - (1.0 - smoothing), gradient)
        if HAS_CAP:
            size = logits / tl.cast(softcap, tl.float32)
            gradient *= 1.0 - size * size
        return gradient * upstream

    @triton.jit
    def __logits(tile, bias, at, inside, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
        logits = tl.load(tile + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            logits += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        return __capped(logits, softcap) if HAS_CAP else logits

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
            gradient = __gradient(
                logits, at == label - first, tl.load(shift_ptr + row), tl.load(log_sum_ptr + row),
                tl.load(upstream_ptr + row), V, label_smoothing, softcap, z_loss, HAS_CAP,
            )  # fmt: skip
        tl.store(tile + at, gradient.to(tile_ptr.dtype.element_ty), mask=inside)

    def _block(columns: int) -> dict[str, int]:
        block = min(triton.next_power_of_2(columns), BLOCK)
        return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}

    def _launch_measure(
        tile: Tensor, bias: Tensor | None, first: int, labels: Tensor, target: Tensor, loss: Loss
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

    def _launch_merge(parts: Tensor, target: Tensor, labels: Tensor, V: int, loss: Loss, results: list[Tensor]) -> None:
        rows = labels.shape[0]
        with torch.cuda.device_of(parts):
            _lce_merge[(triton.cdiv(rows, 128),)](
                parts, target, labels, *results, rows, parts.shape[1], V, loss.ignore_index, loss.label_smoothing,
                loss.z_loss, SMOOTHED=loss.label_smoothing > 0, BLOCK=128, num_warps=1, **OPTIONS,
            )  # fmt: skip

    def _launch_differentiate(
        tile: Tensor, bias: Tensor | None, first: int, labels: Tensor,
        shift: Tensor, log_sum: Tensor, upstream: Tensor, V: int, loss: Loss,
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
