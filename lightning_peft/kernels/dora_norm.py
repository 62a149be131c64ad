"""Norms of the rows of W + s B A, which DoRA divides by, without the sum being built.

With b = s B:  n_i^2 = |W_i|^2 + <2 (W A^T)_i + (b A A^T)_i, b_i>.  One pass over W, and matrices of rank r beside it.
Rounding may leave less than nothing of a row that b A cancels: clamped at 0. No gradient, as in the paper.
"""

import torch
from torch import Tensor

from lightning_peft.kernels.backend import HAS_TRITON, OPTIONS, accumulator, runs_triton

ELEMENTS = 2**20  # of W that the twin holds in float32 at a time


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """Euclidean norm of each row of ``weight + scaling * lora_B @ lora_A``, as a constant for autograd.

    Args:
        weight: (N, K).
        lora_A: (r, K), in the precision of ``weight`` or a finer one.
        lora_B: (N, r), likewise.
        scaling: a number, or a tensor of one.

    Returns:
        (N,) in float32; in float64 for a weight in float64.

    Raises:
        ValueError: the shapes do not fit.
    """
    fits = weight.dim() == lora_A.dim() == lora_B.dim() == 2
    if not fits or weight.shape != (lora_B.shape[0], lora_A.shape[1]) or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"dora_norm: weight must be (N, K), lora_A (r, K) and lora_B (N, r), got {tuple(weight.shape)}, "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}. Kernels of convolutions: flatten(1) them."
        )
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        b = scaling * lora_B.to(accumulator(weight))
        return _norm(weight.detach(), lora_A.detach(), b)


@torch.library.custom_op("lightning_peft::dora_norm", mutates_args=())
def _norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a_wide = a.to(b.dtype)
    b_gram = b @ (a_wide @ a_wide.T)
    if runs_triton(weight) and a.shape[0] <= MAX_RANK:
        return _launch(weight, a, b, b_gram)
    norms = b.new_empty(len(weight))
    rows = max(1, ELEMENTS // max(weight.shape[1], 1))
    for out, w, b_rows, b_gram_rows in zip(*(x.split(rows) for x in (norms, weight, b, b_gram)), strict=True):
        wide = w.to(b.dtype)
        inner = ((2 * (wide @ a_wide.T) + b_gram_rows) * b_rows).sum(1)
        out.copy_((torch.linalg.vector_norm(wide, dim=1).square() + inner).clamp_(min=0).sqrt_())
    return norms


@_norm.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return b.new_empty(weight.shape[0])


if HAS_TRITON:
    import triton
    import triton.language as tl

    MAX_RANK = 256  # of a sum that fits into registers

    @triton.jit
    def _dora_norm(
        w_ptr, a_ptr, b_ptr, b_gram_ptr, norm_ptr, N, K, r,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # N * K can exceed 32 bits
        ranks = tl.arange(0, R)
        squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        products = tl.zeros((BLOCK_N, R), tl.float32)
        for start in range(0, K, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            w = tl.load(
                w_ptr + rows[:, None] * K + columns[None], mask=(rows[:, None] < N) & (columns[None] < K), other=0.0
            )
            a = tl.load(
                a_ptr + ranks[:, None] * K + columns[None], mask=(ranks[:, None] < r) & (columns[None] < K), other=0.0
            )
            wide = w.to(tl.float32)
            squares += wide * wide
            if w.dtype == a.dtype:
                products = tl.dot(w, tl.trans(a), products, input_precision="ieee")
            else:
                products = tl.dot(wide, tl.trans(a.to(tl.float32)), products, input_precision="ieee")
        inside = (rows[:, None] < N) & (ranks[None] < r)
        b = tl.load(b_ptr + rows[:, None] * r + ranks[None], mask=inside, other=0.0)
        b_gram = tl.load(b_gram_ptr + rows[:, None] * r + ranks[None], mask=inside, other=0.0)
        squared = tl.sum(squares, 1) + tl.sum((2 * products + b_gram) * b, 1)
        tl.store(norm_ptr + rows, tl.sqrt(tl.maximum(squared, 0.0)), mask=rows < N)

    def _tile(r: int, half: bool) -> dict[str, int]:
        """As much of K at a time as fits into registers; products in float32 need more of them, and of threads."""
        R = triton.next_power_of_2(max(r, 16))
        block = min(128, 8192 // R) if half else max(16, min(64, 2048 // R))
        return {"BLOCK_N": 32, "BLOCK_K": block, "R": R, "num_warps": 4 if half else 8}

    def _launch(weight: Tensor, a: Tensor, b: Tensor, b_gram: Tensor) -> Tensor:
        weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
        N, K = weight.shape
        norms = b.new_empty(N)
        tile = _tile(a.shape[0], half=weight.dtype == a.dtype != torch.float32)
        if N:
            with torch.cuda.device_of(weight):
                _dora_norm[(triton.cdiv(N, tile["BLOCK_N"]),)](
                    weight, a, b, b_gram, norms, N, K, a.shape[0], **tile, num_stages=3, **OPTIONS
                )  # fmt: skip
        return norms

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (
            _dora_norm,
            [weight, a, "*fp32", "*fp32", "*fp32", *["i32"] * 3],
            {key: value for key, value in _tile(r, half=weight == a != "*fp32").items() if key.isupper()},
            {"num_warps": _tile(r, half=weight == a != "*fp32")["num_warps"], "num_stages": 3},
        )
        for weight, a in (("*bf16", "*bf16"), ("*bf16", "*fp32"), ("*fp32", "*fp32"))
        for r in (8, 24, 64, 100, 256)
    ]
