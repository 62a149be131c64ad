"""What each of two processes sees under peft_fsdp; the assertions are in test_fsdp.py."""

import inspect
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_peft import PEFT, DoRA, LoRA, PEFTFSDPStrategy, disabled, inject
from tests.strategies.blocks import (
    METHOD,
    SAMPLED,
    ByTurns,
    Net,
    SmoothNet,
    adapters_by_turns,
    blocks_by_epoch,
    blocks_by_turns,
)
from tests.strategies.launch import error_of, finish, made, rank
from tests.strategies.nets import data as all_data

torch.set_num_threads(1)
folder = Path(sys.argv[-1])  # what collects doctests imports this too, with arguments of its own
facts: dict[str, Any] = {}


def data(batch_size: int = 4) -> DataLoader:
    """The share of this rank."""
    return all_data(batch_size, 2, rank())


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Values of all ranks together."""
    state = {key: value.detach() for key, value in module.state_dict().items()}
    return {key: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for key, v in state.items()}


class Gathered(L.Callback):
    """Counts the numbers that are put together while a checkpoint is made."""

    def __init__(self) -> None:
        self.count = 0

    def save(self, trainer: L.Trainer, path: Path, **kwargs: Any) -> None:
        own = DTensor.full_tensor

        def full_tensor(tensor: DTensor, *args: Any, **kwargs: Any) -> Tensor:
            self.count += tensor.numel()
            return own(tensor, *args, **kwargs)

        DTensor.full_tensor = full_tensor
        try:
            trainer.save_checkpoint(path, **kwargs)
        finally:
            DTensor.full_tensor = own


class Sharded(Net):
    """Shards itself, as users of FSDP2 do; with what is injected there and then, if there is any."""

    method: Any = None

    def configure_model(self) -> None:
        if self.method is not None:
            inject(self, self.method)
        for block in self.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self, "training_step")


class BuiltLate(Sharded):
    """Built where it is sharded, so that adapters come in after that."""

    def __init__(self, adam: bool = False) -> None:
        super().__init__(adam)
        self.built = {"embed": self.embed, "blocks": self.blocks, "head": self.head}
        del self.embed, self.blocks, self.head

    def configure_model(self) -> None:
        for name, module in self.__dict__.pop("built", {}).items():
            setattr(self, name, module)
        super().configure_model()


def plain() -> None:
    module = Net(adam=True)
    trainer = made(PEFT(METHOD, summary=False), strategy="peft_fsdp", gradient_clip_val=0.05)
    trainer.fit(module, data())
    facts["plain"] = whole(module)
    parameters = dict(module.named_parameters())
    facts["local bytes"] = {
        n: (p.to_local() if isinstance(p, DTensor) else p).nbytes / p.nbytes for n, p in parameters.items()
    }
    facts["is whole"] = {name: not isinstance(p, DTensor) for name, p in parameters.items()}
    gathered = Gathered()
    gathered.save(trainer, folder / "plain.ckpt")
    facts["gathered"] = gathered.count
    facts["signature"] = str(inspect.signature(module.training_step))
    facts["overridden"] = "configure_model" in vars(module)
    with disabled(module):
        facts["disabled"] = whole(module)


def resumed() -> None:
    module = Net(adam=True)
    trainer = made(strategy=PEFTFSDPStrategy(METHOD), max_epochs=2, gradient_clip_val=0.05)
    trainer.fit(module, data(), ckpt_path=folder / "plain.ckpt")
    facts["resumed"], facts["resumed steps"] = whole(module), trainer.global_step
    facts["tested"] = trainer.test(module, data(), verbose=False)[0]["test_loss"]
    trainer.validate(module, data(), verbose=False)
    trainer.save_checkpoint(folder / "validated.ckpt")
    facts["predicted"] = len(trainer.predict(module, data()))
    fresh = Net(adam=True)
    made(strategy=PEFTFSDPStrategy(METHOD)).test(fresh, data(), ckpt_path=folder / "validated.ckpt", verbose=False)
    facts["tested again"] = whole(fresh)
    straight = Net(adam=True)
    made(strategy=PEFTFSDPStrategy(METHOD), max_epochs=2, gradient_clip_val=0.05).fit(straight, data())
    facts["straight"] = whole(straight)


def from_one_device() -> None:
    module = Net(adam=True)
    made(strategy=PEFTFSDPStrategy(METHOD), max_epochs=2).fit(module, data(), ckpt_path=folder / "single.ckpt")
    facts["from one device"] = whole(module)
    checkpoint = torch.load(folder / "single.ckpt", weights_only=True)
    key = "blocks.1.up.adapters.default.lora_A"
    checkpoint["state_dict"]["blocks.1.up.adapters.default.lora_X"] = checkpoint["state_dict"].pop(key)
    torch.save(checkpoint, folder / f"wrong{rank()}.ckpt")
    try:
        made(strategy=PEFTFSDPStrategy(METHOD)).test(Net(), data(), ckpt_path=folder / f"wrong{rank()}.ckpt")
    except (RuntimeError, ValueError) as error:
        facts["wrong key"] = str(error)


def in_shares() -> None:
    strategy = {"save_distributed_checkpoint": True, "method": METHOD}
    trainer = made(strategy=PEFTFSDPStrategy(**strategy))
    trainer.fit(Net(adam=True), data())
    gathered = Gathered()
    gathered.save(trainer, folder / "shares")
    facts["gathered in shares"] = gathered.count
    module = Net(adam=True)
    trainer = made(strategy=PEFTFSDPStrategy(**strategy), max_epochs=2)
    trainer.fit(module, data(), ckpt_path=folder / "shares")
    facts["in shares"], facts["in shares steps"] = whole(module), trainer.global_step
    straight = Net(adam=True)
    made(strategy=PEFTFSDPStrategy(**strategy), max_epochs=2).fit(straight, data())
    facts["straight in shares"] = whole(straight)
    other = LoRA(r=2, target_modules=("up",), modules_to_save="head")
    trainer = made(strategy=PEFTFSDPStrategy(other, save_distributed_checkpoint=True))
    facts["other method"] = error_of(lambda: trainer.fit(Net(adam=True), data(), ckpt_path=folder / "shares"))


def sharded_by_itself() -> None:
    for name, cls in {"before": Sharded, "after": BuiltLate}.items():
        module = cls(adam=True)
        trainer = made(PEFT(METHOD, summary=False), strategy="peft_fsdp")
        trainer.fit(module, data())
        facts[f"injected {name}"] = whole(module)
        facts[f"injected {name} is whole"] = [
            not isinstance(p, DTensor) for n, p in module.named_parameters() if "adapters" in n
        ]
        gathered = Gathered()
        gathered.save(trainer, folder / f"{name}.ckpt")
        facts[f"injected {name} gathered"] = gathered.count
    dora = DoRA(r=2, target_modules=("up",))
    made(strategy=PEFTFSDPStrategy(dora), limit_train_batches=1).fit(late := BuiltLate(), data())
    made(strategy=PEFTFSDPStrategy(dora), limit_train_batches=1).fit(early := Net(), data())
    facts["dora late"], facts["dora early"] = whole(late), whole(early)


class KeptTogether(Net):
    """Shards itself so that blocks stay whole after a forward, until there is a backward."""

    def configure_model(self) -> None:
        if isinstance(self, FSDPModule):
            return
        for module in (*self.blocks, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(self, step)


class SaveAfterValidation(L.Callback):
    """As ModelCheckpoint does."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        facts["whole after validation"] = not isinstance(pl_module.blocks[0].up.weight, DTensor)
        gathered = Gathered()
        gathered.save(trainer, folder / "in_validation.ckpt")
        facts["gathered in validation"] = gathered.count


