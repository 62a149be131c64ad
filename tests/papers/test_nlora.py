"""NLoRA and IntTune: where they start, and what trains."""

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_peft import AdapterError, IntTune, NLoRA, inject
from lightning_peft.engine import adapters_of
from tests.papers.stack import loss, stack, steps


@pytest.mark.parametrize("cls", [NLoRA, IntTune])
@pytest.mark.parametrize("core", ["block", "pinv"])
def test_the_factors_start_at_the_blocks_of_the_weight(cls: type[NLoRA], core: str) -> None:
    for _, module, adapter in adapters_of(inject(stack(1).double(), cls(r=3, core=core, target_modules="up"))):
        W = module.weight
        block = W[:3, :3] if core == "block" else torch.linalg.inv(W[:3, :3])
        torch.testing.assert_close(adapter.lora_N, block)
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_N @ adapter.lora_A, W[:, :3] @ block @ W[:3])


def test_the_inverse_core_gives_first_rows_and_columns_and_any_weight_of_that_rank() -> None:
    base = stack(1).double()
    low = torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    base.layers[0].up.weight.data = low.clone()
    for _, module, adapter in adapters_of(inject(base, NLoRA(r=3, core="pinv", target_modules=("up", "down")))):
        W, start = module.weight, adapter.lora_B @ adapter.lora_N @ adapter.lora_A
        torch.testing.assert_close(start[:3], W[:3])
        torch.testing.assert_close(start[:, :3], W[:, :3])
        if W.shape == low.shape:
            torch.testing.assert_close(start, low)
        else:
            assert not torch.allclose(start, W)


@pytest.mark.parametrize("cls", [NLoRA, IntTune])
def test_a_step_moves_the_weight_by_the_gradients_of_the_factors_that_train(cls: type[NLoRA]) -> None:
    model, base = inject(stack(2).double(), cls(r=2, alpha=6.0, core="pinv")), stack(2).double()
    loss(base, 0).backward()
    started = {}
    for path, module, _ in adapters_of(model):
        W, s = module.weight, 6 / 2
        A, B, N = W[:2], W[:, :2], torch.linalg.inv(W[:2, :2])
        G = base.get_submodule(path).weight.grad
        moved = [B, N - 0.01 * s * B.T @ G @ A.T, A]
        if cls is NLoRA:
            moved = [B - 0.01 * s * G @ A.T @ N.T, moved[1], A - 0.01 * s * N.T @ B.T @ G]
        started[path] = (W + s * (moved[0] @ moved[1] @ moved[2] - B @ N @ A)).detach()
    steps(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), 0, 1)
    for path, module, adapter in adapters_of(model):
        torch.testing.assert_close(adapter.merged(module.weight, None)[0].detach(), started[path])
        assert not torch.allclose(started[path], module.weight)


def test_inttune_leaves_the_outer_factors_bit_for_bit() -> None:
    model = inject(stack(2), IntTune(r=2))
    before = [(a.lora_A.clone(), a.lora_B.clone(), a.lora_N.clone()) for _, _, a in adapters_of(model)]
    steps(model, AdamW(model.parameters(), lr=0.1, weight_decay=0.1), 0, 3)
    for (A, B, N), (_, _, adapter) in zip(before, adapters_of(model), strict=True):
        assert torch.equal(adapter.lora_A, A)
        assert torch.equal(adapter.lora_B, B)
        assert not torch.equal(adapter.lora_N, N)


def test_an_unknown_core_is_refused() -> None:
    with pytest.raises(AdapterError, match="NLoRA: core must be one of 'block', 'pinv', got 'inverse'"):
        NLoRA(core="inverse")
