"""Point 1: what the machine can do, measured in the same run: the ceilings that floors of times are computed from."""

from typing import NamedTuple

import torch

from benchmarks.gpu.case import Machine, Work
from benchmarks.gpu.clock import seconds


class Ceilings(NamedTuple):
    """Of memory, read and written bytes counted, and of matrix products."""

    bytes_per_s: float
    flops_per_s: float

    def __str__(self) -> str:
        return f"copies {self.bytes_per_s / 1e9:,.0f} GB/s, products {self.flops_per_s / 1e12:,.1f} TFLOP/s"

    def floor(self, work: Work) -> float:
        """Seconds that no way to do this work can go below."""
        return max(work.nbytes / self.bytes_per_s, work.flops / self.flops_per_s)


def ceilings(machine: Machine) -> Ceilings:
    """A copy of 4 GiB, and a product of two matrices of 8192 x 8192 random numbers."""
    return Ceilings(_copied_per_s(machine), _multiplied_per_s(machine))


def _copied_per_s(machine: Machine) -> float:
    source = machine.randn(machine.size(2**31, 2**16))
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), machine.device)


def _multiplied_per_s(machine: Machine) -> float:
    n = machine.size(8192, 64)
    x, y = machine.randn(n, n), machine.randn(n, n)
    return 2 * n**3 / seconds(lambda: x @ y, machine.device)
