"""Methods that start at a part of the weight: exact in any precision, one over the other too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    CorDA,
    LoRA,
    PiSSA,
    SoMA,
    disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_peft.adapters.diagonal import GivenDiagonal
from lightning_peft.adapters.low_rank import Recentred
from lightning_peft.engine import METHODS, Method, adapters_of, calibrate

ABSORBING = [
    pytest.param(example, id=f"{name}-{i}")
    for name, cls in sorted(METHODS.items())
    if any(issubclass(adapter, Recentred | GivenDiagonal) for adapter in cls.adapter_types.values())
    for i, example in enumerate(cls.examples())
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.head = nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.v_proj(torch.tanh(self.q_proj(x))))


def base(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def measured(model: Net, method: Method, x: Tensor) -> Net:
    if method.calibrated:
        calibrate(model, [lambda: model(x).square().mean()])
    return model


@pytest.mark.parametrize("method", ABSORBING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_start_is_exact_in_any_precision_and_the_base_is_untouched(method: Method, dtype: torch.dtype) -> None:
    x = torch.randn(5, 16, dtype=dtype)
    model = measured(inject(base(dtype), method), method, x)
    parts = [a for _, _, a in adapters_of(model)]
    assert parts
    assert any(tensor.any() for a in parts for tensor in a.buffers())  # it does start at a part of the weight
    assert torch.equal(model(x), base(dtype)(x))
    for name, value in base(dtype).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def moved(model: Net) -> Net:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, _, adapter in adapters_of(model):
            for p in adapter.parameters():
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.mark.parametrize("second", [SoMA(r=3), PiSSA(r=2, alpha=4.0)], ids=repr)
def test_a_second_one_starts_at_what_the_first_has_made_of_the_weight(second: PiSSA, tmp_path: Path) -> None:
    first = PiSSA(r=2, target_modules=("q_proj", "v_proj"))
    model, x = moved(inject(base().double(), first)), torch.randn(5, 16).double()
    weight = base().double().q_proj.weight + model.q_proj.adapters["default"].delta()  # type: ignore[index, operator, union-attr]
    expected = model(x)
    inject(model, second, "second")
    U, values, Vh = torch.linalg.svd(weight, full_matrices=False)
    chosen = slice(-3, None) if isinstance(second, SoMA) else slice(2)
    adapter = model.q_proj.adapters["second"]  # type: ignore[index, union-attr]
    product = adapter.scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(product, U[:, chosen] * values[chosen] @ Vh[chosen])
    torch.testing.assert_close(model(x), expected)
    moved(model)
    y = model(x)
    torch.testing.assert_close(merge(model)(x), y)
    unmerge(model)
    save_adapter(model, tmp_path / "one", "default")
    save_adapter(model, tmp_path / "two", "second")
    again = load_adapter(base().double(), tmp_path / "one")
    load_adapter(again, tmp_path / "two", "second")
    torch.testing.assert_close(again(x), y)
    with disabled(model):
        assert torch.equal(model(x), base().double()(x))
    assert torch.equal(unload(model)(x), base().double()(x))


def test_a_measured_start_decomposes_the_sum_too() -> None:
    model = moved(inject(base().double(), LoRA(r=2, target_modules="q_proj")))
    weight = model.q_proj.weight + model.q_proj.adapters["default"].delta()  # type: ignore[index, operator, union-attr]
    inject(model, CorDA(r=2, target_modules="q_proj"), "second")
    calibrate(model, [lambda: model(torch.eye(16).double()).sum()], "second")  # no direction is preferred
    adapter = model.q_proj.adapters["second"]  # type: ignore[index, union-attr]
    values = torch.linalg.svdvals(adapter.scaling * adapter.lora_B @ adapter.lora_A)
    torch.testing.assert_close(values[:2], torch.linalg.svdvals(weight)[:2])


def test_over_plain_lora_the_start_is_that_of_the_sum() -> None:
    model = moved(inject(base().double(), LoRA(r=2, target_modules="q_proj")))
    weight = model.q_proj.weight + model.q_proj.adapters["default"].delta()  # type: ignore[index, operator, union-attr]
    inject(model, PiSSA(r=2, target_modules="q_proj"), "second")
    adapter = model.q_proj.adapters["second"]  # type: ignore[index, union-attr]
    values = torch.linalg.svdvals(adapter.scaling * adapter.lora_B @ adapter.lora_A)
    torch.testing.assert_close(values[:2], torch.linalg.svdvals(weight)[:2])
