"""Point 6: norms, gates, rotary positions, scale and shift. Only memory counts here, so work is in passes over it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.case import Case, Inputs, Machine, Output, Peer, Work, compiled, missing, plain
from lightning_peft.kernels import geglu, layer_norm, rms_norm, rope, scale_shift, swiglu

EPS = 1e-6


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """16384 tokens, rows of Llama-3 8B, and rows of a length that is not a power of two."""
    by_row = (rms_norms, added_rms_norms, layer_norms, scales_and_shifts)
    widths = dict.fromkeys(machine.size(C, 33) for C in (4096, 4097))
    made = [partial(make, machine, C) for C in widths for make in by_row]
    gates = [partial(gate, machine, name) for name in ("SwiGLU", "GeGLU")]
    return {6: [*made, *gates, partial(positions, machine)]}


def rms_norms(machine: Machine, C: int) -> Case:
    """With a frozen weight."""
    inputs = {"x": _rows(machine, C), "weight": 1 + machine.randn(C, scale=0.1)}
    peers = {
        "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
        "ours": lambda x, weight: rms_norm(x, weight, EPS),
    }
    return _case(f"RMSNorm, C={C}", inputs, torch_rms_norm, peers, liger_rms_norm, (2, 5))


def added_rms_norms(machine: Machine, C: int) -> Case:
    """The sum of a block's output and its input, and the norm of it, as two results."""
    inputs = {"x": _rows(machine, C), "residual": _rows(machine, C), "weight": 1 + machine.randn(C, scale=0.1)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Output:
        total = x + residual
        return rms_norm(total, weight, EPS), total

    def by_torch(x: Tensor, residual: Tensor, weight: Tensor) -> Output:
        total = x + residual
        return torch_rms_norm(total, weight), total

    def by_liger(x: Tensor, residual: Tensor, weight: Tensor) -> Output:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    # the two inputs have one gradient
    return _case(f"add and RMSNorm, C={C}", inputs, by_torch, {"ours": ours}, by_liger, (4, 8))


def layer_norms(machine: Machine, C: int) -> Case:
    """With frozen weight and bias."""
    inputs = {"x": _rows(machine, C), "weight": 1 + machine.randn(C, scale=0.1), "bias": machine.randn(C)}

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    def by_liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(x, weight, bias, EPS)

    return _case(f"LayerNorm, C={C}", inputs, by_torch, {"ours": partial(layer_norm, eps=EPS)}, by_liger, (2, 5))


def scales_and_shifts(machine: Machine, C: int) -> Case:
    """SSF: both train."""
    inputs = {"x": _rows(machine, C), "scale": (1 + machine.randn(C, scale=0.1)).requires_grad_()}
    inputs["shift"] = machine.randn(C, grad=True)

    def by_torch(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return scale * x + shift

    return _case(f"scale and shift, C={C}", inputs, by_torch, {"ours": scale_shift}, None, (2, 5))


def gate(machine: Machine, name: str) -> Case:
    """Of a feed-forward block."""
    inputs = {part: _rows(machine, machine.size(14336, 40)) for part in ("gate", "up")}

    def by_torch(gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate) if name == "SwiGLU" else F.gelu(gate, approximate="tanh")) * up

    def by_liger(gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return (LigerSiLUMulFunction if name == "SwiGLU" else LigerGELUMulFunction).apply(gate, up)

    ours = swiglu if name == "SwiGLU" else geglu
    return _case(f"{name}, I={machine.size(14336, 40)}", inputs, by_torch, {"ours": ours}, by_liger, (3, 8))


def positions(machine: Machine) -> Case:
    """RoPE of 32 heads of queries and 8 of keys, as projections leave them: positions before heads."""
    B, T, d = 4, machine.size(4096, 7), machine.size(128, 8)
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)[None]
    inputs = {"q": machine.randn(B, T, machine.size(32, 4), d, grad=True)}
    inputs["k"] = machine.randn(B, T, machine.size(8, 2), d, grad=True)
    inputs |= {
        name: f(angles).to(machine.device, machine.dtype) for name, f in (("cos", torch.cos), ("sin", torch.sin))
    }

    def by_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Output:
        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

        return turned(q.transpose(1, 2)), turned(k.transpose(1, 2))

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Output:
        return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    def by_liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Output:
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return _case(f"RoPE, {B} x {T}, d={d}", inputs, by_torch, {"ours": ours}, by_liger, (2, 4))


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Not in place, as the others."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _rows(machine: Machine, C: int) -> Tensor:
    return machine.randn(machine.size(16384, 13), C, grad=True)


def _case(
    name: str, inputs: Inputs, by_torch: Callable[..., Output], others: dict[str, Callable[..., Output]],
    by_liger: Callable[..., Output] | None, passes: tuple[int, int],
) -> Case:  # fmt: skip
    """``passes`` over the largest input (over q and k together): of the forward pass, and of both."""
    size = sum(t.nbytes for key, t in inputs.items() if key in ("x", "gate", "q", "k"))
    peers = [Peer("torch", plain(by_torch)), Peer("torch.compile", compiled(by_torch))]
    if by_liger:
        peers.append(Peer("Liger", plain(by_liger), skipped=missing("liger_kernel")))
    peers += [Peer(peer, plain(function)) for peer, function in others.items()]
    return Case(name, inputs, plain(by_torch), peers, Work(passes[0] * size), Work(passes[1] * size))
