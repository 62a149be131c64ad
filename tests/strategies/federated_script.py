"""What each of two clients sees under peft_federated; the assertions are in test_federated.py."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import IA3, PEFT, LoRA, PEFTFederatedStrategy
from tests.strategies.launch import error_of, finish, made, rank, values
from tests.strategies.nets import BLOCKS, METHOD, Net, Normed, Toggle, client_data

torch.set_num_threads(1)
facts: dict[str, Any] = {}
SHORT = {"limit_train_batches": 2, "use_distributed_sampler": False}


class Watch(L.Callback):
    """Keeps the state after each batch, and counts what is reduced."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.reduced = 0

    def on_train_start(self, *args: Any) -> None:
        self.own = dist.all_reduce
        dist.all_reduce = self._all_reduce

    def _all_reduce(self, *args: Any, **kwargs: Any) -> Any:
        self.reduced += 1
        return self.own(*args, **kwargs)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.states.append(values(pl_module))

    def on_train_end(self, *args: Any) -> None:
        dist.all_reduce = self.own


def run(name: str, *callbacks: L.Callback, adam: bool = False, epochs: int = 2, **arguments: Any) -> Watch:
    torch.manual_seed(0)
    module, watch = Net(adam), Watch()
    strategy = PEFTFederatedStrategy(METHOD, **arguments)
    made(watch, *callbacks, strategy=strategy, max_epochs=epochs, **SHORT).fit(module, client_data(rank()))
    facts[name] = values(module)
    facts[f"{name} trains again"] = all(p.requires_grad for n, p in module.named_parameters() if "lora" in n)
    return watch


def rounds() -> None:
    watch = run("fedavg", local_steps=2)
    facts["fedavg states"], facts["gradients reduced"] = watch.states, watch.reduced
    run("partial", local_steps=3)
    run("toggled", Toggle(), local_steps=2)
    run("weighted", local_steps=2, sample_weights=(3.0, 1.0))
    run("half", local_steps=1, epochs=3, participation=0.5, seed=3)
    run("reset", adam=True, local_steps=2)
    run("kept", adam=True, local_steps=2, keep_optimizer_state=True)
    run("lora-fair", local_steps=2, aggregation="lora-fair")
    run("ffa-lora", local_steps=2, aggregation="ffa-lora")


def resumed() -> None:
    path = Path(sys.argv[1]) / "two_rounds.ckpt"
    for epochs, ckpt_path in ((1, None), (3, path)):
        torch.manual_seed(0)
        strategy = PEFTFederatedStrategy(METHOD, local_steps=1, participation=0.5, seed=3)
        trainer = made(strategy=strategy, max_epochs=epochs, **SHORT)
        trainer.fit(module := Net(), client_data(rank()), ckpt_path=ckpt_path)
        trainer.save_checkpoint(path)
    facts["resumed"] = values(module)


def statistics() -> None:
    strategy = PEFTFederatedStrategy(LoRA(r=2, modules_to_save="norm"))
    made(strategy=strategy, max_epochs=1, **SHORT).fit(module := Normed(), client_data(rank()))
    facts["statistics"] = values(module)


def saved() -> None:
    folder = Path(sys.argv[1]) / "adapter"
    peft = PEFT(METHOD, save_to=str(folder), summary=False)
    made(peft, strategy="peft_federated", max_epochs=2, **SHORT).fit(module := Net(), client_data(rank()))
    facts["saved"] = values(module)  # 4 steps, and rounds of 10: the last is not full


class Seen(Net):
    """Remembers the first feature of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen += batch[0][:, 0].tolist()
        return super().training_step(batch, batch_idx)


def own_data() -> None:
    module = Seen()
    x = 100 * rank() + torch.arange(8.0)[:, None].expand(8, 6)
    made(strategy=PEFTFederatedStrategy(METHOD)).fit(module, DataLoader(TensorDataset(x, x[:, :3]), batch_size=4))
    facts["seen"] = sorted(module.seen)


class Embedded(Net):
    """An embedding in front."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.words = nn.Embedding(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.words(x.abs().long().clamp(max=8)[:, 0]))


def embedding() -> None:
    torch.manual_seed(0)
    module, strategy = Embedded(), PEFTFederatedStrategy(LoRA(r=2, target_modules="words"), aggregation="ffa-lora")
    made(strategy=strategy, **SHORT).fit(module, client_data(rank()))
    facts["embedding"] = values(module.words)


class PerClient(L.Callback):
    """Trains another block on each client."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.net["ab"[rank()]].adapters.requires_grad_(False)


def errors() -> None:
    def fit(
        method: Any = METHOD, module: Any = None, callbacks: Any = (), trainer: Any = SHORT, **arguments: Any
    ) -> str:
        torch.manual_seed(0)
        strategy = PEFTFederatedStrategy(method, **arguments)
        return error_of(
            lambda: made(*callbacks, strategy=strategy, **trainer).fit(module or Net(), client_data(rank()))
        )

    facts["other number of batches"] = fit(trainer={})
    facts["number of weights"] = fit(sample_weights=(1.0, 2.0, 3.0))
    facts["not low-rank"] = fit(IA3(target_modules=BLOCKS), aggregation="lora-fair")
    facts["no adapter"] = fit("linearprobe", aggregation="ffa-lora")
    facts["other parameters"] = fit(callbacks=[PerClient()])
    other = Net()
    with torch.no_grad():
        other.net["b"].weight += rank()
    facts["other base"] = fit(module=other)


if __name__ == "__main__":
    for part in (rounds, resumed, statistics, saved, own_data, embedding, errors):
        torch.manual_seed(0)
        part()
    finish(facts)
