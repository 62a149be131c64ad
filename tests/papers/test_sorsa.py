"""SORSA against the formula of the paper, in float64."""

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_peft import SORSA, inject
from lightning_peft.engine import adapters_of, notify
from tests.papers.stack import loss, stack, steps

LAYERS = r"layers\.\d\.(up|down|attn)"


def adapted(**changed: float) -> nn.Module:
    return inject(stack(2).double(), SORSA(r=2, target_modules=LAYERS, **changed))


def distances(model: nn.Module) -> list[Tensor]:
    """Of A and B of each layer from orthonormal ones, by the sum over all entries."""
    found = []
    for _, _, adapter in adapters_of(model):
        A, B = adapter.lora_A, adapter.lora_B
        found += [((gram - torch.eye(2)) ** 2).sum() ** 0.5 for gram in (A @ A.T, B.T @ B)]
    return found


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for _, _, adapter in adapters_of(model):
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator)


def test_it_starts_at_orthonormal_vectors_and_at_the_singular_values() -> None:
    model = adapted()
    assert max(distances(model)) < 1e-12
    for _, module, adapter in adapters_of(model):
        torch.testing.assert_close(adapter.lora_z.data, torch.linalg.svdvals(module.weight)[:2])


def test_the_weight_is_that_of_the_paper() -> None:
    model = adapted(alpha=6.0)
    before = {path: [p.detach().clone() for p in a.parameters()] for path, _, a in adapters_of(model)}
    move(model)
    for path, module, adapter in adapters_of(model):
        A, B, z = before[path]
        residual = module.weight - 6.0 / 2 * B @ torch.diag(z) @ A
        expected = residual + 6.0 / 2 * adapter.lora_B @ torch.diag(adapter.lora_z) @ adapter.lora_A
        torch.testing.assert_close(adapter.merged(module.weight, None)[0], expected)
        x = torch.linspace(-1, 1, module.in_features, dtype=torch.float64)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), expected @ x + bias)


def test_the_penalty_is_the_mean_over_all_factors_and_weighted() -> None:
    model = adapted(gamma=0.7)
    move(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    (value,) = notify(model, "on_before_optimizer_step", optimizer).values()
    expected = 0.7 * torch.stack(distances(model)).mean()
    torch.testing.assert_close(value, expected.detach())
    for _, _, adapter in adapters_of(model):
        wanted = torch.autograd.grad(expected, [adapter.lora_A, adapter.lora_B], retain_graph=True)
        torch.testing.assert_close((adapter.lora_A.grad, adapter.lora_B.grad), wanted)
        assert adapter.lora_z.grad is None


def test_the_penalty_keeps_the_vectors_orthonormal_while_training() -> None:
    apart = []
    for gamma in (0.0, 0.5):
        model = adapted(gamma=gamma)
        optimizer = SGD(model.parameters(), lr=0.1)
        steps(model, optimizer, 0, 10)
        for lower in (1e-2, 1e-3):  # constant size of its gradient: it ends within one step of the minimum
            optimizer.param_groups[0]["lr"] = lower
            steps(model, optimizer, 10, 15)
        apart.append(sum(distances(model)).item())
    assert apart[1] < 0.3 * apart[0]


def test_without_gamma_no_gradient_is_added() -> None:
    model = adapted(gamma=0.0)
    loss(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1)) == {}
    assert all(map(torch.equal, before, [p.grad for p in model.parameters() if p.grad is not None]))
