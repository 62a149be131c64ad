"""SVFit against the formula of the paper, in float64."""

import torch
from torch import nn
from torch.optim import SGD

from lightning_peft import SVFit, inject, merge
from lightning_peft.engine import adapters_of
from tests.papers.stack import loss, stack, steps

LAYERS = r"layers\.\d\.(up|down|attn)"


def adapted(**changed: float) -> nn.Module:
    return inject(stack(2).double(), SVFit(r=2, target_modules=LAYERS, **changed))


def test_all_singular_values_of_the_merged_weight_are_the_trained_and_the_rest() -> None:
    model = adapted()
    steps(model, SGD(model.parameters(), lr=0.3), 0, 5)
    layers = [(module, module.weight.detach().clone(), a.lora_z.detach()) for _, module, a in adapters_of(model)]
    merge(model)
    for module, before, z in layers:
        values = torch.linalg.svdvals(before)
        assert (z - values[:2]).abs().min() > 1e-6, "both are trained"
        expected = torch.cat([z.abs(), values[2:]]).sort(descending=True).values
        torch.testing.assert_close(torch.linalg.svdvals(module.weight), expected)


def test_the_weight_moves_along_its_leading_directions() -> None:
    for _, module, adapter in adapters_of(adapted(alpha=6.0)):
        adapter.lora_z.data += torch.tensor([0.5, -0.2])
        W = module.weight
        values, V = torch.linalg.eigh(W.T @ W)  # another way to the same directions, ascending
        v = V[:, -2:].flip(1)
        u = W @ v / values[-2:].flip(0).sqrt()
        expected = W + 6.0 / 2 * u @ torch.diag(torch.tensor([0.5, -0.2]).double()) @ v.T
        torch.testing.assert_close(adapter.merged(W, None)[0], expected, rtol=1e-6, atol=1e-7)
        x = torch.linspace(-1, 1, module.in_features, dtype=torch.float64)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), expected @ x + bias, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_the_full_one_seen_along_them() -> None:
    model, full = adapted(), stack(2).double()
    for net in (model, full):
        loss(net, 0).backward()
    for path, _, adapter in adapters_of(model):
        gradient = full.get_parameter(f"{path}.weight").grad
        expected = torch.diag(adapter.lora_B.T @ gradient @ adapter.lora_A.T)
        torch.testing.assert_close(adapter.lora_z.grad, expected)


def test_only_the_values_move() -> None:
    model = adapted()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    steps(model, SGD(model.parameters(), lr=0.3), 0, 3)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_z"}
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert buffers
