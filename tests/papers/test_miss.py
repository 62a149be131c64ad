"""MiSS against sums written out, its gradient, and HF PEFT."""

import pytest
import torch
from torch import nn

from lightning_peft import MiSS, inject
from lightning_peft.engine import TargetError


@pytest.mark.parametrize("r", [3, 4, 10])
def test_input_features_that_agree_modulo_r_share_a_row(r: int) -> None:
    base = nn.Sequential(nn.Linear(10, 7)).double()
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    y = base(x)
    adapter = inject(base, MiSS(r=r))[0].adapters["default"]
    nn.init.normal_(adapter.block)
    expected = y + sum(x[..., i, None] * adapter.block[i % r] for i in range(10))
    torch.testing.assert_close(base(x), expected)


def test_the_gradient_of_the_block_is_that_of_the_sums() -> None:
    base = inject(nn.Sequential(nn.Linear(5, 3)).double(), MiSS(r=2))
    x = torch.randn(4, 5, dtype=torch.float64)
    base(x).square().sum().backward()
    sums = torch.stack([x[:, 0] + x[:, 2] + x[:, 4], x[:, 1] + x[:, 3]])
    torch.testing.assert_close(base[0].adapters["default"].block.grad, sums @ (2 * base(x).detach()))


@pytest.mark.parametrize("r", [3, 4])
def test_the_same_output_as_hf_peft(r: int) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 7))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 7)),
        peft.MissConfig(r=r, target_modules=["0", "1"], init_weights=False),
    ).base_model.model
    for ours, other in zip(base, theirs, strict=True):
        ours.load_state_dict(other.base_layer.state_dict())
    inject(base, MiSS(r=r, target_modules=("0", "1")))
    for ours, other in zip(base, theirs, strict=True):
        ours.adapters["default"].block.data.copy_(other.miss_block["default"])
    x = torch.randn(5, 9)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_more_sums_than_input_features_are_refused() -> None:
    with pytest.raises(TargetError, match="r=64 is more than the 9 input features of '0'"):
        inject(nn.Sequential(nn.Linear(9, 70)), MiSS())
