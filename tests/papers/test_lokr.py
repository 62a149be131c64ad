"""LoKr against Kronecker products written out, and HF PEFT."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import AdapterError, LoKr, inject, merge


def moved(layer: nn.Module, method: LoKr) -> tuple[nn.Module, Any]:
    """``layer`` in double precision and its adapter, away from the start."""
    model = inject(nn.Sequential(layer).double(), method)
    generator = torch.Generator().manual_seed(5)
    for parameter in model[0].adapters.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model, model[0].adapters["default"]


def written_out(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Block (a, c) of the Kronecker product is w1[a, c] * w2."""
    return torch.cat([torch.cat([w1[a, c] * w2 for c in range(w1.shape[1])], dim=1) for a in range(w1.shape[0])])


def test_a_linear_layer_adds_the_kronecker_product() -> None:
    model, adapter = moved(nn.Linear(12, 20), LoKr(r=1, alpha=3.0))
    assert {n: tuple(p.shape) for n, p in adapter.named_parameters()} == {
        "lokr_w1": (4, 3),
        "lokr_w2_a": (5, 1),
        "lokr_w2_b": (1, 4),
    }
    delta = 3 * written_out(adapter.lokr_w1, adapter.lokr_w2_a @ adapter.lokr_w2_b)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (model[0].weight + delta).T + model[0].bias)


@pytest.mark.parametrize("r", [1, 4])
def test_a_grouped_convolution_adds_the_kronecker_product(r: int) -> None:
    conv = nn.Conv2d(8, 6, 3, padding=1, groups=2)
    model, adapter = moved(conv, LoKr(r=r, alpha=float(r), target_modules="0"))
    w2 = adapter.lokr_w2 if r == 4 else torch.einsum("kr,rnxy->knxy", adapter.lokr_w2_a, adapter.lokr_w2_b)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    weight = conv.weight + written_out(adapter.lokr_w1, w2)
    expected = nn.functional.conv2d(x, weight, conv.bias, padding=1, groups=2)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


def test_only_the_zero_matrix_has_a_gradient_at_the_start() -> None:
    for method, zero in ((LoKr(r=1), "lokr_w1"), (LoKr(r=1, decompose_both=True), "lokr_w1_a")):
        model = inject(nn.Sequential(nn.Linear(12, 20)), method)
        model(torch.randn(3, 12)).square().sum().backward()
        parameters = dict(model[0].adapters["default"].named_parameters())
        assert {name for name, p in parameters.items() if p.grad.any()} == {zero}


@pytest.mark.parametrize(
    "arguments", [{}, {"decompose_both": True}, {"decompose_factor": 2}, {"decompose_factor": 5}, {"r": 6}]
)
def test_the_same_shapes_and_output_as_hf_peft(arguments: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    arguments = {"r": 1, "alpha": 3.0, **arguments}
    base = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7))
    config = peft.LoKrConfig(target_modules=["0", "1"], init_weights=False, **arguments)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7)), config).base_model.model
    for ours, other in zip(base, theirs, strict=True):
        ours.load_state_dict(other.base_layer.state_dict())
    inject(base, LoKr(target_modules=("0", "1"), **arguments))
    for ours, other in zip(base, theirs, strict=True):
        for name, parameter in ours.adapters["default"].named_parameters():
            assert parameter.shape == getattr(other, name)["default"].shape
            parameter.data.copy_(getattr(other, name)["default"])
    x = torch.randn(5, 12)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_factor_of_zero_is_refused() -> None:
    with pytest.raises(AdapterError, match="decompose_factor must be -1 or an integer >= 1, got 0"):
        LoKr(decompose_factor=0)
