"""LaMDA++: ranks by the spectra of the weights, under one budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import AdapterError, LaMDAPlusPlus, inject, load_adapter, save_adapter
from lightning_peft.engine import TargetError, adapters_of
from lightning_peft.methods.lora.lamdaplusplus import allocated
from tests.papers.stack import batch, stack


def uneven(depth: int = 2) -> nn.Module:
    """Layers whose spectra fall at very different rates."""
    model = stack(depth).double()
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        U, values, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data = U * (0.3 + 0.1 * i) ** torch.arange(len(values)) @ Vh
    return model


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {path: len(adapter.lora_A) for path, _, adapter in adapters_of(model)}


def one_by_one(weights: list[torch.Tensor], budget: int) -> list[int]:
    """The rule, with energies from the eigenvalues of W W^T."""
    squares = [torch.linalg.eigvalsh(W @ W.T).flip(0)[: min(W.shape)] for W in weights]
    ranks = [1] * len(weights)
    while sum(ranks) < budget:
        kept = [float(own[:r].sum() / own.sum()) for own, r in zip(squares, ranks, strict=True)]
        free = [i for i, own in enumerate(squares) if ranks[i] < len(own)]
        ranks[min(free, key=lambda i: kept[i])] += 1
    return ranks


@pytest.mark.parametrize("r", [1, 2, 4])
def test_ranks_follow_the_rule_under_the_budget(r: int) -> None:
    model = inject(uneven(), LaMDAPlusPlus(r=r))
    found = list(ranks_of(model).values())
    assert sum(found) == r * len(found)
    assert found == one_by_one([module.weight for _, module, _ in adapters_of(model)], r * len(found))
    assert (len(set(found)) > 1) == (r > 1)


def test_no_layer_gets_more_than_it_can_use() -> None:
    # six layers of 6 x 6 or 6 x 12, and the 6 x 3 of the embedding, whose three equal values all stand out
    model = uneven()
    model.embed.weight.data = torch.eye(6, 3).double()
    found = ranks_of(inject(model, LaMDAPlusPlus(r=4)))
    assert found["embed"] == 3
    assert sum(found.values()) == 4 * len(found)


def test_each_layer_starts_at_as_many_triplets_and_answers_as_the_base() -> None:
    model = inject(uneven(), LaMDAPlusPlus(r=3, alpha=6.0))
    for path, module, a in adapters_of(model):
        values = torch.linalg.svdvals(module.weight)[: ranks_of(model)[path]]
        torch.testing.assert_close(6 / 3 * a.lora_N, values.diag())
        assert a.lora_B.shape == (module.out_features, len(values))
    x = batch(0)[0].double()
    assert torch.equal(model(x), uneven()(x))


def test_a_weight_of_zeros_or_of_one_row_asks_for_no_rank() -> None:
    assert allocated([torch.zeros(4), torch.tensor([2.0, 1.0, 1.0]), torch.ones(1)], 5) == [1, 3, 1]
    assert allocated([torch.ones(1), torch.zeros(4), torch.tensor([2.0, 1.0, 1.0])], 7) == [1, 3, 3]
    assert allocated([torch.zeros(2), torch.zeros(3)], 5) == [2, 3]


def test_a_file_decides_the_ranks(tmp_path: Path) -> None:
    model = inject(uneven(), LaMDAPlusPlus(r=2, target_modules=("up", "down")))
    for _, _, adapter in adapters_of(model):
        nn.init.normal_(adapter.lora_N)
    other = inject(uneven(), LaMDAPlusPlus(r=2, target_modules=("up", "down")))
    folder = save_adapter(model, tmp_path)
    tilted = uneven()  # a spectrum of its own, so that by itself it would have other ranks
    for name, p in tilted.named_parameters():
        if name.endswith("up.weight"):
            p.data = torch.eye(*p.shape).double()
    assert ranks_of(inject(tilted, LaMDAPlusPlus(r=2, target_modules=("up", "down")), name="x")) != ranks_of(other)
    loaded = load_adapter(tilted, folder, name="y", allow_other_base=True)
    mine = {path: len(a.lora_A) for path, _, a in adapters_of(loaded, "y")}
    assert mine == ranks_of(model)
    for (_, _, a), (_, _, b) in zip(adapters_of(loaded, "y"), adapters_of(model), strict=True):
        torch.testing.assert_close(a.delta(), b.delta())


def test_a_base_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = stack(1)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=r"'embed' has no values yet \(meta device\)\. Load the base first"):
        inject(model, LaMDAPlusPlus(r=2))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_budget_that_cannot_be_spent_is_refused_or_lowered() -> None:
    arguments: dict[str, Any] = {"r": 7, "target_modules": ("attn", "up")}
    with pytest.raises(TargetError, match=r"r=7 is more than these 4 layers can use, 6\.0\. Lower r, or set clip_rank"):
        inject(stack(2), LaMDAPlusPlus(**arguments))
    assert set(ranks_of(inject(stack(2), LaMDAPlusPlus(**arguments, clip_rank=True))).values()) == {6}


def test_given_ranks_are_refused() -> None:
    with pytest.raises(AdapterError, match="rank_pattern must be empty: the spectra decide; LaMDA takes ranks"):
        LaMDAPlusPlus(rank_pattern={"up": 1})
