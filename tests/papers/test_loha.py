"""LoHa against its dense formula and HF PEFT."""

import pytest
import torch
from torch import nn

from lightning_peft import LoHa, inject, merge


def moved(layer: nn.Module, method: LoHa) -> nn.Module:
    """``layer`` in double precision, its adapter away from the start."""
    model = inject(nn.Sequential(layer).double(), method)
    generator = torch.Generator().manual_seed(5)
    for parameter in model[0].adapters.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def dense(adapter: nn.Module, scaling: float) -> torch.Tensor:
    first = torch.einsum("or,ri...->oi...", adapter.hada_w1_a, adapter.hada_w1_b)
    return scaling * first * torch.einsum("or,ri...->oi...", adapter.hada_w2_a, adapter.hada_w2_b)


def test_a_linear_layer_adds_the_elementwise_product() -> None:
    model = moved(nn.Linear(9, 7), LoHa(r=2, alpha=6.0))
    x, layer = torch.randn(4, 3, 9, dtype=torch.float64), model[0]
    delta = dense(layer.adapters["default"], 6 / 2)
    torch.testing.assert_close(model(x), x @ (layer.weight + delta).T + layer.bias)
    assert torch.linalg.matrix_rank(delta) == 4, "r * r, more than two products of rank r could add up to"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_adds_the_elementwise_product(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    model = moved(conv, LoHa(r=2, alpha=2.0, target_modules="0"))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = conv.weight + dense(conv.adapters["default"], 1.0)
    expected = nn.functional.conv2d(x, weight, conv.bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


def test_only_the_zero_factor_has_a_gradient_at_the_start() -> None:
    model = inject(nn.Sequential(nn.Linear(9, 7)), LoHa(r=2))
    model(torch.randn(3, 9)).square().sum().backward()
    adapter = model[0].adapters["default"]
    assert {name for name, p in adapter.named_parameters() if p.grad.any()} == {"hada_w2_b"}
    assert adapter.hada_w1_b.abs().max() <= 1 / 9**0.5
    assert adapter.hada_w1_a.abs().max() > 1 / 9**0.5, "the bound of B is that of its own width"


def test_the_same_output_as_hf_peft() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 7))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 7)),
        peft.LoHaConfig(r=3, alpha=6, target_modules=["0"], init_weights=False),
    )
    layer = theirs.base_model.model[0]
    base[0].load_state_dict(layer.base_layer.state_dict())
    base[1].load_state_dict(theirs.base_model.model[1].state_dict())
    adapter = inject(base, LoHa(r=3, alpha=6.0, target_modules="0"))[0].adapters["default"]
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(getattr(layer, name)["default"])
    x = torch.randn(5, 9)
    torch.testing.assert_close(base(x), theirs(x))
    with theirs.disable_adapter():
        assert not torch.allclose(base(x), theirs(x))
