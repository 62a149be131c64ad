"""Gated activations: y = phi(gate) up, where phi is SiLU (SwiGLU) or GELU (GeGLU).

With s the sigmoid:  silu(g) = g s(g),  silu'(g) = s(g) (1 + g (1 - s(g))).
GELU by tanh:  gelu(g) = g s(2z),  gelu'(g) = s(2z) + 2 g s(2z) (1 - s(2z)) z',  z = k (g + 0.044715 g^3),
z' = k (1 + 0.134145 g^2),  k = sqrt(2 / pi);  half of 1 + tanh z is s(2z), which does not cancel.
GELU exactly:  gelu(g) = g P(g),  gelu'(g) = P(g) + g p(g),  P and p the normal distribution and its density.
Backward:  dgate = dy up phi'(gate),  dup = dy phi(gate), both into new tensors. Saves gate and up and nothing else.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels.backend import (
    HAS_TRITON,
    OPTIONS,
    accumulator,
    eager,
    refuse_second,
    runs_eagerly,
    runs_triton,
)
from lightning_peft.kernels.recipes import leave


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, in float32 and rounded once.

    Args:
        gate: any shape. A part of a wider tensor, such as a half of a fused projection, is read where it lies.
        up: as ``gate``.

    Returns:
        The shape and dtype of ``gate``.

    Raises:
        ValueError: ``gate`` and ``up`` differ in shape or dtype.
    """
    return _gated("swiglu", gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """GELU(gate) * up, in float32 and rounded once.

    Args:
        gate: any shape. A part of a wider tensor, such as a half of a fused projection, is read where it lies.
        up: as ``gate``.
        approximate: ``"tanh"``, or ``"none"`` for the exact GELU by the error function.

    Returns:
        The shape and dtype of ``gate``.

    Raises:
        ValueError: ``gate`` and ``up`` differ in shape or dtype, or ``approximate`` is neither of the two.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}.")
    return _gated("geglu", gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _gated(name: str, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{name}: gate and up must agree in shape and dtype, got {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}. Both come from projections of one input; cast or expand the odd one."
        )
    compute, again = (_eager, _twin) if runs_eagerly(gate) else (_forward, _forward)
    return leave(compute(gate, up, activation), functools.partial(again, activation=activation), gate, up)


@torch.library.custom_op("lightning_peft::gated", mutates_args=())
def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if runs_triton(gate):
        return _launch_forward(gate, up, activation)
    return _twin(gate, up, activation)


def _twin(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _activated(gate.to(accumulator(gate)), activation).mul_(up).to(gate.dtype).contiguous()


def _activated(g: Tensor, activation: str) -> Tensor:
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


@_forward.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("lightning_peft::gated_backward", mutates_args=())
def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, gate_trains: bool, up_trains: bool
) -> tuple[Tensor, Tensor]:
    if runs_triton(gate):
        return _launch_backward(dy, gate, up, activation, gate_trains, up_trains)
    return _twin_backward(dy, gate, up, activation, gate_trains, up_trains)


def _twin_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, gate_trains: bool, up_trains: bool
) -> tuple[Tensor, Tensor]:
    g, dgate, dup = gate.to(accumulator(gate)), gate.new_empty(0), gate.new_empty(0)
    if up_trains:
        dup = _activated(g, activation).mul_(dy).to(gate.dtype).contiguous()
    if gate_trains:
        m = dy.to(g.dtype) * up
        if activation == "silu":
            m = torch.ops.aten.silu_backward(m, g)
        else:
            m = torch.ops.aten.gelu_backward(m, g, approximate="tanh" if activation == "gelu_tanh" else "none")
        dgate = m.to(gate.dtype).contiguous()
    return dgate, dup


@_backward.register_fake
def _(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, gate_trains: bool, up_trains: bool
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape if gate_trains else 0), gate.new_empty(gate.shape if up_trains else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    refuse_second("swiglu" if ctx.activation == "silu" else "geglu")
    gate, up = ctx.saved_tensors
    gate_trains, up_trains = ctx.needs_input_grad[:2]
    backward = _twin_backward if runs_eagerly(gate) else _backward
    dgate, dup = backward(dy, gate, up, ctx.activation, gate_trains, up_trains)
    return dgate if gate_trains else None, dup if up_trains else None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
_eager = eager(_twin, _setup, _differentiate)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def activation_and_slope(g, ACTIVATION: tl.constexpr):
        if ACTIVATION == "silu":
            p = tl.sigmoid(g)
            slope = p * (1 + g * (1 - p))
        elif ACTIVATION == "gelu_tanh":
            k: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
            p = tl.sigmoid(2 * k * (g + 0.044715 * g * g * g))
            slope = p + 2 * g * p * (1 - p) * k * (1 + 0.134145 * g * g)
        else:
            p = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
            slope = p + g * tl.exp(-0.5 * g * g) * 0.3989422804014327  # 1 / sqrt(2 pi)
        return g * p, slope

    @triton.jit
    def _gated_forward(
        gate_ptr, up_ptr, y_ptr, C, gate_stride, up_stride, blocks,
        ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)  # before the first product: rows * C can exceed 32 bits
        row, columns = program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < C
        g = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
        y = activation_and_slope(g, ACTIVATION)[0] * u
        tl.store(y_ptr + row * C + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated_backward(
        dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, C, dy_stride, gate_stride, up_stride, blocks,
        ACTIVATION: tl.constexpr, GATE_TRAINS: tl.constexpr, UP_TRAINS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, columns = program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < C
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value, slope = activation_and_slope(g, ACTIVATION)
        if GATE_TRAINS:
            u = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
            dgate = dy * u * slope
            tl.store(dgate_ptr + row * C + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        if UP_TRAINS:
            dup = dy * value
            tl.store(dup_ptr + row * C + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)

    def _rows(*tensors: Tensor) -> list[Tensor]:
        """The same as rows whose elements lie side by side, without a copy where that can be; one row if all do."""
        if all(x.is_contiguous() for x in tensors):
            return [x.view(1, -1) for x in tensors]
        rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
        return [x if x.stride(-1) == 1 else x.contiguous() for x in rows]

    BLOCK = 2048

    def _launch_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        y = gate.new_empty(gate.shape)
        if y.numel():
            g, u = _rows(gate, up)
            blocks = triton.cdiv(g.shape[1], BLOCK)
            with torch.cuda.device_of(gate):
                _gated_forward[(g.shape[0] * blocks,)](
                    g, u, y, g.shape[1], g.stride(0), u.stride(0), blocks, ACTIVATION=activation, BLOCK=BLOCK,
                    num_warps=4, **OPTIONS,
                )  # fmt: skip
        return y

    def _launch_backward(
        dy: Tensor, gate: Tensor, up: Tensor, activation: str, gate_trains: bool, up_trains: bool
    ) -> tuple[Tensor, Tensor]:
        dgate, dup = (gate.new_empty(gate.shape if trains else 0) for trains in (gate_trains, up_trains))
        if gate.numel():
            d, g, u = _rows(dy, gate, up)
            blocks = triton.cdiv(g.shape[1], BLOCK)
            with torch.cuda.device_of(gate):
                _gated_backward[(g.shape[0] * blocks,)](
                    d, g, u, dgate, dup, g.shape[1], d.stride(0), g.stride(0), u.stride(0), blocks,
                    ACTIVATION=activation, GATE_TRAINS=gate_trains, UP_TRAINS=up_trains, BLOCK=BLOCK, num_warps=4,
                    **OPTIONS,
                )  # fmt: skip
        return dgate, dup

    # what is compiled ahead of time in the tests: kernel, types of its arguments, constants
    VARIANTS = [
        (kernel, types, {"ACTIVATION": activation, **constants, "BLOCK": BLOCK}, {"num_warps": 4})
        for activation in ("silu", "gelu_tanh", "gelu")
        for dtype in ("*bf16", "*fp32")
        for kernel, types, constants in (
            (_gated_forward, [dtype] * 3 + ["i32"] * 4, {}),
            (_gated_backward, [dtype] * 5 + ["i32"] * 5, {"GATE_TRAINS": True, "UP_TRAINS": True}),
        )
    ]
