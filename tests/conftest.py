"""What holds in every test: seeded, one thread, and no memory that happens to be zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

torch.set_num_threads(1)  # several workers share the cores
_device_constructors()  # remembers what `with torch.device(...)` acts on: before any of it is replaced below


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for each test, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floats with NaN: a parameter that nobody fills cannot pass by luck."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            with torch.no_grad():
                return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
