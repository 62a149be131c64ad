"""Who reads a weight without calling its layer is found from the code, whatever the spelling."""

import functools
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import LoRA, inject, unload
from lightning_peft.engine import adapters_of
from lightning_peft.engine.readers import readers
from tests.engine.by_hand import assert_same, lora


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Reads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class ReadsThroughAVariable(Base):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.proj
        return x @ layer.weight.T + layer.bias


class ReadsInAnotherMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class ReadsInAnInnerFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        def project(h: Tensor) -> Tensor:
            return F.linear(h, self.proj.weight)

        return project(x)


class ReadsThroughAProperty(Base):
    @property
    def matrix(self) -> Tensor:
        return self.proj.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class ReadsInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layers[0].weight)


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    return wrapper


class ReadsBehindADecorator(Base):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class Inherits(Reads):
    pass


class HandsOverToItsParent(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class ReplacesItsParent(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AsksForItsType(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype))


class AsksWhatItIs(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) if isinstance(self.proj.weight, Tensor) else x


READING = [
    Reads,
    ReadsThroughAVariable,
    ReadsInAnotherMethod,
    ReadsInAnInnerFunction,
    ReadsThroughAProperty,
    ReadsInAList,
    ReadsBehindADecorator,
    Inherits,
    HandsOverToItsParent,
]


@pytest.mark.parametrize("cls", READING)
def test_a_weight_that_is_read_is_the_effective_one(cls: type[nn.Module]) -> None:
    model, reference = lora(nn.Sequential(cls().double()))
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_same(model, reference, x)
    assert_same(model, reference, x)


def test_a_forward_patched_onto_an_instance_may_read_too() -> None:
    base = nn.Sequential(Calls().double())
    base[0].forward = MethodType(Reads.forward, base[0])  # type: ignore[method-assign]
    model, reference = lora(base)
    assert_same(model, reference, torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("cls", [Calls, AsksForItsType, AsksWhatItIs, ReplacesItsParent])
def test_a_layer_that_is_called_has_no_readers(cls: type[nn.Module]) -> None:
    assert readers(nn.Sequential(cls()), "0.proj", "weight") == []


def test_a_layer_that_was_compiled_is_read_all_the_same() -> None:
    model = Reads()
    model.proj = torch.compile(model.proj)  # type: ignore[assignment]
    inject(model, LoRA(r=2, target_modules="proj"))
    ((_, layer, adapter),) = adapters_of(model)
    nn.init.ones_(adapter.lora_B)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), F.linear(x, layer.weight + adapter.delta(), layer.bias))


def test_containers_of_torch_that_read_are_found() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1)
    layer = encoder.layers[0]
    assert layer in readers(encoder, "layers.0.linear1", "weight")
    assert layer.self_attn in readers(encoder, "layers.0.self_attn.out_proj", "weight")
    assert layer in readers(encoder, "layers.0.self_attn", "in_proj_weight")


def test_reads_of_an_unrelated_owner_are_not_taken_for_its_own() -> None:
    class ReadsElsewhere(Base):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4))))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.deep(x), self.proj.weight)

    model = ReadsElsewhere()
    assert readers(model, "proj", "weight") == [model]
    assert readers(model, "deep.0.0.0", "weight") == []


def test_a_reader_keeps_a_child_of_its_own_that_is_called_adapters() -> None:
    class Reader(Reads):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleDict({"default": nn.Linear(4, 4)})

    model = nn.Sequential(Reader())
    keys = set(model.state_dict())
    inject(model, LoRA(r=2, target_modules="proj"))
    assert [path for path, _, _ in adapters_of(model)] == ["0.proj"]
    unload(model)
    assert set(model.state_dict()) == keys
