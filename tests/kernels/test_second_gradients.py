"""Gradients of gradients: right where an operation has them, an error that says what to do where it has not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, inject, kernels
from lightning_peft.callbacks.fused import fused
from tests.kernels.rule import DEVICE, INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel is asked")


def trained(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


PLACES, INDEX = torch.tensor([1, 3], device=DEVICE), torch.tensor([0, 1, -1], device=DEVICE)
REFUSING: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: kernels.rms_norm(x, None, 1e-6),
    "layer_norm": lambda x: kernels.layer_norm(x, None, None, 1e-6),
    "swiglu": lambda x: kernels.swiglu(x, x),
    "geglu": lambda x: kernels.geglu(x, x),
    "lora_linear": lambda x: kernels.lora_product(x, trained(2, 8), trained(4, 2), dropout=0.1),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, trained(9, 8).detach(), torch.tensor([1, 2, 8])),
    "linear_with_entries": lambda x: kernels.linear_with_entries(x, trained(4, 8).detach(), None, trained(2), PLACES),
    "conv_with_entries": lambda x: kernels.conv_with_entries(
        x[None], trained(2, 3, 2).detach(), None, trained(2), PLACES
    ),
    "linear_with_columns": lambda x: kernels.linear_with_columns(
        x, trained(4, 8).detach(), None, trained(4, 2), PLACES
    ),
    "linear_with_rows": lambda x: kernels.linear_with_rows(x, trained(4, 8).detach(), None, trained(2, 8), PLACES),
    "segment_lora": lambda x: kernels.segment_lora(x, trained(2, 2, 8), trained(2, 4, 2), INDEX, 1.0),
    "mixture_lora": lambda x: kernels.mixture_lora(x, trained(2, 2, 8), trained(2, 4, 2), trained(3, 2)),
}


@pytest.mark.parametrize("name", REFUSING)
def test_who_has_none_says_so_and_what_to_do(name: str) -> None:
    x = trained(3, 8)
    y = REFUSING[name](x).square().sum()
    with pytest.raises(RuntimeError, match=rf"^{name}: gradients of gradients are not there.*kernels='off'"):
        torch.autograd.grad(y, x, create_graph=True)


def test_scale_and_shift_rotations_and_linear_layers_in_4_bits_have_them() -> None:
    cos, sin = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    packed = kernels.nf4_pack(torch.randn(5, 8))
    for function, inputs in (
        (kernels.scale_shift, (trained(3, 8), trained(8), trained(8))),
        (lambda q, k: kernels.rope(q, k, cos, sin), (trained(1, 2, 3, 8), trained(1, 1, 3, 8))),
        (lambda x: kernels.nf4_linear(x, packed, (5, 8)), (trained(3, 8),)),
        (lambda x, w: kernels.deferred_linear(x, w).tanh(), (trained(3, 8), trained(9, 8))),
    ):
        assert torch.autograd.gradgradcheck(function, inputs)


def test_a_model_has_them_as_before_unless_it_is_computed_by_operations() -> None:
    model, x = inject(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)), LoRA(r=2)), torch.randn(4, 8)
    nn.init.normal_(model[1].adapters["default"].lora_B)
    factors = [p for p in model.parameters() if p.requires_grad]
    slope = torch.autograd.grad(model(x).square().sum(), factors, create_graph=True)
    assert all(g.any() for g in torch.autograd.grad(sum(s.square().sum() for s in slope), factors))
    with fused(model), pytest.raises(RuntimeError, match="kernels='off'"):
        torch.autograd.grad(model(x).square().sum(), factors, create_graph=True)
