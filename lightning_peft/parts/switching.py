"""Which parameters train at the moment: drawing blocks, freezing and unfreezing them, and the moments they leave."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.engine import TargetError, Training
from lightning_peft.engine.targets import is_below
from lightning_peft.parts.blocks import find_blocks

Moments = Literal["reset", "keep", "offload"]


def draw(weights: Tensor, k: int, seed: int, index: int) -> list[int]:
    """``k`` different indices, drawn one after the other with chances in proportion to ``weights``.

    A function of its arguments alone: all devices draw the same, and so does a resumed run.

    >>> draw(torch.ones(5), 2, seed=0, index=7) == draw(torch.ones(5), 2, seed=0, index=7)
    True
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return sorted(torch.multinomial(weights.double(), k, replacement=False, generator=generator).tolist())


def let_train(training: Training, on: Collection[str], moments: Moments = "keep") -> None:
    """Of the parameters of this adapter, let those named in ``on`` train and freeze the others.

    All of them have to be in the optimizer from the start: it passes over those without a gradient.

    Args:
        training: the loop.
        on: names of parameters; what training begins with does not matter.
        moments: what becomes of the optimizer state of a frozen parameter: it is forgotten (``"reset"``), it stays
            (``"keep"``), or it waits in main memory (``"offload"``).
    """
    for name, parameter in training.parameters().items():
        parameter.requires_grad_(name in on)
        if name not in on:
            parameter.grad = None  # a gradient that is left behind would be applied by the next step
        for optimizer in training.optimizers:
            if moments == "reset" and name not in on:
                optimizer.state.pop(parameter, None)
            elif moments == "offload" and parameter in optimizer.state:
                device = parameter.device if name in on else torch.device("cpu")
                state = optimizer.state[parameter]
                state.update({key: _moved(value, parameter, device) for key, value in state.items()})


def let_blocks_train(training: Training, blocks: Sequence[str], on: Collection[int], moments: Moments) -> None:
    """`let_train` for the blocks of these indices, and for all that lies outside of the blocks."""
    frozen = [block for i, block in enumerate(blocks) if i not in on]
    names = [name for name in training.parameters() if not any(is_below(name, block) for block in frozen)]
    let_train(training, names, moments)


def let_all_train(training: Training) -> None:
    """Every parameter of this adapter requires gradients again, as it did before training."""
    for parameter in training.parameters().values():
        parameter.requires_grad_(True)
    training.is_new(None)


def blocks_to_draw(
    model: nn.Module,
    blocks: str | Sequence[str] | None,
    n_layers: int,
    who: str,
    trained: Collection[str] | None = None,
) -> list[str]:
    """`find_blocks`, of which there must be ``n_layers`` at least; those without any of ``trained`` are left out.

    Raises:
        TargetError: there are fewer, or none.
    """
    found = find_blocks(model, blocks, who)
    if trained is not None:  # a step in which nothing trains would be lost
        found = [block for block in found if any(is_below(name, block) for name in trained)]
    if n_layers > len(found):
        raise TargetError(
            f"{who}: n_layers={n_layers}, but there are {len(found)} blocks to draw, {found[0]} to {found[-1]}. Lower "
            "it, or name finer blocks in blocks=."
        )
    return found


def _moved(value: object, parameter: nn.Parameter, device: torch.device) -> object:
    # only what is as large as the parameter: a step counter stays where its optimizer put it
    return value.to(device) if isinstance(value, Tensor) and value.shape == parameter.shape else value
