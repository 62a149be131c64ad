"""Point 7, first half: a linear layer with DoRA, and the norms that it divides by alone."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.adapted import by_peft, by_us, layer, scaling
from benchmarks.gpu.case import Case, Inputs, Machine, Peer, Work, compiled, plain
from benchmarks.gpu.linears import Single, adapted, functional
from lightning_peft.kernels import dora_norm

NORM_SCALING = 2.0


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """8192 tokens, a weight (4096, 4096)."""
    return {7: [partial(dora, machine), partial(dora_norms, machine)]}


def dora(machine: Machine) -> Case:
    """A layer with magnitude and factors."""
    T, K, N, r = machine.size(8192, 13), machine.size(4096, 24), machine.size(4096, 17), machine.size(16, 4)
    inputs = {"x": machine.randn(T, K, grad=True), **layer(machine, "linear", K, N, r)}
    inputs["linear.magnitude"] = (1 + machine.randn(N, scale=0.1)).requires_grad_()
    make, item = partial(Single, K, N), machine.dtype.itemsize
    moved, large, thin = (T * K + 2 * N * K + T * N) * item, 2 * T * N * K, 2 * T * r * (K + N) + 2 * N * K * r
    return Case(
        name=f"DoRA linear ({T}, {K}, {N}), r={r}",
        inputs=inputs,
        truth=functional(_dora),
        peers=[
            Peer("torch", functional(_dora)),
            Peer("PEFT", adapted(make, by_peft())),
            Peer("PEFT, torch.compile", adapted(make, by_peft(), compile=True)),
            Peer("ours", adapted(make, by_us())),
        ],
        forward=Work(moved, large + thin),
        both=Work(2 * moved, 2 * large + 3 * thin),
    )


def dora_norms(machine: Machine) -> Case:
    """What DoRA divides by."""
    K, N, r = machine.size(4096, 24), machine.size(4096, 17), machine.size(16, 4)
    made = layer(machine, "linear", K, N, r)
    inputs = {name: made[f"linear.{name}"].detach() for name in ("weight", "lora_A", "lora_B")}
    return Case(
        name=f"DoRA norms ({N}, {K}), r={r}",
        inputs=inputs,
        truth=plain(_norms),
        peers=[
            Peer("torch", plain(_norms)),
            Peer("torch.compile", compiled(_norms)),
            Peer("ours", plain(partial(dora_norm, scaling=NORM_SCALING))),
        ],
        forward=Work(sum(t.nbytes for t in inputs.values()), 2 * N * K * r),
        both=None,
    )


def _norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """With the sum in memory, in the precision of the weight."""
    return torch.linalg.vector_norm(weight + NORM_SCALING * lora_B @ lora_A, dim=1, dtype=_wide(weight))


def _dora(i: Inputs) -> Tensor:
    w, a, b = (i[f"linear.{name}"] for name in ("weight", "lora_A", "lora_B"))
    changed = w + scaling(i) * b @ a
    norms = torch.linalg.vector_norm(changed.detach(), dim=1, dtype=_wide(w))  # a constant, as in the paper
    return F.linear(i["x"], changed) * (i["linear.magnitude"] / norms.to(w.dtype))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
