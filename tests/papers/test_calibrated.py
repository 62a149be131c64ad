"""CorDA and LoRA-GA against their papers, and what calibration leaves as it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import AdapterError, CorDA, LoRAGA, PiSSA, SoMA, inject
from lightning_peft.engine import adapters_of, calibrate, notify
from lightning_peft.engine.targets import TargetError
from tests.papers.stack import Stack, batch, loss, stack

TARGETS = r"layers\.\d\.(attn|up|down)"


def losses(model: nn.Module, n: int = 5) -> list[Callable[[], Tensor]]:
    return [lambda step=step: loss(model, step) for step in range(n)]  # type: ignore[misc]


def calibrated(method: CorDA | LoRAGA) -> Stack:
    model = inject(stack().double(), method)
    calibrate(model, losses(model))
    return model


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_decomposes_the_weight_in_the_metric_of_the_inputs(mode: str) -> None:
    plain, inputs = stack().double(), {}
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args, path=path: inputs.setdefault(path, []).append(args[0]))
    for step in range(5):
        plain(batch(step)[0].double())
    model = calibrated(CorDA(r=2, mode=mode, alpha=4.0, damping=1e-9, target_modules=r"layers\.\d\.up"))
    for path, module, adapter in adapters_of(model):
        scaled = [x / x.abs().max() for x in inputs[path]]
        C = sum(x.T @ x for x in scaled)
        U, values, Vh = torch.linalg.svd(module.weight @ C, full_matrices=False)
        chosen = slice(2) if mode == "ipm" else slice(-2, None)
        expected = U[:, chosen] * values[chosen] @ Vh[chosen] @ torch.linalg.inv(C)
        product = adapter.scaling * adapter.lora_B @ adapter.lora_A
        # the damping, which the formula lacks, moves it a little
        torch.testing.assert_close(product, expected, rtol=1e-2, atol=1e-3)
    x = batch(9)[0].double()
    assert torch.equal(model(x), stack().double()(x))


@pytest.mark.parametrize(("mode", "twin"), [("ipm", PiSSA), ("kpm", SoMA)])
def test_corda_without_a_preferred_direction_is_pissa_or_soma(mode: str, twin: type[PiSSA]) -> None:
    base = nn.Sequential(nn.Linear(5, 4)).double()
    theirs = inject(copy.deepcopy(base), twin(r=2))[0].adapters["default"]
    model = inject(base, CorDA(r=2, mode=mode))
    calibrate(model, [lambda: model(torch.eye(5).double()).sum()])
    ours = model[0].adapters["default"]
    torch.testing.assert_close(ours.lora_B @ ours.lora_A, theirs.lora_B @ theirs.lora_A)


def test_the_first_step_of_lora_ga_follows_the_best_low_rank_gradient() -> None:
    method = LoRAGA(r=2, alpha=6.0, gamma=9.0, target_modules=TARGETS)
    model, plain = calibrated(method), stack().double()
    sum(loss(plain, step) for step in range(5)).div(5).backward()
    for path, module, adapter in adapters_of(model):
        G = plain.get_submodule(path).weight.grad
        A, B, c = adapter.lora_A, adapter.lora_B, module.weight.shape[0] ** 0.25 / 3
        eye = torch.eye(2).double()
        torch.testing.assert_close(A @ A.T, c**2 * eye, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(B.T @ B, c**2 * eye, rtol=1e-5, atol=1e-6)
        U, values, Vh = torch.linalg.svd(G, full_matrices=False)
        best = U[:, :4] * values[:4] @ Vh[:4]
        torch.testing.assert_close((B @ B.T @ G + G @ A.T @ A) / c**2, best, rtol=1e-4, atol=1e-6)
    x = batch(9)[0].double()
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("method", [CorDA(r=1), LoRAGA(r=1)], ids=repr)
def test_calibration_changes_nothing_but_the_adapters(method: CorDA | LoRAGA) -> None:
    model = inject(stack(), method).train()
    model.layers[0].eval()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    calibrate(model, [lambda: loss(model, 0) + 0 * torch.rand(())])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert p.grad is None, name
        assert p.requires_grad == before[name][1], name
        assert torch.equal(p, before[name][0]) != ("adapters" in name), name


def test_training_without_calibration_is_an_error() -> None:
    with pytest.raises(AdapterError, match=r"CorDA: its start is measured on data, and was not"):
        notify(inject(stack(), CorDA(r=1)), "on_train_batch_start", [])


@pytest.mark.parametrize("method", [CorDA(r=1), LoRAGA(r=1)], ids=repr)
def test_bad_data_is_refused_and_leaves_the_adapters_alone(method: CorDA | LoRAGA) -> None:
    model = inject(stack(), method)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(AdapterError, match="there is no batch"):
        calibrate(model, [])
    x = torch.full((2, 3), torch.nan)
    with pytest.raises(AdapterError, match="not finite"):
        calibrate(model, [lambda: model(x).mean()])
    with pytest.raises(AdapterError, match="missing: the layer was not called"):
        calibrate(model, [lambda: model.head(model.embed(batch(0)[0])).sum()])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_lora_ga_needs_twice_as_many_directions() -> None:
    with pytest.raises(TargetError, match=r"fewer than 2 r = 4 directions. Lower r"):
        inject(stack(), LoRAGA(r=2))  # embed has three
    clipped = calibrated(LoRAGA(r=100, clip_rank=True))
    assert [len(adapter.lora_A) for _, _, adapter in adapters_of(clipped)][:3] == [1, 3, 3]
