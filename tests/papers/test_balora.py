"""BA-LoRA against its formulas, and terms of outputs in a Trainer."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import IST, PEFT, SORSA, AdapterError, BALoRA, PiSSA, inject
from lightning_peft.engine import TargetError, notify, total_loss
from tests.callbacks.nets import Lit, loader, trainer
from tests.papers.stack import Stack, batch, stack

ALL = {"consistency": 0.3, "diversity": 0.2, "spectrum": 0.1}
TARGETS = r"layers\.\d\.(attn|up|down)"


def moved(method: BALoRA) -> Stack:
    model = inject(stack().double(), method)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def entropy(row: Tensor) -> float:
    p = [math.exp(v) for v in row.tolist()]
    return -sum(v / sum(p) * math.log(v / sum(p)) for v in p)


def test_understanding_terms_follow_the_paper() -> None:
    z, z_0 = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    terms = BALoRA(k=2, **ALL).output_losses(z, z_0)
    unit = z / z.square().sum(1, keepdim=True).sqrt() - z_0 / z_0.square().sum(1, keepdim=True).sqrt()
    centred = z - z.mean(0)
    covariance = centred.T @ centred / 4
    off = sum(float(covariance[i, j]) ** 2 for i in range(3) for j in range(3) if i != j)
    values = torch.linalg.eigvalsh(z.T @ z).sqrt().flip(0)
    assert float(terms["consistency"]) == pytest.approx(0.3 * float(unit.square().mean()), rel=1e-5)
    assert float(terms["diversity"]) == pytest.approx(0.2 * off / 3, rel=1e-5)
    assert float(terms["spectrum"]) == pytest.approx(-0.1 * float(values[:2].sum() / values.sum()), rel=1e-5)


def test_generation_terms_follow_the_paper() -> None:
    z, z_0 = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    terms = BALoRA(task="generation", k=1, **ALL).output_losses(z, z_0)
    p, p_0 = z.softmax(-1), z_0.softmax(-1)
    divergence = sum(
        float(p_0[b, t, v] * math.log(p_0[b, t, v] / p[b, t, v])) for b in range(2) for t in range(4) for v in range(3)
    )
    assert float(terms["consistency"]) == pytest.approx(0.3 * divergence / 2, rel=1e-5)
    entropies = [entropy(row) for row in z.flatten(0, 1)]
    assert float(terms["diversity"]) == pytest.approx(-0.2 * sum(entropies) / 8, rel=1e-5)
    values = torch.linalg.svdvals(z.reshape(2, 12))
    assert float(terms["spectrum"]) == pytest.approx(-0.1 * float(values[0] / values.sum()), rel=1e-5)


def test_outputs_that_vary_apart_have_no_diversity_term_and_one_row_is_no_error() -> None:
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert BALoRA().output_losses(apart, apart)["diversity"] == 0
    alone = BALoRA().output_losses(apart[:1], apart[:1])
    assert alone["diversity"] == 0
    assert alone["spectrum"] == pytest.approx(-1e-4)


def test_at_the_start_the_model_is_consistent_and_later_it_is_compared_with_the_base() -> None:
    method = BALoRA(r=2, target_modules=TARGETS, **ALL)
    x, y = batch(0)[0].double(), batch(0)[1].double()
    fresh = inject(stack().double(), method)
    _, terms = total_loss(fresh, lambda: F.mse_loss(fresh(x), y))
    assert terms["default/consistency"] == 0
    model, base = moved(method), stack().double()
    loss, terms = total_loss(model, lambda: F.mse_loss(model(x), y))
    expected = method.output_losses(model(x), base(x))
    assert {key: float(v) for key, v in terms.items()} == pytest.approx(
        {f"default/{key}": v.item() for key, v in expected.items()}
    )
    whole = F.mse_loss(model(x), y) + sum(expected.values())
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    wanted = torch.autograd.grad(whole, [p for p in model.parameters() if p.requires_grad])
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_base_sees_the_same_random_numbers_in_evaluation_mode() -> None:
    model, seen = moved(BALoRA(r=2, target_modules=TARGETS, **ALL)).train(), []

    def compute() -> Tensor:
        x = torch.randn(4, 3).double()
        seen.append((x, model.training, torch.is_grad_enabled()))
        return model(x).square().mean()

    total_loss(model, compute)
    assert torch.equal(seen[0][0], seen[1][0])
    assert [s[1:] for s in seen] == [(False, False), (True, True)]


def test_without_weights_it_is_pissa() -> None:
    model = inject(stack(), BALoRA(r=2, target_modules=TARGETS, consistency=0, diversity=0, spectrum=0))
    theirs = inject(stack(), PiSSA(r=2, target_modules=TARGETS))
    calls: list[int] = []

    def compute() -> Tensor:
        calls.append(1)
        return model(batch(0)[0]).mean()

    loss, terms = total_loss(model, compute)
    assert len(calls) == 1
    assert terms == {}
    assert loss == theirs(batch(0)[0]).mean()


def test_a_loop_that_forgets_the_terms_is_stopped() -> None:
    model = inject(stack(), BALoRA(r=2, target_modules=TARGETS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)[0]).mean().backward()
    with pytest.raises(
        AdapterError, match="BALoRA adds terms to the loss of each batch, and this loss is without them"
    ):
        notify(model, "on_before_optimizer_step", optimizer, step=0)


def test_an_output_that_is_never_called_or_not_one_is_an_error() -> None:
    model = inject(stack(), BALoRA(r=2, target_modules=TARGETS))
    with pytest.raises(AdapterError, match="'head' answers, and it was called 0 times"):
        total_loss(model, lambda: model.layers[0](torch.randn(2, 6)).mean())
    model = inject(stack(), BALoRA(r=2, target_modules=TARGETS, output=("norm",)))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="output=.* selects layers.0.norm, layers.1.norm"):
        total_loss(model, lambda: model(batch(0)[0]).mean())


class Manual(Lit):
    """Optimizes by itself, with the terms."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss, self.terms = total_loss(self, lambda: F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Forgetful(Manual):
    """The same without."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.seen = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


METHOD = BALoRA(r=2, target_modules=("q_proj", "v_proj"), modules_to_save="head", output="head", **ALL)


@pytest.mark.parametrize("dictionary", [False, True])
def test_in_a_trainer_terms_reach_the_gradient_once_whatever_the_accumulation(dictionary: bool, tmp_path: Path) -> None:
    class Answers(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "more": batch_idx} if dictionary else loss

    def module() -> Lit:
        lit = Answers()
        lit.net["dropout"].p = 0.0
        return lit

    gradients = Gradients()
    made = trainer(tmp_path, PEFT(METHOD, summary=False), gradients, max_steps=1, accumulate_grad_batches=3)
    made.fit(lit := module(), loader(), loader())
    by_hand = inject(module(), METHOD).train()
    by_hand.net["norm"].eval()  # as the callback holds it
    for x, y in list(loader())[:3]:
        with torch.no_grad():
            base_outputs = module().eval()(x)
        z = by_hand(x)
        terms = METHOD.output_losses(z, base_outputs)
        ((F.cross_entropy(z, y) + sum(terms.values())) / 3).backward()
    for name, p in by_hand.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients.seen[name], p.grad)
    assert {f"peft/default/{key}" for key in ALL} <= made.callback_metrics.keys()
    assert "training_step" not in lit.__dict__


def test_manual_optimization_adds_them_by_one_call(tmp_path: Path) -> None:
    lit = Manual()
    trainer(tmp_path, PEFT(METHOD, summary=False), max_steps=2).fit(lit, loader(), loader())
    assert {f"default/{key}" for key in ALL} == lit.terms.keys()
    with pytest.raises(AdapterError, match=r"loss, terms = total_loss\(model"):
        trainer(tmp_path, PEFT(METHOD, summary=False), max_steps=2).fit(Forgetful(), loader(), loader())


def test_a_method_inside_another_keeps_its_own_terms() -> None:
    sorsa = IST(method=SORSA(r=2, gamma=2.0, target_modules=TARGETS), n_layers=4)
    model, plain = inject(stack(), sorsa), inject(stack(), SORSA(r=2, gamma=2.0, target_modules=TARGETS))
    for net in (model, plain):
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "lora" in name:
                    p += 0.1
    values = [
        notify(net, "on_before_optimizer_step", torch.optim.SGD(net.parameters(), lr=0.1), step=0)
        for net in (model, plain)
    ]
    assert values[0].keys() == {"default/orthonormality"}
    torch.testing.assert_close(values[0]["default/orthonormality"], values[1]["default/orthonormality"])
    with pytest.raises(AdapterError, match="IST: method must be a method that does not choose by itself"):
        IST(method=IST())
    inner = IST(method=BALoRA(r=2, target_modules=TARGETS), n_layers=1)
    assert isinstance(inner.watched(nn.ModuleDict({"head": nn.Linear(2, 2)})), str)
