"""Point 7, second half: weights in 4 bits (NF4), unpacked alone, and in a product."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.case import Build, Built, Case, Inputs, Machine, Peer, Work, compiled, missing, plain, trained
from lightning_peft.kernels.nf4 import LEVELS, Packed, nf4_pack, nf4_unpack

BLOCK = 64
Shape = tuple[int, int]


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """A weight (4096, 4096), and 1, 64 and 8192 tokens."""
    tokens = [machine.size(T, t) for T, t in ((1, 1), (64, 3), (8192, 13))]
    return {7: [partial(weight, machine), *(partial(product, machine, T) for T in tokens)]}


def weight(machine: Machine) -> Case:
    """From 4 bits to the precision of the model."""
    shape, inputs = _packed(machine)
    by_torch, ours = (partial(f, shape=shape, dtype=machine.dtype) for f in (unpacked, _ours))
    return Case(
        name=f"NF4 weight {shape} unpacked",
        inputs=inputs,
        truth=plain(partial(unpacked, shape=shape, dtype=machine.wide)),
        peers=[
            Peer("torch", plain(by_torch)),
            Peer("torch.compile", compiled(by_torch)),
            Peer("bitsandbytes", _bitsandbytes(shape), skipped=missing("bitsandbytes")),
            Peer("ours", plain(ours)),
        ],
        forward=Work(_nbytes(inputs) + shape[0] * shape[1] * machine.dtype.itemsize),
        both=None,
    )


def product(machine: Machine, T: int) -> Case:
    """x W^T; with a backward pass where there is more than one token."""
    shape, packed = _packed(machine)
    N, K = shape

    def in_two_steps(unpack: Callable[..., Tensor]) -> Build:
        return plain(lambda x, **packed: F.linear(x, unpack(**packed, shape=shape, dtype=x.dtype)))

    def ours(x: Tensor, codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
        from lightning_peft.kernels import nf4_linear

        return nf4_linear(x, Packed(codes, absmax, None), shape)

    moved, flops = _nbytes(packed) + (T * K + T * N) * machine.dtype.itemsize, 2 * T * N * K
    return Case(
        name=f"NF4 linear ({T}, {K}, {N})",
        inputs={"x": machine.randn(T, K, grad=T > 1), **packed},
        truth=in_two_steps(unpacked),
        peers=[
            Peer("the weight in full precision", _in_full(shape)),
            Peer("torch unpacks, then a product", in_two_steps(unpacked)),
            Peer("bitsandbytes", _bitsandbytes(shape), skipped=missing("bitsandbytes")),
            Peer("ours unpacks, then a product", in_two_steps(_ours)),
            Peer("ours", plain(ours)),
        ],
        forward=Work(moved, flops),
        both=Work(2 * moved, 2 * flops) if T > 1 else None,
    )


def unpacked(codes: Tensor, absmax: Tensor, levels: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """By a table look-up for each code."""
    each = torch.stack([codes >> 4, codes & 15], 1).view(-1, BLOCK).int()
    values = levels[each] * absmax[:, None]
    return values.view(-1)[: shape[0] * shape[1]].view(shape).to(dtype)


def _ours(codes: Tensor, absmax: Tensor, levels: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    return nf4_unpack(Packed(codes, absmax, None), torch.Size(shape), dtype)


def _packed(machine: Machine) -> tuple[Shape, Inputs]:
    """Blocks keep their absmax in float32, as all can read it."""
    N, K = machine.size(4096, 17), machine.size(4096, 24)
    codes, absmax, _ = nf4_pack(machine.randn(N, K, scale=K**-0.5), BLOCK, double_quant=False)
    levels = torch.tensor(LEVELS, device=machine.device)
    return (N, K), {"codes": codes, "absmax": absmax, "levels": levels}


def _nbytes(packed: Inputs) -> int:
    return packed["codes"].nbytes + packed["absmax"].nbytes


def _in_full(shape: Shape) -> Build:
    def build(inputs: Inputs) -> Built:
        x, packed = inputs["x"], {name: t for name, t in inputs.items() if name != "x"}
        return Built(partial(F.linear, x, unpacked(**packed, shape=shape, dtype=x.dtype)), trained(inputs))

    return build


def _bitsandbytes(shape: Shape) -> Build:
    """Its own codes of the same weight; of one that comes from four bits they are the same."""

    def build(inputs: Inputs) -> Built:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed = {name: t for name, t in inputs.items() if name != "x"}
        dtype = inputs["x"].dtype if "x" in inputs else torch.bfloat16
        codes, state = quantize_4bit(unpacked(**packed, shape=shape, dtype=dtype), blocksize=BLOCK, quant_type="nf4")
        if "x" not in inputs:
            return Built(partial(dequantize_4bit, codes, state), [])
        return Built(partial(bitsandbytes.matmul_4bit, inputs["x"], codes.t(), state), trained(inputs))

    return build
