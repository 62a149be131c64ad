"""FFA-LoRA: one frozen factor for all clients, which makes the average of their updates exact."""

import torch
from torch.optim import SGD, AdamW

from lightning_peft import FFALoRA, LoRA, inject
from lightning_peft.engine import adapters_of
from tests.papers.stack import loss, stack, steps


def test_the_average_of_the_trained_factor_is_that_of_the_updates() -> None:
    clients = [inject(stack(2).double(), FFALoRA(r=2)) for _ in range(3)]
    for k, client in enumerate(clients):  # each sees data of its own
        steps(client, AdamW(client.parameters(), lr=0.05), 10 * k, 10 * k + 4)
    for (_, _, one), (_, _, two), (_, _, three) in zip(*map(adapters_of, clients), strict=True):
        assert torch.equal(one.lora_A, two.lora_A)
        updates = [8 * adapter.lora_B @ adapter.lora_A for adapter in (one, two, three)]
        assert not torch.allclose(updates[0], updates[1])
        averaged = (one.lora_B + two.lora_B + three.lora_B) / 3
        torch.testing.assert_close(8 * averaged @ one.lora_A, sum(updates) / 3)


def test_it_is_lora_with_one_factor_frozen() -> None:
    frozen, plain = inject(stack(2), FFALoRA(r=2)), inject(stack(2), LoRA(r=2))
    for _, _, adapter in adapters_of(plain):
        adapter.lora_A.requires_grad_(False)
    for model in (frozen, plain):
        steps(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05), 0, 5)
    for (_, _, a), (_, _, b) in zip(adapters_of(frozen), adapters_of(plain), strict=True):
        assert torch.equal(a.lora_A, b.lora_A)
        assert torch.equal(a.lora_B, b.lora_B)
        assert a.lora_B.any()


def test_the_update_of_a_step_is_linear_in_the_gradient_of_the_weight() -> None:
    model, base = inject(stack(2).double(), FFALoRA(r=2, alpha=6.0)), stack(2).double()
    loss(base, 0).backward()
    steps(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), 0, 1)
    for path, module, adapter in adapters_of(model):
        G = base.get_submodule(path).weight.grad
        A = adapter.lora_A
        expected = module.weight - 0.1 * (6 / 2) ** 2 * G @ A.T @ A
        torch.testing.assert_close(adapter.merged(module.weight, None)[0], expected, rtol=1e-9, atol=1e-12)
