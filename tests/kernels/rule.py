"""When a kernel is right: no further from the truth in float64 than plain PyTorch in its own precision, or nearly."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("LIGHTNING_PEFT_KERNELS") == "interpret"
# kernels are tested where they would run, if they are not interpreted
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# the interpreter multiplies bit patterns of bfloat16, so it is left to the twins and to accelerators
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# what a result may be off by, relative to the truth, if plain PyTorch happens to be exact
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_near_truth(result: Tensor, plain: Tensor, truth: Tensor, what: str = "") -> None:
    """``result`` against the same in plain PyTorch, both against ``truth`` in float64."""
    assert result.dtype == plain.dtype, what
    assert result.shape == truth.shape, what
    assert result.isfinite().all(), what
    floor, truth = FLOOR[result.dtype], truth.double()
    ours, theirs = result.double() - truth, plain.double() - truth
    # where the truth is zero, the floor is absolute: rounding need not hit it
    size, largest = (truth.norm().item() or 1.0, truth.abs().max().item() or 1.0) if truth.numel() else (1.0, 1.0)
    assert ours.norm() <= max(2 * theirs.norm(), floor * size), f"{what}: {ours.norm() / size} against {floor}"
    if truth.numel():
        allowed = 4 * theirs.abs().max() + floor * largest
        assert (ours.abs() <= allowed).all(), f"{what}: {ours.abs().max()} against {allowed}"


def gradients(function: Callable[..., Tensor], inputs: Sequence[Any], upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs that require one, for this gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() if wants(x) else x for x in inputs]
    y = function(*leaves)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if wants(x))]


def wants(x: Any) -> bool:
    """Whether it is an input with a gradient."""
    return isinstance(x, Tensor) and x.requires_grad


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Any], upstream: Tensor) -> None:
    """Output and all gradients of ``ours`` by the rule; inputs stay as they are, and backward runs twice alike."""
    versions = [(x._version, x.clone()) if isinstance(x, Tensor) else None for x in inputs]
    exact = [x.detach().double().requires_grad_(x.requires_grad) if floating(x) else x for x in inputs]
    results = gradients(ours, inputs, upstream)
    expected, truth = gradients(plain, inputs, upstream), gradients(plain, exact, upstream.double())
    names = ["output", *(f"gradient of input {i}" for i, x in enumerate(inputs) if wants(x))]
    for name, result, reference, true in zip(names, results, expected, truth, strict=True):
        assert_near_truth(result, reference, true, name)
    for x, before in zip(inputs, versions, strict=True):
        if before is not None:
            assert x._version == before[0]
            assert torch.equal(x, before[1])
    leaves = [x.detach().clone().requires_grad_() if wants(x) else x for x in inputs]
    y, wanted = ours(*leaves), [x for x in leaves if wants(x)]
    once = torch.autograd.grad(y, wanted, upstream.to(y.dtype), retain_graph=True)
    again = torch.autograd.grad(y, wanted, upstream.to(y.dtype))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    ours(*leaves).mul_(2)  # an output that is a view could not be changed in place


def floating(x: Any) -> bool:
    """Whether it is a tensor of real numbers."""
    return isinstance(x, Tensor) and x.is_floating_point()


def upstreams(shape: Sequence[int]) -> list[Tensor]:
    """Gradients of an output of this shape as autograd hands them on: plain, expanded, strided, cut out of another."""
    *rest, last = shape
    return [
        torch.randn(shape),
        torch.ones(()).expand(shape),
        torch.randn(*rest, 2 * last)[..., ::2],
        torch.cat([torch.randn(shape), torch.randn(shape)], -1)[..., :last],
    ]
