"""Bone against blocks written out, its gradient, and HF PEFT."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import Bone, inject, merge, unmerge
from lightning_peft.engine import TargetError


@pytest.mark.parametrize("r", [1, 2, 3, 6])
def test_each_block_is_changed_by_the_map_of_its_row(r: int) -> None:
    base = nn.Sequential(nn.Linear(12, 6)).double()
    x, plain = torch.randn(2, 3, 12, dtype=torch.float64), copy.deepcopy(base)
    adapter = inject(base, Bone(r=r))[0].adapters["default"]
    nn.init.normal_(adapter.block)
    weight = plain[0].weight.detach().clone()
    for i in range(6 // r):
        for j in range(12 // r):
            block = weight[i * r : (i + 1) * r, j * r : (j + 1) * r]  # a view
            block += block @ adapter.block[i].detach() + adapter.block[i].detach()
    plain[0].weight.data = weight
    torch.testing.assert_close(base(x), plain(x))
    torch.testing.assert_close(merge(base)[0].weight.data, weight)
    assert unmerge(base)[0].adapters["default"] is adapter


def test_the_gradient_of_a_map_is_that_of_the_weight_through_the_blocks() -> None:
    base = inject(nn.Sequential(nn.Linear(6, 4)).double(), Bone(r=2))
    x = torch.randn(5, 6, dtype=torch.float64)
    base(x).square().sum().backward()
    G = (2 * base(x).detach()).T @ x  # of the weight
    W = base[0].weight.detach()
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        columns = [slice(2 * j, 2 * j + 2) for j in range(3)]
        expected = sum(W[rows, c].T @ G[rows, c] + G[rows, c] for c in columns)
        torch.testing.assert_close(base[0].adapters["default"].block.grad[i], expected)


def test_the_same_output_as_hf_peft() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 12))
    config = peft.MissConfig(r=3, target_modules=["0", "1"], init_weights="bat")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model
    inject(base, Bone(r=3, target_modules=("0", "1")))
    for ours, other in zip(base, theirs, strict=True):
        nn.init.normal_(ours.adapters["default"].block, std=0.3)
        other.miss_block["default"].data.copy_(ours.adapters["default"].block)
    x = torch.randn(5, 9)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_blocks_that_do_not_tile_a_weight_are_refused_with_those_that_do() -> None:
    model = nn.Sequential(nn.Linear(12, 18))
    with pytest.raises(TargetError, match=r"r=4 does not divide both widths of '0' \(18 x 12\). Take .*\(1, 2, 3, 6\)"):
        inject(model, Bone(r=4))
    assert type(model[0]) is nn.Linear
