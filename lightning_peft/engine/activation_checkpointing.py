"""Adapters inside of reentrant activation checkpoints.

``checkpoint(part, x, use_reentrant=True)`` gives its output a graph only if an input requires gradients. Below the
first adapter nothing does once the base is frozen, so the adapters inside ``part`` would silently not train.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction


class _Reentrant:
    """In the place of ``CheckpointFunction``: lets an input require gradients where none does."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        inputs = list(args)
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        floating = [i for i in tensors if inputs[i].is_floating_point()]
        if torch.is_grad_enabled() and floating and not any(inputs[i].requires_grad for i in tensors):
            inputs[floating[0]] = inputs[floating[0]].detach().requires_grad_()
        return CheckpointFunction.apply(function, preserve_rng_state, *inputs)


@contextmanager
def inputs_require_grad(module: Any = None) -> Iterator[None]:
    """While it lasts, the output of every reentrant checkpoint has a graph.

    ``PEFT`` enters it around each training step. A loop of your own needs it only with ``use_reentrant=True``, and not
    with language models of transformers, which let their embeddings require gradients by themselves then. It holds for
    all models; ``module`` is not looked at.
    """
    original = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _Reentrant  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = original  # type: ignore[misc]
