"""Kernels are tested where they would run: on the GPU if there is one."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.rule import DEVICE


@pytest.fixture(autouse=True)
def on_the_gpu(seeded: None) -> Iterator[None]:
    """What a test makes is on the GPU, unless kernels are interpreted, or there is none."""
    with torch.device(DEVICE):
        yield
