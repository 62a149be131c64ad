"""What each of two processes sees under peft_ddp; the assertions are in test_ddp.py."""

import copy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, StackDataset

from lightning_peft import EVA, PEFT, SSF, CorDA, LoRA, LoRAGA, PEFTDDPStrategy, inject
from lightning_peft.engine import calibrate
from lightning_peft.recipes import PackedData
from tests.strategies.launch import error_of, finish, made, rank, values
from tests.strategies.nets import BLOCKS, METHOD, Manual, Net, Normed, Projections, Toggle, switching
from tests.strategies.nets import data as all_data

torch.set_num_threads(1)
facts: dict[str, Any] = {}


def data(batch_size: int) -> DataLoader:
    """The share of this rank."""
    return all_data(batch_size, 2, rank())


class Wire(L.Callback):
    """Counts what is sent while training, in calls and bytes."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def on_train_start(self, *args: Any) -> None:
        self.own = dist.all_reduce
        dist.all_reduce = self._all_reduce

    def _all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(tensor.nbytes)
        return self.own(tensor, *args, **kwargs)

    def on_train_end(self, *args: Any) -> None:
        dist.all_reduce = self.own


class Gradients(L.Callback):
    """Keeps the gradients that ``on_after_backward`` and ``on_before_optimizer_step`` see first."""

    def __init__(self) -> None:
        self.after: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after = self.after or grads(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.before = self.before or grads(pl_module)


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def plain() -> None:
    wire, seen = Wire(), Gradients()
    module = Net()
    trainer = made(PEFT(METHOD, summary=False), wire, seen, strategy="peft_ddp", gradient_clip_val=0.5)
    trainer.fit(module, data(4))
    facts["plain"] = values(module)
    facts["sent"] = wire.sent
    facts["trained bytes"] = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    facts["parameters that train"] = sum(p.requires_grad for p in module.parameters())
    facts["gradients"] = [seen.after, seen.before]
    facts["wrapped"] = type(trainer.strategy.model).__name__
    trainer.save_checkpoint(Path(sys.argv[1]) / "plain.ckpt")


def resumed() -> None:
    module = Net()
    trainer = made(strategy=PEFTDDPStrategy(METHOD), max_epochs=2)
    trainer.fit(module, data(4), ckpt_path=Path(sys.argv[1]) / "plain.ckpt")
    facts["resumed steps"] = trainer.global_step
    facts["tested"] = trainer.test(module, data(4), verbose=False)[0]["test_loss"]
    facts["predicted"] = len(trainer.predict(module, data(4)))


def accumulated() -> None:
    wire, module = Wire(), Net()
    trainer = made(wire, strategy=PEFTDDPStrategy(METHOD), accumulate_grad_batches=2)
    trainer.fit(module, data(2))
    facts["accumulated"], facts["accumulated calls"] = values(module), len(wire.sent)


def manual() -> None:
    wire, module = Wire(), Manual()
    made(wire, strategy=PEFTDDPStrategy(METHOD)).fit(module, data(2))
    facts["manual"], facts["manual calls"] = values(module), len(wire.sent)


def toggled() -> None:
    module, wire = Net(adam=True), Wire()
    made(wire, Toggle(), strategy=PEFTDDPStrategy(METHOD), max_epochs=2).fit(module, data(4))
    facts["toggled"], facts["toggled sent"] = values(module), wire.sent


def switched() -> None:
    for name, method in switching().items():
        torch.manual_seed(0)
        strategy = PEFTDDPStrategy(method)
        made(strategy=strategy, max_epochs=3, precision="64-true").fit(module := Projections(), data(4))
        facts[f"switched by {name}"] = values(module)
    facts["switched under ddp"] = error_of(
        lambda: made(PEFT(switching()["lisa"], summary=False), strategy="ddp").fit(Projections(), data(4))
    )


class First(L.Callback):
    """With what training begins."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values = values(pl_module)


def calibrated() -> None:
    methods = (CorDA(r=2, target_modules=BLOCKS), EVA(r=2, target_modules=BLOCKS), LoRAGA(r=2, target_modules=BLOCKS))
    for method in methods:
        for strategy in ("ddp", "peft_ddp"):
            torch.manual_seed(0)
            first = First()
            made(PEFT(method, summary=False), first, strategy=strategy).fit(module := Net(), data(4))
            facts[f"{method.name} under {strategy}"] = values(module)
            facts[f"start of {method.name} under {strategy}"] = first.values
        # what this rank would measure by itself
        torch.manual_seed(0)
        alone = inject(Net(), method)
        calibrate(alone, [lambda b=b, alone=alone: alone.training_step(b, 0) for b in data(4)])
        facts[f"{method.name} alone"] = values(alone)


