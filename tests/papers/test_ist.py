"""IST: importances from losses with weakened adapters; hosting other methods."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_peft import IA3, IST, AdapterError, LoRA, inject
from lightning_peft.engine import Method, TargetError, adapters_of, notify
from lightning_peft.parts.switching import draw
from lightning_peft.parts.weakening import weakened
from tests.papers.stack import batch, loss, stack, steps, trainable_blocks

HOST = LoRA(r=2, target_modules="up")


def importance(model: nn.Module) -> torch.Tensor:
    return model.__dict__["_peft"].injections["default"].state["importance"]


def off_start(model: nn.Module) -> nn.Module:
    for _, _, adapter in adapters_of(model):
        nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(3))
    return model


def test_importances_follow_the_formula() -> None:
    method = IST(method=HOST, n_layers=2, interval_steps=5, n_subsets=3, beta=0.25, mu=4.0, seed=1)
    model = off_start(inject(stack(), method))
    notify(model, "on_train_batch_start", [], step=5, loss=lambda: loss(model, 5))
    # weakening the update of a low-rank adapter is lowering its scale
    subsets = [draw(torch.ones(4), 2, 1, 1_000_000 + 5 * 3 + s) for s in range(3)]
    rewards, plain = [], off_start(inject(stack(), HOST))
    for subset in subsets:
        for path, _, adapter in adapters_of(plain):
            adapter.scaling.fill_(8.0 * (1.0 if int(path.split(".")[1]) in subset else 0.25))
        rewards.append(torch.exp(-loss(plain, 5).double()))
    expected = torch.zeros(4, dtype=torch.float64)
    for reward, subset in zip(rewards, subsets, strict=True):
        for block in subset:
            expected[block] += 4.0 * (reward - sum(rewards) / 3).detach()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(importance(model), expected, rtol=1e-4, atol=1e-6)


def test_beta_one_measures_nothing() -> None:
    model = off_start(inject(stack(), IST(method=HOST, n_layers=2, interval_steps=2, beta=1.0)))
    steps(model, SGD(model.parameters(), lr=0.0), 0, 7)
    torch.testing.assert_close(importance(model), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_all_blocks_are_the_host() -> None:
    hosted, plain = inject(stack(), IST(method=HOST, n_layers=4, interval_steps=3)), inject(stack(), HOST)
    for model in (hosted, plain):
        steps(model, SGD(model.parameters(), lr=0.1), 0, 8)
    for (_, _, a), (_, _, b) in zip(adapters_of(hosted), adapters_of(plain), strict=True):
        assert torch.equal(a.lora_B, b.lora_B)


def test_adapters_of_chosen_blocks_train_alone() -> None:
    model = inject(stack(), IST(method=LoRA(r=2, target_modules="all-linear", modules_to_save="head"), n_layers=1))
    seen: list[list[int]] = []
    steps(model, SGD(model.parameters(), lr=0.1), 0, 12, lambda step: seen.append(trainable_blocks(model)))
    assert all(len(blocks) == 1 for blocks in seen)
    assert len({blocks[0] for blocks in seen}) > 1
    assert model.head.weight.requires_grad, "what lies outside of the blocks trains always"


def test_important_blocks_are_chosen() -> None:
    model = inject(stack(), IST(method=HOST, n_layers=1, interval_steps=1000))
    importance(model)[2] = 50.0
    seen: set[int] = set()
    steps(model, SGD(model.parameters(), lr=0.1), 0, 20, lambda step: seen.update(trainable_blocks(model)))
    assert seen == {2}


@pytest.mark.parametrize("host", [HOST, IA3(target_modules="up")], ids=str)
def test_weakened_adapters_act_in_part_and_are_whole_again(host: LoRA | IA3) -> None:
    model, x = inject(nn.Sequential(stack().layers[0].up), LoRA(r=2, target_modules="0")), batch(0)[0].repeat(1, 2)
    base = model[0]
    nn.init.ones_(base.adapters["default"].lora_B)
    full, plain = model(x), x @ base.weight.T
    with weakened(list(base.adapters.values()), 0.25):
        torch.testing.assert_close(model(x), plain + 0.25 * (full - plain))
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("host", ["linearprobe", "bitfit", LoRA(r=2, target_modules="embed")], ids=str)
def test_a_method_without_adapters_in_the_blocks_is_refused(host: Method | str) -> None:
    model = stack()
    with pytest.raises(TargetError, match=r"puts no adapter into any of layers.0 to layers.3.* with LISA"):
        inject(model, IST(method=host))
    assert "_peft" not in model.__dict__


def test_blocks_in_which_nothing_trains_are_not_drawn() -> None:
    host = LoRA(r=2, target_modules=("layers.1.up", "layers.3.up"))
    model, seen = inject(stack(), IST(method=host, n_layers=1, interval_steps=2)), []
    steps(model, SGD(model.parameters(), lr=0.1), 0, 12, lambda step: seen.append(trainable_blocks(model)))
    assert {tuple(blocks) for blocks in seen} == {(1,), (3,)}
    assert importance(model).shape == (2,)
    with pytest.raises(TargetError, match=r"n_layers=3, but there are 2 blocks to draw, layers.1 to layers.3"):
        inject(stack(), IST(method=host, n_layers=3))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(AdapterError, match="method must be a method such as LoRA"):
        IST(method=3)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="unknown method 'lroa'. Did you mean 'lora'"):
        IST(method="lroa")
    with pytest.raises(AdapterError, match=r"beta must be a number in \[0, 1\], got 2"):
        IST(beta=2.0)
