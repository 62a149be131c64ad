"""Matrix kernels of linear cross-entropy for a vocabulary that is cut into slices.

Forward: a program owns a block of rows and a part of the vocabulary. It makes one block of logits after the other, in
registers, and writes what `linear_cross_entropy_rows` merges: one state of each row for the whole part. Backward: a
program makes one block of logits again, and writes ``upstream`` times G into a private tile.

Nothing is shared between programs while they run, so results repeat bit by bit. The twin of these kernels is a matrix
product followed by the twins of the rows.
"""

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS
from lightning_peft.kernels.linear_cross_entropy_rows import Loss

if HAS_TRITON:
    import triton
    import triton.language as tl

    from lightning_peft.kernels.linear_cross_entropy_rows import __capped, __gradient

    # programs of the forward: several rounds on any accelerator, so that the last round does not leave much of it idle
    PROGRAMS = 1024

    @triton.jit
    def __products(
        x_ptr, weight_ptr, bias_ptr, rows, columns, D, stride_v, stride_d, first_row, first_column, softcap,
        HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        # in place of rows and columns beyond the end, the last one is computed again
        t = tl.minimum(tl.arange(0, BLOCK_T), (rows - 1 - first_row).to(tl.int32))
        v = tl.minimum(tl.arange(0, BLOCK_V), (columns - 1 - first_column).to(tl.int32))
        d = tl.arange(0, BLOCK_D)
        x = x_ptr + first_row * D + (t[:, None] * D + d[None])
        weight = weight_ptr + first_column * stride_v + (v[None] * stride_v + d[:, None] * stride_d)
        logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for start in range(0, D, BLOCK_D):
            x_block = tl.load(x, mask=d[None] < D - start, other=0.0)
            weight_block = tl.load(weight, mask=d[:, None] < D - start, other=0.0)
            logits = tl.dot(x_block, weight_block, logits, input_precision="ieee")
            x += BLOCK_D
            weight += BLOCK_D * stride_d
        if HAS_BIAS:
            logits += tl.load(bias_ptr + first_column + v).to(tl.float32)[None]
        return __capped(logits, softcap) if HAS_CAP else logits

    @triton.jit
    def _lce_measure_products(
        x_ptr, weight_ptr, bias_ptr, labels_ptr, target_ptr, parts_ptr, T, V, D, stride_v, stride_d, blocks,
        ignore_index, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTHED: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        # parts first: programs that run together share few blocks of rows, and meet them again in the cache
        part = tl.program_id(0).to(tl.int64)  # before the first product: parts * T and V * D can exceed 32 bits
        first_row = tl.program_id(1).to(tl.int64) * BLOCK_T
        rows = first_row + tl.arange(0, BLOCK_T)
        labels = tl.load(labels_ptr + rows, mask=rows < T, other=ignore_index)
        counts = (rows < T) & (labels != ignore_index)
        if tl.max(counts.to(tl.int32)) > 0:  # a block of nothing but prompts costs nothing
            begin = part * blocks * BLOCK_V
            end = tl.minimum(begin + blocks * BLOCK_V, V)
            peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_T,), tl.float32)
            plain = tl.zeros((BLOCK_T,), tl.float32)
            target = tl.zeros((BLOCK_T,), tl.float32)
            v = tl.arange(0, BLOCK_V)[None]
            for first in range(begin, end, BLOCK_V):
                logits = __products(
                    x_ptr, weight_ptr, bias_ptr, T, V, D, stride_v, stride_d, first_row, first, softcap,
                    HAS_BIAS, HAS_CAP, BLOCK_T, BLOCK_V, BLOCK_D,
                )  # fmt: skip
                is_label, inside = v == (labels - first).to(tl.int32)[:, None], v < V - first
                target += tl.sum(tl.where(is_label, logits, 0.0), 1)
                if SMOOTHED:
                    plain += tl.sum(tl.where(inside, logits, 0.0), 1)
                logits = tl.where(inside, logits, float("-inf"))
                higher = tl.maximum(peak, tl.max(logits, 1))
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
                peak = higher
            slot, plane = parts_ptr + part * T + rows, tl.num_programs(0).to(tl.int64) * T
            tl.store(slot, peak, mask=counts)
            tl.store(slot + plane, total, mask=counts)
            if SMOOTHED:
                tl.store(slot + 2 * plane, plain, mask=counts)
            tl.store(target_ptr + rows, target, mask=counts & (labels >= begin) & (labels < end))

    @triton.jit
    def _lce_differentiate_products(
        x_ptr, weight_ptr, bias_ptr, labels_ptr, shift_ptr, log_sum_ptr, upstream_ptr, tile_ptr, T, columns, D,
        stride_v, stride_d, stride, first, V, ignore_index, label_smoothing, softcap, z_loss,
        HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        first_row = tl.program_id(0).to(tl.int64) * BLOCK_T  # before the first product: T * stride can exceed 32 bits
        first_column = tl.program_id(1).to(tl.int64) * BLOCK_V
        t, v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
        rows = first_row + t
        labels = tl.load(labels_ptr + rows, mask=rows < T, other=ignore_index)
        counts = (rows < T) & (labels != ignore_index)
        gradient = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        if tl.max(counts.to(tl.int32)) > 0:
            logits = __products(
                x_ptr, weight_ptr, bias_ptr, T, columns, D, stride_v, stride_d, first_row, first_column, softcap,
                HAS_BIAS, HAS_CAP, BLOCK_T, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            # rows that count for nothing have no max, and exp must not overflow
            logits = tl.where(counts[:, None], logits, 0.0)
            is_label = v[None] == (labels - first - first_column).to(tl.int32)[:, None]
            shift = tl.load(shift_ptr + rows, mask=counts, other=0.0)[:, None]
            log_sum = tl.load(log_sum_ptr + rows, mask=counts, other=0.0)[:, None]
            upstream = tl.load(upstream_ptr + rows, mask=counts, other=0.0)[:, None]
            gradient = __gradient(
                logits, is_label, shift, log_sum, upstream, V, label_smoothing, softcap, z_loss, HAS_CAP
            )  # fmt: skip
        tile = tile_ptr + first_row * stride + first_column + (t[:, None] * stride + v[None])
        inside = (rows[:, None] < T) & (v[None] < columns - first_column)
        tl.store(tile, gradient.to(tile_ptr.dtype.element_ty), mask=inside)

    def _blocks(dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
        """Sizes that are known to fit into registers, and how they are run."""
        if dtype == torch.float32:
            return {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_D": 16}, {"num_warps": 4, "num_stages": 3}
        return {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64}, {"num_warps": 8, "num_stages": 3}

    def measure(
        x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, target: Tensor, loss: Loss
    ) -> Tensor:  # (3, parts, T)
        """The states of each row; writes the logits of labels into ``target``."""
        (T, D), V, (sizes, options) = x.shape, weight.shape[0], _blocks(x.dtype)
        row_blocks, blocks = triton.cdiv(T, sizes["BLOCK_T"]), triton.cdiv(V, sizes["BLOCK_V"])
        in_part = triton.cdiv(blocks, max(PROGRAMS // max(row_blocks, 1), 1))
        parts = x.new_empty(3, triton.cdiv(blocks, in_part), T, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _lce_measure_products[(parts.shape[1], row_blocks)](
                x, weight, x if bias is None else bias, labels, target, parts, T, V, D, *weight.stride(), in_part,
                loss.ignore_index, loss.softcap or 1.0, HAS_BIAS=bias is not None, HAS_CAP=loss.softcap is not None,
                SMOOTHED=loss.label_smoothing > 0, **sizes, **options, **OPTIONS,
            )  # fmt: skip
        return parts

    def differentiate(
        tile: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, first: int, labels: Tensor,
        shift: Tensor, log_sum: Tensor, upstream: Tensor, V: int, loss: Loss,
    ) -> None:  # fmt: skip
        """Writes ``upstream`` times G into a tile: of rows ``x``, and of ``weight``, whose first row is ``first``."""
        (rows, columns), D, (sizes, options) = tile.shape, x.shape[1], _blocks(x.dtype)
        grid = triton.cdiv(rows, sizes["BLOCK_T"]), triton.cdiv(columns, sizes["BLOCK_V"])
        with torch.cuda.device_of(x):
            _lce_differentiate_products[grid](
                x, weight, x if bias is None else bias, labels, shift, log_sum, upstream, tile, rows, columns, D,
                *weight.stride(), tile.stride(0), first, V, loss.ignore_index, loss.label_smoothing,
                loss.softcap or 1.0, loss.z_loss, HAS_BIAS=bias is not None, HAS_CAP=loss.softcap is not None,
                **sizes, **options, **OPTIONS,
            )  # fmt: skip

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, [f"*{name}"] * 3 + types, {**constants, "HAS_BIAS": full, "HAS_CAP": full, **sizes}, options)
        for name, dtype, full in (
            ("bf16", torch.bfloat16, False),
            ("bf16", torch.bfloat16, True),
            ("fp16", torch.float16, True),
            ("fp32", torch.float32, True),
        )
        for sizes, options in [_blocks(dtype)]
        for kernel, types, constants in (
            (
                _lce_measure_products,
                ["*i64", "*fp32", "*fp32", *["i32"] * 6, "fp32"],
                {"stride_d": 1, "SMOOTHED": full},
            ),
            (
                _lce_differentiate_products,
                ["*i64", "*fp32", "*fp32", "*fp32", f"*{name}", *["i32"] * 8, *["fp32"] * 3],
                {"stride_d": 1},
            ),
        )
    ]
