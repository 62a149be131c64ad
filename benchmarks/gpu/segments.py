"""Point 8: each token by the low-rank update of its own adapter."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.case import Case, Machine, Output, Peer, Work, plain

SCALING = 2.0


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """8192 tokens of 1, 8 and 64 adapters, with the backward pass; 64 tokens of as many, as in decoding, without."""
    tokens, few = machine.size(8192, 13), machine.size(64, 5)
    sizes = ((tokens, 1, True), (tokens, machine.size(8, 3), True), (tokens, few, True), (few, few, False))
    return {8: [partial(case, machine, *size) for size in sizes]}


def case(machine: Machine, T: int, n: int, trains: bool) -> Case:
    """T tokens, n adapters of rank 16 on a layer (4096, 4096), drawn at random for each token."""
    K, N, r, item = machine.size(4096, 24), machine.size(4096, 17), machine.size(16, 4), machine.dtype.itemsize
    inputs = {
        "x": machine.randn(T, K, grad=trains),
        "lora_A": machine.randn(n, r, K, scale=K**-0.5, grad=trains),
        "lora_B": machine.randn(n, N, r, scale=0.1, grad=trains),
        "index": machine.randint(n, T),
    }
    used = min(T, n)
    moved, flops = (T * (K + N) + used * r * (K + N)) * item, 2 * T * r * (K + N)
    return Case(
        name=f"LoRA of {n} adapters ({T}, {K}, {N}), r={r}{'' if trains else ', no gradients'}",
        inputs=inputs,
        truth=plain(_gathered),
        peers=[
            Peer("a loop over adapters", plain(_looped)),
            Peer("gathered factors, bmm", plain(_gathered)),
            Peer("ours", plain(_ours)),
        ],
        forward=Work(moved, flops),
        both=Work(3 * moved, 3 * flops) if trains else None,
    )


def _ours(x: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor) -> Output:
    from lightning_peft.kernels import segment_lora

    return segment_lora(x, lora_A, lora_B, index, SCALING)


def _gathered(x: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor) -> Tensor:
    h = torch.bmm(lora_A[index], x[..., None])
    return SCALING * torch.bmm(lora_B[index], h)[..., 0]


def _looped(x: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor) -> Tensor:
    y = x.new_zeros(len(x), lora_B.shape[1])
    for i, (down, up) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (index == i).nonzero()[:, 0]
        y.index_add_(0, rows, SCALING * F.linear(F.linear(x[rows], down), up))
    return y
