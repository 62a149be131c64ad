"""A case: one shape of one operation, the ways to compute it, and how little work it takes."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

Output = Tensor | tuple[Tensor, ...]
Inputs = dict[str, Tensor]
Line = dict[str, Any]  # of the result: what `blank` in measured.py has, and what took part


@dataclass(frozen=True)
class Machine:
    """Where the cases run, and in which size.

    Args:
        device: of all tensors.
        tiny: small sizes in float32, which show that everything runs and agrees; else bfloat16 and the full sizes.
    """

    device: torch.device
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def wide(self) -> torch.dtype:
        """Of what results are compared with."""
        return torch.float64 if self.tiny else torch.float32

    def size(self, full: int, tiny: int) -> int:
        """One of the two."""
        return tiny if self.tiny else full

    def randn(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        """Normal random numbers: on zeros products run faster than on data."""
        values = torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale)
        return values.to(self.dtype).requires_grad_(grad)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers below ``high``."""
        return torch.randint(high, shape, device=self.device)


class Work(NamedTuple):
    """The least that any way has to move and to compute, in bytes and floating-point operations."""

    nbytes: float
    flops: float = 0.0


class Built(NamedTuple):
    """One way to compute a case, ready to run.

    Args:
        compute: the forward pass.
        leaves: what gets a gradient, in the order of what the results are compared with.
        within: what has to hold while it runs.
        step: a whole training step, to be timed in place of the forward and backward pass.
    """

    compute: Callable[[], Output]
    leaves: Sequence[Tensor]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: Callable[[], object] | None = None


Build = Callable[[Inputs], Built]


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    Args:
        name: in the table.
        build: makes it from the inputs of the case, which all peers share.
        checked: whether it computes what the case does; another function, timed beside it, does not.
        skipped: why it does not run; empty if it does.
    """

    name: str
    build: Build
    checked: bool = True
    skipped: str = ""


@dataclass
class Case:
    """One shape of one operation.

    Args:
        name: operation, sizes and options.
        inputs: tensors; those that require a gradient get one.
        truth: what is right, built from the inputs in a wider precision.
        peers: the ways to compute it.
        forward: least work of the forward pass; None if it is not timed.
        both: least work of the forward and the backward pass; None if there is no backward pass.
        counts_saved: whether to count what is saved for the backward pass.
        tokens: of a step, for tokens per second.
    """

    name: str
    inputs: Inputs
    truth: Build
    peers: list[Peer]
    forward: Work | None
    both: Work | None
    counts_saved: bool = False
    tokens: int = 0


def plain(function: Callable[..., Output]) -> Build:
    """A function of the inputs, by their names."""

    def build(inputs: Inputs) -> Built:
        return Built(partial(function, **inputs), trained(inputs))

    return build


def compiled(function: Callable[..., Output]) -> Build:
    """The same by ``torch.compile``, for these sizes alone."""

    def build(inputs: Inputs) -> Built:
        return plain(by_compiler(function, next(iter(inputs.values())).device))(inputs)

    return build


def by_compiler(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``function`` compiled; on the CPU, where nothing is timed in earnest, traced and no more."""
    return torch.compile(function, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")


def trained(inputs: Inputs) -> list[Tensor]:
    """Those that require a gradient."""
    return [t for t in inputs.values() if t.requires_grad]


def as_tuple(output: Output) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return (output,) if isinstance(output, Tensor) else output


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Leaves of their own with the same values, floating ones in ``dtype``."""

    def copy(t: Tensor) -> Tensor:
        new = t.detach().clone() if dtype is None or not t.is_floating_point() else t.detach().to(dtype)
        return new.requires_grad_(t.requires_grad)

    return {name: copy(t) for name, t in inputs.items()}


def missing(package: str) -> str:
    """Why a peer of this package does not run; empty if it is installed."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"
