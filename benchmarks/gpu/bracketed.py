"""LoRA by few products in the right order, thin ones added into the outputs of large ones, as Unsloth does it.

An implementation of our own after that algorithm: (x A^T) B^T and (dy B) A in these brackets, x A^T made again in the
backward pass, and in an MLP the gated product as well. Nothing is overwritten that somebody else holds.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels import swiglu


def product(x: Tensor, scaling: float, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x W^T + s (x A^T) B^T for x (T, K)."""
    return (x @ weight.T).addmm_(x @ a.T, b.T, alpha=scaling)


def gradients(dy: Tensor, x: Tensor, scaling: float, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Those of x, A and B."""
    z = scaling * (dy @ b)
    return (dy @ weight).addmm_(z, a), z.T @ x, scaling * (dy.T @ (x @ a.T))


class Bracketed(torch.autograd.Function):
    """A linear layer: x (T, K), scaling, weight (N, K), lora_A (r, K), lora_B (N, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(x, weight, a, b)
        return product(x, scaling, weight, a, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *layer = ctx.saved_tensors
        dx, da, db = gradients(dy, x, ctx.scaling, *layer)
        return dx, None, None, da, db


class BracketedMLP(torch.autograd.Function):
    """x (T, K), scaling, then weight, lora_A and lora_B of gate, up and down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *layers: Tensor) -> Tensor:
        gate, up = product(x, scaling, *layers[:3]), product(x, scaling, *layers[3:6])
        ctx.scaling = scaling
        ctx.save_for_backward(x, gate, up, *layers)
        return product(swiglu(gate, up), scaling, *layers[6:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gate, up, *layers = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            h = swiglu(gate, up)
        dh, *ddown = gradients(dy, h.detach(), ctx.scaling, *layers[6:])
        dgate, dup = torch.autograd.grad(h, (gate, up), dh)
        dx, *dgates = gradients(dgate, x, ctx.scaling, *layers[:3])
        dx_up, *dups = gradients(dup, x, ctx.scaling, *layers[3:6])
        return dx.add_(dx_up), None, None, *dgates, None, *dups, None, *ddown
