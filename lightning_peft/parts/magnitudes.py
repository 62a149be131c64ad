"""The absolute values of weights: which of them are the smallest."""

from collections.abc import Sequence

import torch
from torch import Tensor


def below_smallest(weights: Sequence[Tensor], share: float) -> Tensor:
    """The least float32 number that ``share`` of the absolute values of all ``weights`` together are below.

    It is found in two passes over the bits of the values, with nothing sorted and nothing joined.

    >>> below_smallest([torch.tensor([-3.0, 0.5]), torch.tensor([[1.0, -2.0]])], 0.5) > 1
    tensor(True)
    """
    wanted = max(1, round(share * sum(weight.numel() for weight in weights)))
    upper, lower = torch.zeros(2**15, dtype=torch.long), torch.zeros(2**16, dtype=torch.long)
    for weight in weights:
        upper += torch.bincount(_bits(weight) >> 16, minlength=len(upper)).cpu()
    first = int(torch.searchsorted(upper.cumsum(0), wanted))
    for weight in weights:
        bits = _bits(weight)
        lower += torch.bincount(bits[bits >> 16 == first] & 0xFFFF, minlength=len(lower)).cpu()
    last = int(torch.searchsorted(lower.cumsum(0), wanted - int(upper[:first].sum())))
    return torch.tensor((first << 16) + last + 1, dtype=torch.int32).view(torch.float32)


def _bits(weight: Tensor) -> Tensor:
    """Whole numbers in the order of the absolute values."""
    return weight.detach().flatten().float().abs().view(torch.int32)
