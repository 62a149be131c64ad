"""NF4: weights in 4 bits, whose 16 levels are quantiles of the normal distribution (QLoRA, arXiv:2305.14314).

A weight is taken row by row and cut into blocks. A block keeps its largest absolute value, absmax, and for each weight
the code of the level that is nearest to w / absmax. Double quantisation keeps each absmax in 8 bits, in groups of 256
blocks. That is 4 + 32 / 64 = 4.5 bits a weight, or 4 + 8 / 64 + 32 / (64 * 256) = 4.127.

Codes and levels are those of bitsandbytes. Its double quantisation differs: it takes the mean off and rounds to levels
of 8-bit floats. Here an absmax is a multiple of 1/255 of the largest in its group, so that 0 and the largest are exact
and packing what was unpacked (in float32) gives the same again.
"""

import itertools
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 256  # blocks that share a scale


def _levels() -> tuple[float, ...]:
    # as many quantiles on either side as there are codes for: 8 above zero, 7 below
    tail = 0.9677083  # as the authors round the mean of 1 - 1/32 and 1 - 1/30

    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(tail + (0.5 - tail) * i / n) for i in range(n)]

    values = sorted([*quantiles(8), 0.0, *(-q for q in quantiles(7))])
    return tuple(value / values[-1] for value in values)


LEVELS = _levels()


class Packed(NamedTuple):
    """A weight in 4 bits.

    Args:
        codes: uint8 (n_blocks * block_size / 2,), two codes a byte, the first one in the high half; the last block is
            filled up with zeros.
        absmax: of each block, (n_blocks,): float32, or uint8 if quantised again.
        scale: the largest absmax of each group, float32 (n_groups,); None if absmax is not quantised.
    """

    codes: Tensor
    absmax: Tensor
    scale: Tensor | None


def nf4_pack(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Packed:
    """Round ``weight`` of any shape to 4 bits.

    Raises:
        ValueError: ``block_size`` is odd or less than 2, or ``weight`` has NaN or infinite values (in float32).
    """
    if block_size < 2 or block_size % 2:
        raise ValueError(f"nf4_pack: block_size must be even and at least 2, got {block_size}.")
    flat = weight.detach().reshape(-1).float()
    if not flat.isfinite().all():
        raise ValueError("nf4_pack: the weight has NaN or infinite values, which no level stands for.")
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    between = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(LEVELS)], device=flat.device)
    unit = blocks / absmax.where(absmax > 0, 1.0)[:, None]
    codes = torch.bucketize(unit, between, out_int32=True).to(torch.uint8).view(-1, 2)
    codes = codes[:, 0] << 4 | codes[:, 1]
    if not double_quant:
        return Packed(codes, absmax, None)
    groups = F.pad(absmax, (0, -len(absmax) % GROUP)).view(-1, GROUP)
    scale = groups.amax(1)
    steps = (groups / scale.where(scale > 0, 1.0)[:, None] * 255).round()
    return Packed(codes, steps.to(torch.uint8).view(-1)[: len(absmax)], scale)


def nf4_unpack(packed: Packed, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of this shape, computed in float32 and rounded to ``dtype``."""
    codes, absmax, scale = packed
    if scale is not None:
        absmax = scale.repeat_interleave(GROUP)[: len(absmax)] * (absmax / 255)
    levels = torch.tensor(LEVELS, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): the two weights of each byte
    blocks = F.embedding(codes.int(), pairs).view(len(absmax), 2 * len(codes) // max(len(absmax), 1)) * absmax[:, None]
    return blocks.view(-1)[: shape.numel()].view(shape).to(dtype)
