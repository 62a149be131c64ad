"""Points 4 and 5: linear layers with LoRA, alone and as the parts of a block, whose saved bytes are counted too."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from benchmarks.gpu.adapted import (
    Adapt,
    by_paca,
    by_peft,
    by_us,
    filled,
    layer,
    layers,
    scaling,
)
from benchmarks.gpu.bracketed import Bracketed, BracketedMLP
from benchmarks.gpu.case import (
    Build,
    Built,
    Case,
    Inputs,
    Machine,
    Output,
    Peer,
    Work,
    by_compiler,
    trained,
)
from lightning_peft.callbacks.fused import fused
from lightning_peft.kernels import lora_linear, rms_norm

EPS = 1e-6


class Single(nn.Module):
    """One linear layer."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class QKV(nn.Module):
    """A norm, and what attention reads."""

    def __init__(self, d: int, d_kv: int) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(d, EPS)
        self.q, self.k, self.v = (nn.Linear(d, width, bias=False) for width in (d, d_kv, d_kv))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x)
        return self.q(x), self.k(x), self.v(x)


class MLP(nn.Module):
    """A norm, and the feed-forward part of a block."""

    def __init__(self, d: int, d_gate: int) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(d, EPS)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=d_gate, num_attention_heads=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """Layers and blocks of Llama-3 8B, 8192 tokens."""
    shapes = (4096, 4096), (4096, 14336), (14336, 4096)
    sizes = [
        (machine.size(8192, 13), machine.size(K, 24), machine.size(N, 17), machine.size(r, 4))
        for (K, N), r in product(shapes, (8, 16, 64))
    ]
    return {
        4: [partial(single, machine, *size) for size in dict.fromkeys(sizes)],  # tiny ones are all the same
        5: [partial(block, machine, dropout) for block, dropout in product((qkv, mlp), (0.0, 0.05))],
    }


def single(machine: Machine, T: int, K: int, N: int, r: int) -> Case:
    """x (T, K) through a weight (N, K) with factors of rank r."""
    make = partial(Single, K, N)
    inputs = {"x": machine.randn(T, K, grad=True), **layer(machine, "linear", K, N, r)}
    large, thin, item = 2 * T * N * K, 2 * T * r * (K + N), machine.dtype.itemsize
    moved = (T * K + N * K + T * N + r * (K + N)) * item
    peers = [
        Peer("the frozen layer alone", lambda i: Built(partial(F.linear, i["x"], i["linear.weight"]), [i["x"]]), False),
        Peer("PEFT, float32 factors", adapted(make, by_peft(torch.float32))),
        Peer("PEFT", adapted(make, by_peft())),
        Peer("PEFT, torch.compile", adapted(make, by_peft(), compile=True)),
        Peer("bracketed addmm", functional(_bracketed)),
        Peer("ours, float32 factors", adapted(make, by_us(torch.float32))),
        Peer("ours", adapted(make, by_us())),
        Peer("ours, lora_linear", functional(_ours)),
    ]
    return Case(
        name=f"LoRA linear ({T}, {K}, {N}), r={r}",
        inputs=inputs,
        truth=functional(_dense),
        peers=peers,
        forward=Work(moved, large + thin),
        both=Work(2 * moved, 2 * large + 3 * thin),
    )


def qkv(machine: Machine, dropout: float) -> Case:
    """The norm and the three products behind it."""
    D, D_kv, r = machine.size(4096, 24), machine.size(1024, 8), machine.size(16, 4)
    shapes = {"q": (D, D), "k": (D, D_kv), "v": (D, D_kv)}

    def bracketed(i: Inputs) -> Output:
        x = rms_norm(i["x"], i["norm.weight"], EPS)
        return tuple(Bracketed.apply(x, scaling(i), *_layer(i, name)) for name in layers(i))

    return _block(machine, "norm, q, k, v", partial(QKV, D, D_kv), shapes, r, dropout, bracketed)


