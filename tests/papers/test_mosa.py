"""MoSA against n masked copies of the split matrices, as its authors keep them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import AdapterError, AdaptFormer, MoSA, inject
from lightning_peft.engine import adapters_of, notify
from lightning_peft.methods.features.mosa import SplitBottleneck
from tests.methods.backbones import moved, tiny


def splits(model: nn.Module) -> list[Any]:
    return [adapter for _, _, adapter in adapters_of(model) if isinstance(adapter, SplitBottleneck)]


def stack(method: MoSA) -> nn.Module:
    return inject(tiny(method).double(), method)


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_the_shares_are_a_partition_into_equal_parts(share: Any) -> None:
    for adapter in splits(stack(MoSA(r=5, n=4, share=share))):
        split = {name for name, _ in adapter.named_buffers() if name.endswith("_share")}
        assert split == {f"{name}_share" for name in ("down", "up") if name != share}
        for name in split:
            owners = getattr(adapter, name)
            assert owners.shape == getattr(adapter, name.removesuffix("_share")).shape
            assert owners.unique(return_counts=True)[1].tolist() == [15] * 4
    first, second = splits(stack(MoSA(r=5)))
    assert not torch.equal(first.up_share, second.up_share)


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_training_is_that_of_masked_copies(share: Any, merge: Any) -> None:
    """n copies with masked gradients, one of them drawn, and the masked mean or sum of what they have learnt."""
    method = MoSA(r=3, n=3, share=share, merge=merge, dropout=0.0, seed=4)
    model, plain = stack(method).train(), inject(tiny(method).double(), AdaptFormer(r=3, dropout=0.0)).train()
    theirs: list[Any] = [a for _, _, a in adapters_of(plain) if hasattr(a, "up")]
    copies: list[dict[str, list[Tensor]]] = []
    for ours, other in zip(splits(model), theirs, strict=True):
        other.load_state_dict({key: value for key, value in ours.state_dict().items() if key in other.state_dict()})
        names = [name for name in ("down", "up") if name != share]
        copies.append({name: [getattr(ours, name).detach().clone() for _ in range(3)] for name in names})
    start = [{name: kept[0].clone() for name, kept in each.items()} for each in copies]
    x, goal = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 3).double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    shared = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.5)
    drawn = set()
    for step in range(9):
        notify(model, "on_train_batch_start", optimizer, step=step)
        choices = [dict(zip(("down", "up"), ours.choice.tolist(), strict=True)) for ours in splits(model)]
        drawn |= {(i, name, choice[name]) for i, choice in enumerate(choices) for name in copies[0]}
        with torch.no_grad():
            for other, each, choice in zip(theirs, copies, choices, strict=True):
                for name, kept in each.items():
                    getattr(other, name).copy_(kept[choice[name]])
        loss = F.mse_loss(model(x), goal)
        torch.testing.assert_close(loss, F.mse_loss(plain(x), goal))
        for m, o in ((model, optimizer), (plain, shared)):
            o.zero_grad()
            F.mse_loss(m(x), goal).backward()
        for ours, other, each, choice in zip(splits(model), theirs, copies, choices, strict=True):
            for name, kept in each.items():
                mask = getattr(ours, f"{name}_share") == choice[name]
                kept[choice[name]] -= 0.5 * mask * getattr(other, name).grad
        optimizer.step()
        shared.step()
    assert len(drawn) > 3 * len(copies[0])  # all adapters and matrices have drawn several
    for ours, each, first in zip(splits(model), copies, start, strict=True):
        for name, kept in each.items():
            shares = getattr(ours, f"{name}_share")
            learnt = sum((shares == i) * (copy - first[name]) for i, copy in enumerate(kept))
            merged = first[name] + (learnt / 3 if merge == "mean" else learnt)
            torch.testing.assert_close(ours.eval().matrices()[name == "up"], merged)
            assert not torch.equal(merged, first[name])


def test_what_is_not_drawn_acts_as_at_the_start_even_with_weight_decay() -> None:
    model = stack(MoSA(r=3, n=2, share="none", dropout=0.0)).train()
    adapter = splits(model)[0]
    starts = {"down": adapter.down.detach().clone(), "up": torch.zeros_like(adapter.up)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    notify(model, "on_train_batch_start", optimizer, step=0)
    model(torch.randn(2, 5, 7).double()).square().sum().backward()
    optimizer.step()
    for i, name in enumerate(("down", "up")):
        rests = getattr(adapter, f"{name}_share") != adapter.choice[i]
        assert rests.any()
        assert not getattr(adapter, name).grad[rests].any()
        assert torch.equal(adapter.matrices()[i][rests], starts[name][rests])
        assert (adapter.matrices()[i][~rests] != starts[name][~rests]).all()


def test_draws_follow_from_the_seed_and_the_step() -> None:
    def choices(seed: int, steps: range) -> list[list[int]]:
        model = stack(MoSA(r=3, seed=seed))
        optimizer = torch.optim.SGD(model.parameters())
        seen = []
        for step in steps:
            notify(model, "on_train_batch_start", optimizer, step=step)
            seen.append([number for adapter in splits(model) for number in adapter.choice.tolist()])
        return seen

    whole = choices(1, range(40))
    assert choices(1, range(20, 40)) == whole[20:]
    assert choices(2, range(40)) != whole
    for i in range(4):  # each of the two adapters draws for both matrices, on its own
        assert {each[i] for each in whole} == {0, 1, 2, 3}
    assert len({tuple(each) for each in whole}) > 30


def test_evaluation_and_a_loop_without_events_use_all_of_it() -> None:
    method = MoSA(r=3, n=3, dropout=0.0)
    model = moved(stack(method))
    x = torch.randn(2, 5, 7).double()
    y = model.eval()(x)
    assert torch.equal(model.train()(x), y)
    notify(model, "on_train_batch_start", torch.optim.SGD(model.parameters()), step=3)
    assert not torch.allclose(model(x), y)
    assert torch.equal(model.eval()(x), y)


@pytest.mark.parametrize("arguments", [{"n": 1}, {"n": 256}, {"n": 0}, {"r": 0}, {"share": "both"}])
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"MoSA: {next(iter(arguments))} must be .*, got "):
        MoSA(**arguments)