def kept_together() -> None:
    each_step = {"val_check_interval": 1, "num_sanity_val_steps": 0}
    trainer = made(SaveAfterValidation(), strategy=PEFTFSDPStrategy(METHOD), **each_step)
    trainer.fit(KeptTogether(), data(), data())
    trainer = made(ByTurns(blocks_by_epoch), strategy=PEFTFSDPStrategy("fullfinetuning"), max_epochs=2)
    trainer.fit(module := KeptTogether(), data(), data())
    facts["base by epoch"] = whole(module)
    trainer.validate(module, data(), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(), data())
    facts["base by epoch, again"] = whole(module)


def other_trainings() -> None:
    module = Net()
    made(strategy=PEFTFSDPStrategy(METHOD), accumulate_grad_batches=2).fit(module, data(2))
    facts["accumulated"] = whole(module)
    made(strategy=PEFTFSDPStrategy(METHOD)).fit(module := SmoothNet(adam=True), data())
    facts["by our operations"] = whole(module)
    made(ByTurns(adapters_by_turns), strategy=PEFTFSDPStrategy(METHOD), max_epochs=2).fit(
        module := Net(adam=True), data()
    )
    facts["by turns"] = whole(module)
    made(ByTurns(blocks_by_turns), strategy=PEFTFSDPStrategy("fullfinetuning")).fit(module := Net(), data())
    facts["base by turns"] = whole(module)
    made(strategy=PEFTFSDPStrategy(SAMPLED), max_epochs=2).fit(sampled := Net(adam=True), data())
    facts["lisa"] = whole(sampled)
    facts["base is sharded"] = all(isinstance(p, DTensor) for p in module.parameters())
    trainer = made(strategy=PEFTFSDPStrategy(METHOD), precision="bf16-true")
    trainer.fit(module := Net(), data())
    facts["dtypes"] = {name: str(p.dtype) for name, p in module.named_parameters()}
    facts["bf16"] = whole(module)
    facts["bf16 bytes"] = sum(p.to_local().nbytes for p in module.parameters() if isinstance(p, DTensor))
    facts["numbers"] = sum(p.numel() for p in Net().parameters())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    made(strategy=PEFTFSDPStrategy(METHOD, mp_policy=policy)).fit(module := Net(), data())
    facts["mixed"] = whole(module)


