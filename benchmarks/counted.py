"""Bytes of tensors, counted while a model computes: all that live at a time, and what a backward pass makes."""

import weakref
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
