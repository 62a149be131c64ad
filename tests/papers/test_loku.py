"""LoKU against its formulas: the loss, the start, and parts of a loss in a Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import PEFT, AdapterError, InvertedHingeLoss, LoKU, PiSSA, disabled, inject
from lightning_peft.engine import adapters_of, calibrate
from tests.callbacks.nets import Lit, loader, trainer
from tests.papers.stack import Stack, batch, stack

TARGETS = r"layers\.\d\.(attn|up|down)"


def parts(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Two losses of one batch."""
    x, y = (t.double() for t in batch(step))
    z = model(x)
    forget, retain = F.mse_loss(z[:2], y[:2]), F.l1_loss(z[2:], y[2:])
    return {"loss": retain - forget, "forget": forget, "retain": retain}


def calibrated(**arguments: Any) -> Stack:
    model = inject(stack().double(), LoKU(target_modules=TARGETS, **arguments))
    calibrate(model, [lambda step=step: parts(model, step) for step in range(4)])  # type: ignore[misc]
    return model


def test_the_loss_is_the_mean_hinge_over_what_counts() -> None:
    logits, targets = torch.randn(2, 5, 4).double(), torch.tensor([[0, 3, -100, 1, 2], [-100, -100, 1, 1, 0]])
    total = 0.0
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target >= 0:
            p = (row.exp() / row.exp().sum()).tolist()
            total += max(0.0, 1 + p[target] - max(v for i, v in enumerate(p) if i != target))
    assert float(InvertedHingeLoss()(logits, targets)) == pytest.approx(total / 7)
    assert float(InvertedHingeLoss()(logits, torch.full((2, 5), -100))) == 0


def test_the_loss_is_bounded_and_pushes_the_target_down() -> None:
    logits = torch.tensor([[90.0, 0.0, 0.0], [0.0, 90.0, 0.0]], requires_grad=True)
    each = [float(InvertedHingeLoss()(row[None], torch.tensor([0]))) for row in logits.detach()]
    assert each == pytest.approx([2.0, 0.0])
    logits = torch.randn(6, 5, requires_grad=True)
    InvertedHingeLoss()(logits, torch.zeros(6, dtype=torch.long)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert torch.autograd.gradcheck(
        lambda z: InvertedHingeLoss()(z, torch.tensor([0, 1])), torch.randn(2, 4).double().requires_grad_()
    )


def test_the_start_is_the_best_low_rank_fit_where_the_data_to_forget_count() -> None:
    plain, model = stack().double(), calibrated(r=2, alpha=6.0)
    squares: dict[str, dict[str, Tensor]] = {"forget": {}, "retain": {}}
    for step in range(4):
        for part, found in squares.items():
            plain.zero_grad()
            parts(plain, step)[part].backward()
            for path, module in plain.named_modules():
                if isinstance(module, nn.Linear):
                    found[path] = found.get(path, 0) + module.weight.grad.square() / 4
    for path, module, adapter in adapters_of(model):
        relative = squares["forget"][path] / (1e-5 + squares["retain"][path])
        rho = relative.sum(1, keepdim=True).sqrt()
        values = torch.linalg.svdvals(rho * module.weight)
        product = adapter.scaling * adapter.lora_B @ adapter.lora_A
        rest = rho * (module.weight - product)
        # rho + 1e-5 in the one place and rho in the other, and gradients in float32
        assert rest.norm().item() == pytest.approx(values[2:].square().sum().sqrt().item(), rel=1e-2)
        assert float(adapter.scaling) == 3.0
    x = batch(9)[0].double()
    assert torch.equal(model(x), plain(x))
    with disabled(model):
        assert torch.equal(model(x), plain(x))


def test_where_all_outputs_count_the_same_it_is_pissa() -> None:
    base = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    theirs = inject(nn.Sequential(nn.Linear(5, 4, bias=False)).double(), PiSSA(r=2))
    with torch.no_grad():
        theirs[0].weight.copy_(base[0].weight)
    theirs[0].adapters["default"].reset_parameters(_layer(theirs[0]), torch.Generator())
    ours = inject(base, LoKU(r=2))
    calibrate(ours, [lambda: {"loss": ours(torch.eye(5).double()).sum(), "forget": _even(ours), "retain": _even(ours)}])
    one, other = ours[0].adapters["default"], theirs[0].adapters["default"]
    torch.testing.assert_close(
        one.scaling * one.lora_B @ one.lora_A, other.scaling * other.lora_B @ other.lora_A, rtol=1e-3, atol=1e-3
    )


def _even(model: nn.Module) -> Tensor:
    return model(torch.eye(5).double()).sum()


def _layer(module: nn.Module) -> Any:
    from lightning_peft.engine import Layer

    return Layer(module, module.adapters["default"].site)  # type: ignore[index, union-attr]


class Unlearning(Lit):
    """Returns the parts of its loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        z, y = self(batch[0]), batch[1]
        each, first = F.cross_entropy(z, y, reduction="none"), y == 0
        forget, retain = (each * first).mean(), (each * ~first).mean()
        return {"loss": InvertedHingeLoss()(z, y.where(first, -100)) + retain, "forget": forget, "retain": retain}


def test_in_a_trainer_it_unlearns_a_class_with_what_the_step_returns(tmp_path: Path) -> None:
    module = Unlearning()
    x, y = (torch.cat(t) for t in zip(*loader(), strict=True))
    method = LoKU(r=2, target_modules=("q_proj", "v_proj"), modules_to_save="head")
    trainer(tmp_path, PEFT(method, summary=False), max_epochs=20).fit(module, loader(), loader())
    answers = module.eval()(x).argmax(1)
    assert (answers == 0).float().mean() < 0.05
    assert (answers == y)[y != 0].float().mean() > 0.9


def test_a_step_that_returns_no_parts_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"LoKU needs 'forget', a part of the loss by itself.*returns loss\. Let it"):
        trainer(tmp_path, PEFT(LoKU(r=2), summary=False)).fit(Lit(), loader(), loader())
