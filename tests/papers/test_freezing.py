"""Telly, HFT and LP-FT: which parameters train, and when."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_peft import HFT, LPFT, SORSA, AdapterError, LinearProbe, LoRA, Telly, inject
from lightning_peft.engine import adapters_of, get_method, notify
from tests.methods.backbones import backbone
from tests.papers.stack import stack, steps, trainable_blocks


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_telly_freezes_embeddings_and_the_lowest_blocks() -> None:
    model = inject(stack(), Telly(n_frozen=3))
    everything = {name for name, _ in stack().named_parameters()}
    assert trained(model) == {name for name in everything if name.startswith(("layers.3", "head"))}
    assert trainable_blocks(inject(stack(), Telly())) == [2, 3], "all but two by default"
    assert trained(inject(stack(), Telly(n_frozen=0))) == {n for n in everything if not n.startswith("embed")}
    with pytest.raises(AdapterError, match="n_frozen must be from 0 to 3, blocks there are, got 4"):
        inject(stack(), Telly(n_frozen=4))


def test_telly_ends_the_backward_pass_at_the_frozen_blocks() -> None:
    model, needs = inject(stack(), Telly(n_frozen=3)), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: needs.append(args[0].requires_grad))
    steps(model, SGD(model.parameters(), lr=0.1), 0, 1)
    assert needs == [False] * 4


def test_telly_keeps_a_head_that_is_tied_to_a_frozen_embedding() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11))
    inject(model, Telly(n_frozen=1))
    assert not model.lm_head.weight.requires_grad
    assert model.transformer.ln_f.weight.requires_grad


def test_hft_trains_half_of_each_category_of_each_block() -> None:
    model = inject(stack(6), HFT())
    for block in model.layers:
        assert sum(layer.weight.requires_grad for layer in (block.up, block.down)) == 1
    # one attention layer and one norm in each block: they train in every other block
    for category in ("attn", "norm"):
        on = [getattr(block, category).weight.requires_grad for block in model.layers]
        assert sum(on) == 3
        assert on[0] != on[1]
    assert {"embed.weight", "head.bias"} <= trained(model)
    assert all(block.attn.weight.requires_grad == block.attn.bias.requires_grad for block in model.layers)


def test_hft_tells_the_categories_of_a_llama_as_the_paper_does() -> None:
    model = backbone("llama")
    blocks = inject(model, HFT()).model.layers
    norms = ("input_layernorm", "post_attention_layernorm")
    feed_forward = [sum(p.requires_grad for p in block.mlp.parameters()) for block in blocks]
    for block in blocks:
        assert sum(getattr(block.self_attn, f"{name}_proj").weight.requires_grad for name in "qkvo") == 2
        assert sum(getattr(block, name).weight.requires_grad for name in norms) == 1
    assert sorted(feed_forward) == [1, 2], "of three, one more in every other block"


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.8])
def test_hft_draws_its_fraction_at_every_level(fraction: float) -> None:
    blocks = Counter(trainable_blocks(inject(stack(10), HFT(fraction=fraction, level="layer"))))
    assert abs(len(blocks) - 10 * fraction) < 1
    model = inject(stack(10), HFT(fraction=fraction, level="model"))
    layers = [m for block in model.layers for m in block.children()]
    assert abs(sum(m.weight.requires_grad for m in layers) - 40 * fraction) < 1


def test_hft_draws_another_half_for_another_stage_or_seed() -> None:
    first, again, second, seeded = (
        frozenset(trained(inject(stack(), HFT(stage=stage, seed=seed))))
        for stage, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert first == again
    assert len({first, second, seeded}) == 3


def test_hft_leaves_the_other_half_as_it_is() -> None:
    model = inject(stack(), HFT())
    steps(model, AdamW(model.parameters(), weight_decay=0.1), 0, 4)
    before = dict(stack().named_parameters())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained(model)


def test_lpft_is_a_probe_first() -> None:
    staged, probe = inject(stack(), LPFT(lp_epochs=2)), inject(stack(), LinearProbe())
    for model in (staged, probe):
        optimizer = AdamW(model.parameters(), lr=0.01)
        for epoch in range(2):
            steps(model, optimizer, 3 * epoch, 3 * epoch + 3, epoch=epoch)
    for a, b in zip(staged.parameters(), probe.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lpft_trains_everything_from_there_with_fresh_moments() -> None:
    model = inject(stack(), LPFT(lp_epochs=1))
    optimizer = AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, 0, 3, epoch=0)
    steps(model, optimizer, 3, 5, epoch=1)
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    before = dict(stack().named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lpft_before_another_method_trains_its_adapters_and_the_head() -> None:
    model = inject(stack(), LPFT(lp_epochs=1, method=LoRA(r=2)))
    optimizer = AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, 0, 2, epoch=0)
    assert not any(adapter.lora_B.any() for _, _, adapter in adapters_of(model))
    assert trained(model) == {"head.weight", "head.bias"}
    steps(model, optimizer, 2, 4, epoch=1)
    assert all(adapter.lora_B.any() for _, _, adapter in adapters_of(model))
    assert not model.layers[0].up.weight.requires_grad
    assert get_method("lpft")(method="lora") == LPFT(method=LoRA())


def test_lpft_forgets_no_moments_but_its_own() -> None:
    model, other = inject(stack(), LPFT(lp_epochs=1)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([*model.parameters(), other], lr=0.01)
    other.grad = torch.ones(3)
    steps(model, optimizer, 0, 1, epoch=0)
    steps(model, optimizer, 1, 2, epoch=1)
    assert optimizer.state[model.head.weight]["step"] == 1
    assert optimizer.state[other]["step"] == 1


def test_lpft_before_a_method_with_a_penalty_adds_it_when_the_adapters_train() -> None:
    host = SORSA(r=2, gamma=0.5, target_modules=r"layers\.\d\.up")
    model, plain = inject(stack(), LPFT(lp_epochs=1, method=host)), inject(stack(), host)
    for net in (model, plain):
        for _, _, adapter in adapters_of(net):
            adapter.lora_A.data.mul_(2)
    optimizer = SGD(model.parameters(), lr=0.1)
    for epoch, on in ((0, False), (1, True)):
        notify(model, "on_train_batch_start", optimizer, epoch=epoch)
        (value,) = notify(model, "on_before_optimizer_step", optimizer, epoch=epoch).values()
        assert value > 0
        assert [a.lora_A.grad is not None for _, _, a in adapters_of(model)] == [on] * 4
    notify(plain, "on_before_optimizer_step", optimizer)
    for (_, _, one), (_, _, other) in zip(adapters_of(model), adapters_of(plain), strict=True):
        assert torch.equal(one.lora_A.grad, other.lora_A.grad)
