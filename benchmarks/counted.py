"""Bytes of tensors, counted while a model computes: kept for the backward pass, and alive at a time.

Tensors without values (torch's ``FakeTensorMode``) do for most of it: nothing is computed then, and the figures do not
depend on the machine.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.row import saved_bytes
from lightning_peft.callbacks.fused import fused


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it lasts, and of those that live at a time.

    Of an operation it sees the answer alone; `PeakInside` looks into ours.

    Attributes:
        live: storage -> bytes, of those that live now.
        peak: the most bytes that lived at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; what it answers is new unless it was given."""
        output = func(*args, **(kwargs or {}))
        given = {key for key, _ in _storages((args, kwargs))}
        for key, storage in _storages(output):
            if key not in self.live.keys() | given:
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return output

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


class PeakInside(Peak):
    """The same, and it looks into our operations, of tensors with values: what they make and forget counts too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or what it consists of."""
        ours = OPDEFS.get(func._schema.name)
        if ours is None or not func._schema.name.startswith("lightning_peft::"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return ours._init_fn(*args, **(kwargs or {}))


def _storages(tree: Any) -> list[tuple[int, Any]]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [(storage._cdata, storage) for storage in (t.untyped_storage() for t in tensors)]


def step_bytes(
    adapted: nn.Module, batch: Callable[[], Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, int]:
    """Of a step of AdamW, on a copy of ``adapted`` without values.

    Args:
        adapted: what trains; it stays as it is.
        batch: makes a batch.
        loss: what is minimised, of a model and a batch.

    Returns:
        trainable: trained numbers; kept: bytes that the forward keeps for the backward pass, each storage once,
        parameters and buffers left out; kept_fused: the same, computed by our operations; peak: bytes of all tensors
        that a step holds at a time, beyond model and batch. Of what an operation of ours holds inside, nothing counts.
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(adapted)
    with mode:
        given = batch()
        trained = [p for p in model.parameters() if p.requires_grad]
        own = [*model.parameters(), *model.buffers()]
        counted = {"trainable": sum(p.numel() for p in trained)}
        counted["kept"] = saved_bytes(lambda: loss(model, given), own)
        with fused(model):
            counted["kept_fused"] = saved_bytes(lambda: loss(model, given), own)
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        with Peak() as peak:
            for _ in range(2):  # in the second, the moments are there
                loss(model, given).backward()
                optimizer.step()
                optimizer.zero_grad()
    return counted | {"peak": peak.peak}
