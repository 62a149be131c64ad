"""Ranks that layers compete for while training: how many there are, what each is worth, and which are kept.

What is measured of a parameter lies in the optimizer's own state of it, beside the moments: it is saved with them, and
starts afresh with them.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine import Training
from lightning_peft.parts.optimizers import state_of


def cubic_budget(step: int, first: int, last: int, begin: int, end: int) -> int:
    """How many ranks all layers have together: ``first`` until ``begin``, falling to ``last`` at ``end``.

    >>> [cubic_budget(step, first=20, last=4, begin=0, end=4) for step in range(6)]
    [20, 10, 6, 4, 4, 4]
    """
    if step <= begin:
        return first
    left = max(0.0, 1 - (step - begin) / (end - begin))
    return int((first - last) * left**3 + last)


def smoothed(averages: MutableMapping[str, Any], value: Tensor, beta1: float, beta2: float) -> None:
    """Take ``value`` into its moving average, and its distance from that into another one.

    Args:
        averages: holds both, ``"importance"`` and ``"uncertainty"``, which start at zero.
        value: of any shape.
        beta1: what is left of the old average.
        beta2: of the old uncertainty.
    """
    average = beta1 * averages.get("importance", torch.zeros_like(value)) + (1 - beta1) * value
    distance = (value - average).abs()
    averages["importance"] = average
    averages["uncertainty"] = beta2 * averages.get("uncertainty", torch.zeros_like(value)) + (1 - beta2) * distance


@torch.no_grad()
def measure_sensitivity(training: Training, parameter: nn.Parameter, beta1: float, beta2: float) -> None:
    """Take |p * gradient|, a first guess of what the loss would lose without p, into its moving averages."""
    if parameter.grad is not None:
        smoothed(state_of(training, parameter), (parameter * parameter.grad).abs(), beta1, beta2)


def score(training: Training, parameter: nn.Parameter) -> Tensor:
    """Sensitivity times uncertainty, of the shape of ``parameter``; zero where nothing was measured."""
    averages = state_of(training, parameter)
    if "importance" not in averages:
        return torch.zeros_like(parameter)
    return averages["importance"] * averages["uncertainty"]


def triplet_worths(training: Training, adapter: Any) -> Tensor:
    """(r,): the score of each number in lora_z, and the mean ones of its row of lora_A and its column of lora_B."""
    A, z, B = (score(training, factor) for factor in (adapter.lora_A, adapter.lora_z, adapter.lora_B))
    return z + A.flatten(1).mean(1) + B.mean(0)


def keep_largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """1 for the ``k`` largest of all numbers in ``scores`` (vectors), else 0; of equal ones, the first are kept.

    >>> keep_largest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0, 5.0])], 3)
    [tensor([1., 0.]), tensor([1., 0., 1.])]
    """
    together = torch.cat([s.cpu() for s in scores])
    kept = torch.zeros_like(together)
    kept[together.argsort(descending=True, stable=True)[:k]] = 1
    return [part.to(s) for part, s in zip(kept.split([len(s) for s in scores]), scores, strict=True)]
