"""Adapters that act with a part of their strength, whatever they do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_peft.engine import Adapter, Layer


@contextmanager
def weakened(adapters: Sequence[Adapter], beta: float) -> Iterator[None]:
    """While it lasts, the change that each of ``adapters`` makes is multiplied with ``beta``."""

    def weaken(adapter: Adapter) -> None:
        forward, merged = adapter.forward, adapter.merged

        def weak_forward(x: Any, layer: Layer) -> Any:
            return torch.lerp(below := layer(x), forward(x, layer).to(below.dtype), beta)

        def weak_merged(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            new_weight, new_bias = merged(weight, bias)
            if new_bias is not None:
                new_bias = torch.lerp(torch.zeros_like(new_bias) if bias is None else bias.to(new_bias), new_bias, beta)
            return torch.lerp(weight.to(new_weight), new_weight, beta), new_bias

        adapter.__dict__.update(forward=weak_forward, merged=weak_merged)

    for adapter in adapters:
        weaken(adapter)
    try:
        yield
    finally:
        for adapter in adapters:
            del adapter.__dict__["forward"], adapter.__dict__["merged"]
