"""Which implementation an operation runs: its Triton kernel on an accelerator, its PyTorch twin everywhere else.

``LIGHTNING_PEFT_KERNELS`` decides otherwise: ``torch`` takes the twin everywhere, ``triton`` the kernel and nothing
else, ``interpret`` runs kernels in Triton's interpreter (with ``TRITON_INTERPRET=1`` set before Python starts), on the
CPU too, which is how their arithmetic is tested without an accelerator.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch", "interpret"]
VARIABLE = "LIGHTNING_PEFT_KERNELS"

# multiply and add in one step: what Triton did by itself up to 3.9
OPTIONS = {"enable_fp_fusion": True}

HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def backend() -> Backend:
    """What ``LIGHTNING_PEFT_KERNELS`` asks for.

    Raises:
        ValueError: it is none of the four, or asks for what is not there.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in get_args(Backend):
        raise ValueError(f"{VARIABLE} must be one of {', '.join(map(repr, get_args(Backend)))}, got {asked!r}.")
    if asked in ("triton", "interpret") and not HAS_TRITON:
        raise ValueError(f"{VARIABLE}={asked} needs triton, which is not installed: pip install triton.")
    if asked == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{VARIABLE}=interpret needs TRITON_INTERPRET=1 too, set before Python starts.")
    return asked  # type: ignore[return-value]


def runs_triton(x: Tensor) -> bool:
    """Whether the kernel computes for ``x``: never in float64, since kernels add up in float32.

    Raises:
        ValueError: it is asked for, and ``x`` is not on an accelerator.
    """
    asked = backend()
    if asked == "triton" and not x.is_cuda:
        raise ValueError(f"{VARIABLE}=triton, and a tensor is on {x.device}. Move it, or set {VARIABLE}=auto.")
    there = asked == "interpret" or (asked != "torch" and HAS_TRITON and x.is_cuda)
    return there and x.dtype != torch.float64


def runs_eagerly(x: Tensor) -> bool:
    """Whether the twin computes for ``x``, and nobody traces it."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (traced or runs_triton(x))


def eager(forward: Callable[..., Any], setup: Callable[..., None], differentiate: Callable[..., Any]) -> Any:
    """A twin with its derivative, for calls that `runs_eagerly`: to call it costs half of a registered operation."""
    parts = {"forward": forward, "setup_context": setup, "backward": differentiate}
    made: Any = type("Twin", (torch.autograd.Function,), {name: staticmethod(part) for name, part in parts.items()})
    return made.apply


def accumulator(x: Tensor) -> torch.dtype:
    """The precision in which twins add up: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def refuse_second(name: str) -> None:
    """Raise in a backward pass of which somebody wants gradients.

    Raises:
        RuntimeError: it runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: gradients of gradients are not there, and create_graph=True asks for them. Leave that out, "
            "compute this part by plain torch, or, where PEFT put the operation in, use PEFT(method, kernels='off')."
        )