class Uneven(Net):
    """``a`` is used on rank 0 alone, ``b`` on rank 1 alone, ``c`` on both, ``unused`` nowhere."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        skip = "b" if rank() == 0 else "a"
        h = batch[0]
        for name in BLOCKS:
            h = h if name == skip else h + torch.tanh(self.net[name](h))
        return F.mse_loss(self.net["head"](h), batch[1])


def uneven() -> None:
    module, seen = Uneven(), Gradients()
    module.net["unused"] = nn.Linear(6, 6)
    nn.init.ones_(module.net["unused"].weight), nn.init.ones_(module.net["unused"].bias)
    method = LoRA(r=2, target_modules=(*BLOCKS, "unused"), modules_to_save="head")
    made(seen, strategy=PEFTDDPStrategy(method)).fit(module, data(4))
    facts["uneven"], facts["uneven gradients"] = values(module), seen.after
    # what this rank would compute by itself, from the same start
    alone = Uneven()
    inject(alone, METHOD)
    alone.training_step(next(iter(data(4))), 0).backward()
    facts["uneven alone"] = grads(alone)


def statistics() -> None:
    module = Normed()
    made(strategy=PEFTDDPStrategy(LoRA(r=2, modules_to_save="norm")), limit_train_batches=1).fit(module, data(4))
    facts["statistics"] = values(module.norm)
    made(strategy=PEFTDDPStrategy("fullfinetuning"), limit_train_batches=2).fit(whole := Normed(), data(4))
    facts["full fine-tuning"] = values(whole)


class PerRank(L.Callback):
    """Freezes another block on each rank."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for p in pl_module.net["ab"[rank()]].adapters.parameters():
            p.requires_grad_(False)
            p.grad = None


def errors() -> None:
    other = Net()
    with torch.no_grad():
        other.net["b"].weight[0, 0] += 0.01 * rank()
    untouched = copy.deepcopy(other.state_dict())
    facts["other base"] = error_of(lambda: made(strategy=PEFTDDPStrategy(METHOD)).fit(other, data(4)))
    facts["base is untouched"] = all(torch.equal(v, other.state_dict()[k]) for k, v in untouched.items())
    facts["other base in test"] = error_of(lambda: made(strategy=PEFTDDPStrategy(METHOD)).test(other, data(4)))
    method = LoRA(r=2 + rank(), target_modules=BLOCKS)
    facts["other method"] = error_of(lambda: made(strategy=PEFTDDPStrategy(method)).fit(Net(), data(4)))
    torch.manual_seed(rank())
    facts["other seed"] = error_of(lambda: made(strategy=PEFTDDPStrategy(METHOD)).fit(Net(), data(4)))
    torch.manual_seed(0)
    trainer = made(PerRank(), strategy=PEFTDDPStrategy(METHOD))
    facts["other parameters"] = error_of(lambda: trainer.fit(Net(), data(4)))
    facts["nothing injected"] = error_of(lambda: made(strategy="peft_ddp").fit(Net(), data(4)))
    trainer = made(strategy=PEFTDDPStrategy(SSF(target_modules="norm")), sync_batchnorm=True)
    facts["adapted norm"] = error_of(lambda: trainer.fit(Normed(), data(4)))


class Kind(L.Callback):
    """What the norm is while training."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.found = type(pl_module.norm).__name__


def synced_norm() -> None:
    kind, wire = Kind(), Wire()
    trainer = made(kind, wire, strategy=PEFTDDPStrategy(METHOD), sync_batchnorm=True, limit_train_batches=2)
    trainer.fit(module := Normed(), data(4))
    facts["synced norm"], facts["synced norm is a"] = values(module), kind.found
    facts["synced norm sent"] = wire.sent


def torch_ddp() -> None:
    module = Net()
    made(PEFT(METHOD, summary=False), strategy="ddp").fit(module, data(4))
    facts["ddp"] = values(module)
    made(strategy=PEFTDDPStrategy(METHOD)).fit(ours := Net(), data(4))
    facts["peft_ddp"] = values(ours)


class OfTokens(Net):
    """Keeps the tokens that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"])
        return self(F.one_hot(batch["input_ids"] % 6, 6).float()).square().mean()


def packed() -> None:
    rows = [torch.arange(10 * i, 10 * i + 1 + i % 7) for i in range(1, 23)]
    inner = L.LightningDataModule.from_datasets(StackDataset(input_ids=rows), batch_size=4)
    module = OfTokens()
    made(PEFT(METHOD, summary=False), strategy="ddp").fit(module, PackedData(inner, max_length=7))
    facts["packed"], facts["packed tokens"] = values(module), torch.cat(module.seen)


if __name__ == "__main__":
    for part in (
        plain,
        resumed,
        accumulated,
        manual,
        toggled,
        switched,
        uneven,
        statistics,
        synced_norm,
        torch_ddp,
        calibrated,
        packed,
        errors,
    ):
        torch.manual_seed(0)
        part()
    finish(facts)
