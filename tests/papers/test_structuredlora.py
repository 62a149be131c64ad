"""StructuredLoRA: three factors, each with its own gradient."""

import torch
from torch.optim import SGD

from lightning_peft import StructuredLoRA, inject
from lightning_peft.engine import adapters_of
from tests.papers.stack import loss, stack, steps


def test_the_gradients_of_the_three_factors_follow_from_that_of_the_weight() -> None:
    model = inject(stack(2).double(), StructuredLoRA(r=2, alpha=6.0))
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    steps(model, optimizer, 0, 3)  # off the point where two of the three gradients are zero
    base, s = stack(2).double(), 6 / 2
    for path, _, adapter in adapters_of(model):
        B, N, A = (p.detach() for p in (adapter.lora_B, adapter.lora_N, adapter.lora_A))
        base.get_submodule(path).weight.data += s * B @ N @ A
    loss(base, 7).backward()
    loss(model, 7).backward()
    for path, _, adapter in adapters_of(model):
        G = base.get_submodule(path).weight.grad
        B, N, A = (p.detach() for p in (adapter.lora_B, adapter.lora_N, adapter.lora_A))
        torch.testing.assert_close(adapter.lora_B.grad, s * G @ A.T @ N.T)
        torch.testing.assert_close(adapter.lora_N.grad, s * B.T @ G @ A.T)
        torch.testing.assert_close(adapter.lora_A.grad, s * N.T @ B.T @ G)
        assert adapter.lora_N.grad.any()


def test_only_one_factor_starts_at_zero() -> None:
    for _, _, adapter in adapters_of(inject(stack(1), StructuredLoRA(r=4, target_modules="up"))):
        assert not adapter.lora_B.any()
        assert 0 < adapter.lora_N.abs().max() <= 1 / 4**0.5
        assert adapter.lora_N.abs().max() > 0.5 / 4**0.5
