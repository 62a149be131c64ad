"""BitFit: the biases of the whole model train as they would in plain PyTorch, and nothing else does."""

import copy

import torch
from torch import nn
from torch.optim import AdamW

from lightning_peft import BitFit, inject, merge, unload
from tests.methods.backbones import backbone
from tests.papers.stack import loss, stack, steps


def test_every_bias_of_a_bert_trains_and_its_head() -> None:
    model = backbone("bert")
    names = [name for name, _ in model.named_parameters()]
    inject(model, BitFit())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in names if name.endswith(".bias") or name.startswith("classifier")}
    assert {"bert.embeddings.LayerNorm.bias", "bert.encoder.layer.0.attention.self.query.bias"} < trained


def test_it_trains_as_a_model_whose_weights_are_frozen() -> None:
    model, plain = inject(stack(2).double(), BitFit(modules_to_save=())), stack(2).double()
    chosen = [p for name, p in plain.named_parameters() if name.endswith("bias")]
    optimizer = AdamW(chosen, lr=0.01, weight_decay=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss(plain, step).backward()
        optimizer.step()
    steps(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1), 0, 4)
    before = dict(stack(2).double().named_parameters())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p, before[name]) != name.endswith("bias")


def test_a_created_bias_is_a_bias_that_starts_at_zero_and_goes_with_the_adapter() -> None:
    base = stack(1)
    model = inject(copy.deepcopy(base), BitFit(create_missing=True, target_modules="up", modules_to_save=()))
    with_bias = copy.deepcopy(base)
    with_bias.layers[0].up.bias = nn.Parameter(torch.zeros(12))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["layers.0.up.adapters.default.bias"], "`up` is the only layer without one"
    for net in (model, with_bias):
        loss(net, 0).backward()
    (created,) = trained.values()
    torch.testing.assert_close(created.grad, with_bias.layers[0].up.bias.grad)
    nn.init.ones_(created)
    assert torch.equal(merge(copy.deepcopy(model)).layers[0].up.bias, torch.ones(12))
    assert unload(model).layers[0].up.bias is None
