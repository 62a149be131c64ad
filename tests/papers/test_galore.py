"""GaLore against the formula of the paper, stepped by hand."""

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from lightning_peft import FullFineTuning, GaLore, OwLore, inject
from lightning_peft.engine import adapters_of
from tests.papers.stack import loss, stack, steps

LR, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.999), 1e-8


class ByHand:
    """AdamW of one matrix in the subspace of its gradients, as the paper has it; float64."""

    def __init__(self, r: int, gap: int, scale: float) -> None:
        self.r, self.gap, self.scale, self.t = r, gap, scale, 0
        self.m = self.v = torch.zeros(())

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        tall = W.shape[0] >= W.shape[1]
        if self.t % self.gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            self.P = Vh[: self.r] if tall else U[:, : self.r]
        R = G @ self.P.T if tall else self.P.T @ G
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * R
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * R**2
        m, v = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
        N = m / (v.sqrt() + EPS)
        back = N @ self.P if tall else self.P @ N
        return W * (1 - LR * DECAY) - LR * self.scale * back


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_each_step_is_that_of_the_paper(scale: float) -> None:
    chosen = r"layers\.\d\.(up|down|attn)"
    model = inject(stack(2).double(), GaLore(r=2, update_proj_gap=3, scale=scale, target_modules=chosen))
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    names = [f"{path}.weight" for path, _, _ in adapters_of(model)]
    assert len(names) == 6
    hands = {name: ByHand(2, 3, scale) for name in names}
    for step in range(8):
        twin = stack(2).double()  # the full gradients, from a plain model of the same weights
        twin.load_state_dict({key: value for key, value in model.state_dict().items() if "adapters" not in key})
        loss(twin, step).backward()
        expected = {n: hands[n].step(twin.get_parameter(n).detach(), twin.get_parameter(n).grad) for n in names}
        steps(model, optimizer, step, step + 1)
        for name in names:
            torch.testing.assert_close(model.get_parameter(name).detach(), expected[name], rtol=1e-9, atol=1e-11)


def test_all_directions_are_plain_gradient_descent() -> None:
    projected, full = inject(stack(2), GaLore(r=100, update_proj_gap=4)), inject(stack(2), FullFineTuning())
    for model in (projected, full):
        steps(model, SGD(model.parameters(), lr=0.05), 0, 10)
    whole = full.state_dict()
    for name, p in projected.named_parameters():
        if name in whole:  # the projection and back rounds
            torch.testing.assert_close(p, whole[name], rtol=1e-4, atol=1e-5)


def test_moments_are_small_and_full_gradients_rare() -> None:
    model = inject(stack(2), GaLore(r=2, update_proj_gap=4))
    optimizer, full = AdamW(model.parameters()), []
    weights = [module.weight for _, module, _ in adapters_of(model)]
    steps(model, optimizer, 0, 9, lambda step: full.append(weights[0].requires_grad))
    assert full == [True, False, False, False] * 2 + [True]
    assert all(weight not in optimizer.state for weight in weights)
    for _, module, adapter in adapters_of(model):
        assert optimizer.state[adapter.coordinates]["exp_avg"].numel() == 2 * max(module.weight.shape)
        assert not adapter.coordinates.any(), "the step is folded into the weight"
        P = adapter.directions if adapter.tall else adapter.directions.T
        torch.testing.assert_close(P @ P.T, torch.eye(2))


def test_a_step_without_finite_gradients_keeps_the_directions() -> None:
    model = inject(stack(1), GaLore(r=2, update_proj_gap=1))
    _, module, adapter = adapters_of(model)[0]
    before = adapter.directions.clone()

    class Skips(SGD):  # as a loss scaler does
        def step(self, closure: object = None) -> None: ...

    broken = module.weight.register_hook(lambda g: g * torch.inf)
    steps(model, Skips(model.parameters(), lr=0.1), 0, 1)
    assert torch.equal(adapter.directions, before)
    broken.remove()


@pytest.mark.parametrize("method", [GaLore(r=2), OwLore(r=2, n_layers=2)], ids=repr)
def test_directions_that_a_step_could_not_give_are_taken_from_the_next(method: GaLore) -> None:
    model, asked = inject(stack(2).double(), method), []
    _, module, adapter = adapters_of(model)[-1]
    optimizer = SGD(model.parameters(), lr=0.0)
    broken = module.weight.register_hook(lambda g: g * torch.inf)

    def look(step: int) -> None:
        asked.append(module.weight.requires_grad)

    steps(model, optimizer, 0, 2, look)
    broken.remove()
    steps(model, optimizer, 2, 4, look)
    assert asked == [True, True, True, False]
    twin = stack(2).double()
    loss(twin, 2).backward()
    G = twin.get_parameter(f"{adapters_of(model)[-1][0]}.weight").grad
    directions = adapter.directions if adapter.tall else adapter.directions.T
    along = G @ directions.T @ directions if adapter.tall else directions.T @ directions @ G
    assert (G - along).norm().item() == pytest.approx(torch.linalg.svdvals(G)[2:].norm().item(), abs=1e-9)
