"""Banks: fixed random numbers that all layers share, made again from a seed wherever they are needed."""

import weakref
import zlib
from typing import Any

import torch
from torch import Tensor

from lightning_peft.engine import Adapter


class Bank:
    """Rows of ``width`` random numbers, uniform in [-1, 1]; one copy for each device and precision.

    A row depends on the name, the seed, the width and its number alone. So a larger bank begins with the numbers of a
    smaller one, and what a layer sees does not depend on which others there are: layers may be added later.

    A bank is neither a parameter nor a buffer: checkpoints, files and pickles hold its name and its seed, copies of a
    model share it, and data parallel training sends nothing of it. Call `bank` for one.
    """

    def __init__(self, name: str, seed: int, width: int) -> None:
        self.name, self.seed, self.width = name, seed, width
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def rows(self, n: int, like: Tensor) -> Tensor:
        """The first ``n`` rows (n, width), on the device and in the precision of ``like``; a view."""
        held = self._copies.get((like.device, like.dtype))
        if held is None or len(held) < n:
            held = self._copies[like.device, like.dtype] = self._draw(n, like)
        return held[:n]

    def _draw(self, n: int, like: Tensor) -> Tensor:
        # on the CPU, in single precision: other devices and precisions would draw other numbers
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.name}/{self.seed}/{self.width}".encode()))
        with torch.inference_mode(False):  # what is made within it could not be trained with later
            numbers = 2 * torch.rand(n, self.width, generator=generator, device="cpu", dtype=torch.float32) - 1
            return numbers.to(like.device, like.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return bank, (self.name, self.seed, self.width)


_BANKS: weakref.WeakValueDictionary[tuple[str, int, int], Bank] = weakref.WeakValueDictionary()


def bank(name: str, seed: int, width: int) -> Bank:
    """The one bank of this name, seed and width; it is forgotten with the last adapter that holds it.

    >>> bank("A", 0, 4) is bank("A", 0, 4)
    True
    """
    return _BANKS.setdefault((name, seed, width), Bank(name, seed, width))


class Banked(Adapter):
    """An adapter that reads banks in its forward; subclasses say in ``numbers`` what they read.

    The copy for a device is made when the adapter comes there: a compiled forward can read it, but not make it.
    """

    def numbers(self) -> tuple[Tensor, ...]:
        """The rows that the forward reads, where the parameters are."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> "Banked":
        super()._apply(fn, recurse)
        self.numbers()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.numbers()
