"""OwLore: chances from outliers, draws as in LISA, projected blocks."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_peft import LISA, AdapterError, OwLore, inject
from lightning_peft.engine import adapters_of, notify
from tests.papers.stack import batch, loss, stack, steps, trainable_blocks


def owlore(**arguments: object) -> OwLore:
    return OwLore(**{"r": 2, "n_layers": 1, "interval_steps": 2, "update_proj_gap": 4, **arguments})


def chances(model: nn.Module) -> torch.Tensor:
    return model.__dict__["_peft"].injections["default"].state["chances"]


def test_chances_are_the_shares_of_outliers() -> None:
    plain, model = stack(), inject(stack(), owlore(outlier_threshold=2.0))
    inputs: dict[nn.Module, torch.Tensor] = {}
    for layer in plain.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
    plain(batch(0)[0])
    notify(model, "on_train_batch_start", [], step=0, loss=lambda: loss(model, 0))
    expected = []
    for block in plain.layers:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        scores = torch.cat([(m.weight.abs() * inputs[m].double().norm(dim=0)).flatten() for m in linears])
        expected.append((scores > 2.0 * scores.mean()).double().mean())
    assert len({round(e.item(), 6) for e in expected}) > 1
    torch.testing.assert_close(chances(model), torch.stack(expected) + 1e-12)


class Masked(nn.Module):
    """Takes a mask of the tokens that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = stack()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.stack(x)


def test_padding_is_no_input() -> None:
    x, mask = torch.randn(2, 6, 3), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    x = torch.where(mask.bool()[..., None], x, 100 * x * torch.tensor([9.0, 1.0, 0.0]))
    found = []
    for inputs, given in ((x, mask), (x[mask.bool()][None], None)):
        model = nn.ModuleDict({"net": Masked()})
        inject(model, owlore(outlier_threshold=1.5))
        compute = lambda m=model, i=inputs, g=given: m["net"](i, attention_mask=g).square().mean()  # noqa: E731
        notify(model, "on_train_batch_start", [], step=0, loss=compute)
        found.append(chances(model))
    torch.testing.assert_close(found[0], found[1])


def test_equal_chances_draw_the_blocks_of_lisa() -> None:
    seen: dict[str, list[list[int]]] = {"owlore": [], "lisa": []}
    for name, method in (("owlore", owlore(seed=3)), ("lisa", LISA(n_layers=1, interval_steps=2, seed=3))):
        model = inject(stack(), method)
        if name == "owlore":
            chances(model).fill_(0.5)
        steps(
            model, AdamW(model.parameters()), 0, 12, lambda step, m=model, n=name: seen[n].append(trainable_blocks(m))
        )
    assert seen["owlore"] == seen["lisa"]


def test_a_block_without_chances_is_not_drawn() -> None:
    model = inject(stack(), owlore(interval_steps=1))
    chances(model).copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    seen: set[int] = set()
    steps(model, AdamW(model.parameters()), 0, 20, lambda step: seen.update(trainable_blocks(model)))
    assert seen == {1, 3}


def test_active_blocks_train_in_projected_form_and_forget() -> None:
    model = inject(stack(), owlore())
    optimizer = AdamW(model.parameters())
    for period in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps(model, optimizer, 2 * period, 2 * period + 2)
        (drawn,) = trainable_blocks(model)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {name for name in moved if name.startswith("layers")} == {
            name for name in before if name.startswith(f"layers.{drawn}.") and "adapters" not in name
        }
        held = {name for name, p in model.named_parameters() if p in optimizer.state}
        inside = [f"layers.{drawn}.{layer}" for layer in ("attn", "up", "down")]
        factors = {f"{path}.adapters.default.lora_{'B' if a.tall else 'A'}" for path, _, a in adapters_of(model)}
        vectors = {f"layers.{drawn}.{rest}" for rest in ("attn.bias", "down.bias", "norm.weight", "norm.bias")}
        outside = {f"{layer}.{kind}" for layer in ("embed", "head") for kind in ("weight", "bias")}
        assert held == {f for f in factors if f.rpartition(".adapters")[0] in inside} | vectors | outside


def test_full_gradients_are_made_when_blocks_are_drawn_and_when_directions_are_due() -> None:
    model = inject(stack(), owlore(interval_steps=3, update_proj_gap=4))
    full: list[int] = []

    def note(step: int) -> None:
        if any(module.weight.requires_grad for _, module, _ in adapters_of(model)):
            full.append(step)

    steps(model, AdamW(model.parameters()), 0, 12, note)
    assert full == [0, 3, 4, 6, 8, 9]


def test_a_loop_without_a_loss_is_told_what_to_do() -> None:
    model = inject(stack(), owlore())
    with pytest.raises(AdapterError, match=r"OwLore measures the loss .* loss=lambda"):
        notify(model, "on_train_batch_start", [], step=0)