def mlp(machine: Machine, dropout: float) -> Case:
    """The norm and the gated feed-forward layers behind it."""
    D, D_gate, r = machine.size(4096, 24), machine.size(14336, 40), machine.size(16, 4)
    shapes = {"mlp.gate_proj": (D, D_gate), "mlp.up_proj": (D, D_gate), "mlp.down_proj": (D_gate, D)}

    def bracketed(i: Inputs) -> Output:
        x = rms_norm(i["x"], i["norm.weight"], EPS)
        return BracketedMLP.apply(x, scaling(i), *(t for name in layers(i) for t in _layer(i, name)))

    return _block(machine, "norm, gated MLP", partial(MLP, D, D_gate), shapes, r, dropout, bracketed)


def _block(
    machine: Machine, what: str, make: Callable[[], nn.Module], shapes: dict[str, tuple[int, int]], r: int,
    dropout: float, bracketed: Callable[[Inputs], Output],
) -> Case:  # fmt: skip
    T, D, item = machine.size(8192, 13), next(iter(shapes.values()))[0], machine.dtype.itemsize
    inputs = {"x": machine.randn(T, D, grad=True), "norm.weight": 1 + machine.randn(D, scale=0.1)}
    for name, (d_in, d_out) in shapes.items():
        inputs |= layer(machine, name, d_in, d_out, r)
    large = sum(2 * T * d_in * d_out for d_in, d_out in shapes.values())
    thin = sum(2 * T * r * (d_in + d_out) for d_in, d_out in shapes.values())
    moved = (2 * T * D + sum(d_in * d_out for d_in, d_out in shapes.values())) * item
    same = dropout == 0  # else every peer draws its own mask
    peers = [
        Peer("PEFT, float32 factors", adapted(make, by_peft(torch.float32, dropout)), same),
        Peer("PEFT", adapted(make, by_peft(dropout=dropout)), same),
        Peer("bracketed addmm", functional(bracketed), same, "" if same else "knows no dropout"),
        Peer("ours, float32 factors", adapted(make, by_us(torch.float32, dropout), within=fused), same),
        Peer("ours", adapted(make, by_us(dropout=dropout), within=fused), same),
        Peer("our PaCA", adapted(make, by_paca, within=fused), False, "" if same else "knows no dropout"),
    ]
    return Case(
        name=f"{what} ({T}, {D}), r={r}, dropout {dropout:g}",
        inputs=inputs,
        truth=functional(lambda i: torch.func.functional_call(filled(make, i), _merged(i), i["x"])),
        peers=peers,
        forward=Work(moved, large + thin),
        both=Work(2 * moved, 2 * large + 3 * thin),
        counts_saved=True,
    )


def adapted(
    make: Callable[[], nn.Module], adapt: Adapt, *, within: Callable[[nn.Module], Any] | None = None,
    compile: bool = False,
) -> Build:  # fmt: skip
    """A model of ``x`` with adapters; ``within`` holds while it runs."""

    def build(inputs: Inputs) -> Built:
        model, x = filled(make, inputs), inputs["x"]
        leaves = [*([x] if x.requires_grad else []), *adapt(model, inputs)]
        run = by_compiler(model, x.device) if compile else model
        built = Built(partial(run, x), leaves)
        return built._replace(within=partial(within, model)) if within else built

    return build


def functional(function: Callable[[Inputs], Output]) -> Build:
    """A function of the inputs as a whole."""
    return lambda inputs: Built(partial(function, inputs), trained(inputs))


def _layer(i: Inputs, name: str) -> tuple[Tensor, Tensor, Tensor]:
    return i[f"{name}.weight"], i[f"{name}.lora_A"], i[f"{name}.lora_B"]


def _merged(i: Inputs) -> Inputs:
    """Weights with their updates in them."""
    return {f"{name}.weight": w + scaling(i) * b @ a for name in layers(i) for w, a, b in [_layer(i, name)]}


def _dense(i: Inputs) -> Tensor:
    return F.linear(i["x"], _merged(i)["linear.weight"])


def _bracketed(i: Inputs) -> Tensor:
    return Bracketed.apply(i["x"], scaling(i), *_layer(i, "linear"))


def _ours(i: Inputs) -> Tensor:
    w, a, b = _layer(i, "linear")
    return lora_linear(i["x"], w, None, a, b, scaling(i))