def saved() -> None:
    made(PEFT(METHOD, save_to=str(folder / "adapter"), summary=False), strategy="peft_fsdp").fit(m := Net(), data())
    facts["saved"] = whole(m)


class TensorParallel(Net):
    """Its first layer is split over the ranks by column."""

    def configure_model(self) -> None:
        for block in self.blocks:
            inner = {key: block._modules.pop(key) for key in ("adapters",) if key in block._modules}
            parallelize_module(
                block, torch.distributed.device_mesh.init_device_mesh("cpu", (2,)), {"down": ColwiseParallel()}
            )
            block._modules.update(inner)


def errors() -> None:
    facts["nothing injected"] = error_of(lambda: made(strategy="peft_fsdp").fit(Net(), data()))
    trainer = made(PEFT(METHOD, summary=False), strategy=ModelParallelStrategy(2, 1))
    facts["plain late"] = error_of(lambda: trainer.fit(BuiltLate(), data()))
    trainer = made(PEFT(METHOD, summary=False), strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False))
    trainer.fit(early := Sharded(), data())
    facts["plain early"] = whole(early)
    trainer.save_checkpoint(folder / "model_parallel.ckpt")
    trainer = made(PEFT(METHOD, summary=False), strategy=ModelParallelStrategy(1, 2))
    facts["tensor parallel mesh"] = error_of(lambda: trainer.fit(Sharded(), data()))
    only_up = LoRA(r=2, target_modules=("up",))
    for name, strategy in {"ours": "peft_fsdp", "plain": ModelParallelStrategy(2, 1)}.items():
        trainer = made(PEFT(only_up, summary=False), strategy=strategy)
        facts[f"tensor parallel {name}"] = error_of(lambda trainer=trainer: trainer.fit(TensorParallel(), data()))
    with torch.device("meta"):
        empty = Net()
    facts["meta"] = error_of(lambda: made(strategy=PEFTFSDPStrategy(METHOD)).fit(empty, data()))
    facts["no such block"] = error_of(
        lambda: made(strategy=PEFTFSDPStrategy(METHOD, blocks="layers")).fit(Net(), data())
    )
    torch.manual_seed(rank())
    facts["other seed"] = error_of(lambda: made(strategy=PEFTFSDPStrategy(METHOD)).fit(Net(), data()))


if __name__ == "__main__":
    parts = (plain, resumed, from_one_device, in_shares, sharded_by_itself, kept_together, other_trainings, saved)
    for part in (*parts, errors):
        torch.manual_seed(0)
        part()
    finish(facts)
