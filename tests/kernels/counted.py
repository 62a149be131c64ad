"""How many tensors of each size live at a time."""

from typing import Any

from benchmarks.counted import PeakInside


class Count(PeakInside):
    """The most storages of each size that live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        for size in self.live.values():
            self.most[size] = max(self.most.get(size, 0), list(self.live.values()).count(size))
        return output
