"""What tests of linear_cross_entropy share: the loss from all logits, a batch, and memory that is short."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.kernels import linear_cross_entropy
from tests.kernels.rule import INTERPRETED, check

module, in_rows, in_products = (
    importlib.import_module(f"lightning_peft.kernels.linear_cross_entropy{part}") for part in ("", "_rows", "_cut")
)
if INTERPRETED:  # several programs on each axis, several blocks in each, and none that divides a size
    in_rows.BLOCK, in_rows.N_BLOCKS = 8, 2
    in_products.PROGRAMS = 6
    in_products._blocks = lambda dtype: ({"BLOCK_T": 4, "BLOCK_V": 8, "BLOCK_D": 8}, {})
twin_only = pytest.mark.skipif(INTERPRETED, reason="of the twin, or of what both share")
kernels_only = pytest.mark.skipif(not INTERPRETED, reason="of the kernels")


@contextlib.contextmanager
def tiled(mode: str, V: int, size: int = 4) -> Iterator[None]:
    """As if memory were short: five rows of logits at a time, or five rows of a third of the vocabulary."""
    set_to = {
        "whole": {},
        "chunked": {"FEWEST_ROWS": 1, "LEAST_TILE": 1, "LOGITS_BUDGET": 5 * V * size},
        "cut": {"FEWEST_ROWS": 10**9, "CUT_ROWS": 5, "LEAST_TILE": 1, "LOGITS_BUDGET": 5 * (V // 3 + 1) * size},
    }[mode]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in set_to.items():
            patch.setattr(module, name, value)
        yield


MODES = ["chunked", "cut"] if INTERPRETED else ["whole", "chunked", "cut"]
every_mode = pytest.mark.parametrize("mode", MODES)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float | None = None, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The losses of all rows, from all logits."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip
    return losses.view(labels.shape) + z_loss * logits.logsumexp(-1).square() * (labels != ignore_index)


def batch(
    shape: tuple[int, ...], V: int, dtype: torch.dtype = torch.float32, *, head_trains: bool = False, bias: bool = True
) -> tuple[Any, ...]:
    """x, weight, bias and labels, every fourth of which is to be ignored."""
    *rows, D = shape
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_(head_trains)
    b = torch.randn(V, dtype=dtype).requires_grad_(head_trains) if bias else None
    labels = torch.randint(V, rows)
    labels.view(-1)[1::4] = -100
    return x, weight, b, labels


def compare(inputs: tuple[Any, ...], upstream: Tensor, **options: Any) -> None:
    """Losses and gradients by the rule, for the losses as for the logits that they come from."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, bias, reduction="none", **options).to(x.dtype)

    check(ours, lambda x, *rest: plain(x, *rest, **options).to(x.dtype), inputs, upstream)
