"""What the user's optimizers hold of one parameter: its group, and its state.

What a method measures of a parameter while training may lie in that state, beside the moments: it is saved, resumed and
forgotten with them, and is in no adapter file. Optimizers fill the state in their first step, and some only if it is
empty: write to it in ``on_after_optimizer_step`` alone.
"""

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from lightning_peft.engine import Training


def state_of(training: Training, parameter: nn.Parameter) -> MutableMapping[str, Any]:
    """The state of ``parameter`` in the optimizer that steps with it; an empty one that nobody keeps if none does."""
    for optimizer in training.optimizers:
        groups = optimizer.param_groups
        if parameter in optimizer.state or any(p is parameter for group in groups for p in group["params"]):
            return optimizer.state[parameter]
    return {}


def group_of(training: Training, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter group that ``parameter`` is in; one with a learning rate of 0 if it is in none."""
    groups = (group for optimizer in training.optimizers for group in optimizer.param_groups)
    return next((group for group in groups if any(p is parameter for p in group["params"])), {"lr": 0.0})
