"""LoRA-Pro against least squares: the step it makes is the best that two factors can make."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_peft import AdapterError, LoRAPro, inject
from lightning_peft.engine import adapters_of, notify
from tests.papers.stack import loss, stack, steps

S = 6 / 2


def moved(mode: Any = "plain") -> nn.Module:
    model = inject(stack(2).double(), LoRAPro(r=2, alpha=6.0, target_modules=("up", "down"), mode=mode))
    for i, (_, _, adapter) in enumerate(adapters_of(model)):
        generator = torch.Generator().manual_seed(i)
        adapter.lora_B.data = torch.randn(adapter.lora_B.shape, generator=generator, dtype=torch.float64)
    return model


def gradients() -> list[tuple[Any, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer: adapter, the gradient of its weight, raw gradients of A and B, and those of LoRA-Pro."""
    model, twin = moved(), stack(2).double()
    for path, _, adapter in adapters_of(model):
        twin.get_submodule(path).weight.data += S * (adapter.lora_B @ adapter.lora_A).detach()
    loss(twin, 0).backward()
    loss(model, 0).backward()
    raw = [(a.lora_A.grad.clone(), a.lora_B.grad.clone()) for _, _, a in adapters_of(model)]
    notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1))
    weights = [twin.get_submodule(path).weight.grad for path, _, _ in adapters_of(model)]
    found = zip(adapters_of(model), weights, raw, strict=True)
    return [(a, G, *before, a.lora_A.grad, a.lora_B.grad) for (_, _, a), G, before in found]


def nearest_step(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """The matrix s B M + s N A that is nearest to G, by least squares over all entries of M and N."""
    d_out, d_in = G.shape
    columns = torch.cat(
        [
            torch.kron(S * B, torch.eye(d_in, dtype=G.dtype)),
            torch.kron(torch.eye(d_out, dtype=G.dtype), S * A.T.contiguous()),
        ],
        1,
    )
    solution = torch.linalg.lstsq(columns, G.flatten()[:, None], driver="gelsd").solution
    return (columns @ solution).view(d_out, d_in)


def test_the_step_of_the_weight_is_the_nearest_to_that_of_full_fine_tuning() -> None:
    for adapter, G, _, _, new_A, new_B in gradients():
        A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
        nearest = nearest_step(A, B, G)
        torch.testing.assert_close(S * (B @ new_A + new_B @ A), nearest, rtol=1e-5, atol=1e-6 * float(G.norm()))
        assert (G - nearest).norm() > 1e-3 * G.norm(), "else the rank is no bound"


def test_of_all_such_gradients_it_takes_those_nearest_to_the_raw_ones() -> None:
    for adapter, _, raw_A, raw_B, new_A, new_B in gradients():
        A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
        X = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # another choice with the same step
        distance = (new_A + X @ A - raw_A).square().sum() + (new_B - B @ X - raw_B).square().sum()
        slope = torch.autograd.grad(distance, X)[0]
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5 * distance.item())


def test_the_first_step_moves_the_weight_by_its_gradient_along_a() -> None:
    model = inject(stack(2).double(), LoRAPro(r=2, alpha=6.0))
    base = stack(2).double()
    loss(base, 0).backward()
    steps(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), 0, 1)
    for path, module, adapter in adapters_of(model):
        A = adapter.lora_A.detach()
        along = base.get_submodule(path).weight.grad @ torch.linalg.pinv(A) @ A
        moved_by = adapter.merged(module.weight, None)[0].detach() - module.weight
        torch.testing.assert_close(moved_by, -0.1 * along, rtol=1e-5, atol=1e-8)


def test_a_step_without_finite_gradients_keeps_them_for_the_loss_scaler_to_see() -> None:
    model = moved()
    loss(model, 0).backward()
    _, _, adapter = adapters_of(model)[0]
    adapter.lora_A.grad[0, 0] = torch.inf
    before = adapter.lora_A.grad.clone(), adapter.lora_B.grad.clone()
    notify(model, "on_before_optimizer_step", SGD(model.parameters(), lr=0.1))
    assert torch.equal(adapter.lora_A.grad, before[0])
    assert torch.equal(adapter.lora_B.grad, before[1])


def nearest_gradients(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """What makes the step nearest to G, and of all that do, what is nearest to the gradients of A and B for G."""
    P, Q = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
    g_A, g_B = S * B.T @ G, S * G @ A.T
    eye = torch.eye(len(A), dtype=A.dtype)
    system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)  # of X row by row
    X = torch.linalg.solve(system, (-P @ g_A @ A.T / S**2).flatten()).view_as(eye)
    return P @ g_A / S**2 + X @ A, (g_B - B @ P @ B.T @ g_B) @ Q / S**2 - B @ X


def test_the_full_mode_steps_as_adam_on_the_whole_weight_projected() -> None:
    model, twin = moved("full"), stack(2).double()
    base = [twin.get_submodule(path).weight.detach().clone() for path, _, _ in adapters_of(model)]
    factors = [(a.lora_A.detach().clone(), a.lora_B.detach().clone()) for _, _, a in adapters_of(model)]
    dense = [nn.Parameter(torch.zeros_like(w)) for w in base]
    adam = Adam(dense, lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    theirs = AdamW([p for p in model.parameters() if p.requires_grad], 0.02, (0.8, 0.95), 1e-6, weight_decay=0.1)
    for step in range(5):
        for (path, _, _), w, (A, B) in zip(adapters_of(model), base, factors, strict=True):
            twin.get_submodule(path).weight.data = w + S * B @ A
        twin.zero_grad()
        loss(twin, step).backward()
        for (path, _, _), p, (A, B) in zip(adapters_of(model), dense, factors, strict=True):
            p.grad = nearest_step(A, B, twin.get_submodule(path).weight.grad)
            p.data.zero_()
        adam.step()
        for i, ((A, B), p) in enumerate(zip(factors, dense, strict=True)):
            new_A, new_B = nearest_gradients(A, B, -p.detach())
            factors[i] = (1 - 0.02 * 0.1) * A - 0.02 * new_A, (1 - 0.02 * 0.1) * B - 0.02 * new_B
        steps(model, theirs, step, step + 1)
        for (_, _, adapter), (A, B) in zip(adapters_of(model), factors, strict=True):
            torch.testing.assert_close(adapter.lora_A.detach(), A, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(adapter.lora_B.detach(), B, rtol=1e-5, atol=1e-6)


def run(made: Any, skipped: bool = False) -> list[Tensor]:
    model = inject(stack(2), LoRAPro(r=2, mode="full"))
    optimizer: Optimizer = made([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if skipped:  # a loss scaler that finds no finite gradients does not step, and the next ones are others
        loss(model, 7).backward()
        notify(model, "on_before_optimizer_step", optimizer)
        optimizer.zero_grad()
    steps(model, optimizer, 0, 4)
    return [p.detach() for p in model.parameters() if p.requires_grad]


def test_the_full_mode_does_not_depend_on_the_optimizer_that_steps() -> None:
    assert all(torch.equal(a, b) for a, b in zip(run(SGD), run(RMSprop), strict=True))


def test_a_step_that_is_passed_over_leaves_no_moments() -> None:
    assert all(torch.equal(a, b) for a, b in zip(run(Adam), run(Adam, skipped=True), strict=True))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(AdapterError, match="mode must be one of 'plain', 'full', got 'sgd'"):
        LoRAPro(mode="sgd")
