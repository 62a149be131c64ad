"""peft_offload: the same numbers as without it, and no weights of frozen blocks on the device but while they run.

On a CPU the "device" copies are tensors of their own in the same memory, so that all of the bookkeeping is real.
"""

import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import LISA, PEFT, AdapterError, DoRA, LoRA, PEFTOffloadStrategy, get_method, inject
from lightning_peft.engine import Method
from lightning_peft.strategies import offload
from tests.callbacks.nets import trainer
from tests.strategies.blocks import METHOD, Block, ByTurns, Net, adapters_by_turns, blocks_by_turns
from tests.strategies.nets import data

FULL = get_method("fullfinetuning")()
OF_A_BLOCK = 4  # parameters: two weights and two biases


class Device:
    """Knows which copies are alive, by the memory itself: whoever holds a view of it is found."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Any]] = []

    def copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        array = np.empty(tuple(tensor.shape), dtype=np.float32)
        self.made.append(weakref.ref(array))
        return torch.from_numpy(array).copy_(tensor)

    @property
    def alive(self) -> int:
        return sum(made() is not None for made in self.made)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(offload, "_to_device", device.copy)
    monkeypatch.setattr(offload, "_to_host", lambda tensor, device: tensor.clone())
    return device


class CheckpointedAround(Net):
    """Each block is run again in the backward, by whoever calls it."""

    def answer(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Inside(Block):
    """Runs its second half again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + checkpoint(lambda h: self.down(torch.tanh(h)), h, use_reentrant=False)


class CheckpointedInside(Net):
    """Each block runs a part of itself again in the backward."""

    def __init__(self, adam: bool = False) -> None:
        super().__init__(adam)
        for block in self.blocks:
            block.__class__ = Inside


class Twice(Net):
    """Goes through its blocks two times."""

    def answer(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return self.head(x)


class Box:
    """Hides a tensor from whoever looks for some in the output of a block."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Boxing(Block):
    """Takes and returns a box."""

    def forward(self, box: Box) -> Box:
        return Box(super().forward(box.x))


class Boxed(Net):
    """Hands boxes from block to block."""

    def __init__(self, adam: bool = False) -> None:
        super().__init__(adam)
        for block in self.blocks:
            block.__class__ = Boxing

    def answer(self, x: Tensor) -> Tensor:
        box = Box(self.embed(x))
        for block in self.blocks:
            box = block(box)
        return self.head(box.x)


class Watch(L.Callback):
    """Counts live copies at each event, and keeps the gradients of the first step."""

    def __init__(self, device: Device | None = None) -> None:
        self.device = device
        self.counts: dict[str, list[int]] = {"forward": [], "kept": [], "backward": [], "evaluated": []}
        self.gradients: dict[str, Tensor] = {}
        self.calls = 0
        self.handles: list[Any] = []

    def _call(self, *_: Any) -> None:
        self.calls += 1

    def _count(self, event: str) -> None:
        if self.device is not None:
            self.counts[event].append(self.device.alive)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for block in pl_module.blocks:
            self.handles.append(block.up.register_forward_pre_hook(self._call))
            self.handles.append(block.down.register_forward_hook(lambda *_: self._count("forward")))

    def on_train_end(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def on_before_backward(self, *args: Any) -> None:
        self._count("kept")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count("backward")
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_validation_batch_end(self, *args: Any) -> None:
        self._count("evaluated")


def run(
    folder: Path, strategy: Any, module: Net, *callbacks: L.Callback, method: Method = METHOD, **kwargs: Any
) -> dict[str, Any]:
    """Train, validate and test; all numbers that come out."""
    torch.manual_seed(0)
    watch = Watch()
    made = trainer(folder, PEFT(method, summary=False), watch, *callbacks, strategy=strategy, **kwargs)
    made.fit(module, data(8), data(8))
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    made.save_checkpoint(folder / "end.ckpt")
    optimizer = torch.load(folder / "end.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    tested = made.test(module, data(8), verbose=False)[0]
    return {
        "state": state,
        "gradients": watch.gradients,
        "optimizer": optimizer,
        "tested": tested,
        "calls": watch.calls,
    }


CASES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "plain": (Net, {}),
    "a weight that is read": (Net, {"method": DoRA(r=2, target_modules=("up", "down"))}),
    "checkpointed around": (CheckpointedAround, {}),
    "checkpointed inside": (CheckpointedInside, {}),
    "used twice": (Twice, {}),
    "hidden outputs": (Boxed, {}),
    "lisa": (Net, {"method": LISA(n_layers=1, interval_steps=1)}),
    "lisa that keeps its state": (Net, {"method": LISA(n_layers=1, interval_steps=1, state_policy="keep")}),
    "accumulated": (Net, {"accumulate_grad_batches": 3}),
    "bfloat16": (Net, {"precision": "bf16-true"}),
    "adapters by turns": (Net, {"callbacks": adapters_by_turns}),
    "blocks by turns": (Net, {"callbacks": blocks_by_turns, "method": FULL}),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_a_run_without_it_bit_for_bit(case: str, tmp_path: Path) -> None:
    cls, given = CASES[case]
    arguments = {key: value for key, value in given.items() if key != "callbacks"}
    callbacks = [ByTurns(given["callbacks"])] if "callbacks" in given else []
    one, other = (run(tmp_path, s, cls(adam=True), *callbacks, **arguments) for s in ("peft_offload", "auto"))
    assert one["gradients"]
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [Net, CheckpointedAround, CheckpointedInside, Twice, Boxed])
def test_no_weights_of_frozen_blocks_stay_on_the_device(cls: type[Net], device: Device, tmp_path: Path) -> None:
    watch, module = Watch(device), cls()
    made = trainer(tmp_path, PEFT(METHOD, summary=False), watch, strategy="peft_offload", max_epochs=1)
    made.fit(module, data(8), data(8))
    assert len(device.made) > 3 * 3 * OF_A_BLOCK
    assert max(watch.counts["forward"]) == 2 * OF_A_BLOCK  # the one that runs, and the next one on its way
    assert min(watch.counts["forward"]) >= OF_A_BLOCK
    for event in ("kept", "backward", "evaluated"):
        assert set(watch.counts[event]) == {0}, event


def test_the_backward_holds_two_blocks_at_most(device: Device, tmp_path: Path) -> None:
    seen = []

    class Seen(Net):
        def answer(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
                if x.requires_grad:
                    x.register_hook(lambda g: seen.append(device.alive))
            return self.head(x)

    trainer(tmp_path, PEFT(METHOD, summary=False), strategy="peft_offload", max_epochs=1).fit(Seen(), data(8), data(8))
    assert 0 < max(seen) <= 2 * OF_A_BLOCK


def test_blocks_that_train_are_on_the_device_and_change_places(device: Device, tmp_path: Path) -> None:
    counts = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            away = [block.away for block in trainer.strategy._offloaded]
            counts.append((away, trainer.global_step))

    module = Net()
    made = trainer(tmp_path, PEFT(FULL, summary=False), ByTurns(blocks_by_turns), Count(), strategy="peft_offload")
    made.fit(module, data(8), data(8))
    assert len(counts) == 6
    for away, step in counts:
        assert away == [i != (step - 1) % 3 for i in range(3)]


def test_a_block_without_a_backward_is_not_fetched_for_it(device: Device, tmp_path: Path) -> None:
    watch, method = Watch(device), LoRA(r=2, target_modules="up", layers_to_transform=(1, 2))
    made = trainer(tmp_path, PEFT(method, summary=False), watch, strategy="peft_offload")
    made.fit(Net(), data(8), data(8))
    assert set(watch.counts["backward"]) == {0}


def test_a_block_that_begins_to_train_within_a_batch_stays_on_the_device(tmp_path: Path) -> None:
    away = []

    class Late(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.blocks[1].requires_grad_(self.training)
            loss = super().training_step(batch, batch_idx)
            if self.training:
                away.append([block.away for block in self.trainer.strategy._offloaded])
            return loss

    made = trainer(tmp_path, PEFT(METHOD, summary=False), strategy="peft_offload", max_epochs=1)
    made.fit(Late(), data(8), data(8))
    assert away[0] == [True, False, True]


def test_adapters_and_what_is_outside_of_the_blocks_stay_where_they_are(tmp_path: Path) -> None:
    class Shared(Net):
        """The head of the first block is that of the second; and one weight is used outside."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks[1].down.weight = self.blocks[0].down.weight

    module = inject(Shared(), METHOD)
    inside = offload._inside(module, ["blocks.0", "blocks.1", "blocks.2"])
    names = {id(p): name for name, p in module.named_parameters()}
    assert {block: [names[id(p)] for p in parameters] for block, parameters in inside.items()} == {
        "blocks.0": ["blocks.0.up.weight", "blocks.0.up.bias", "blocks.0.down.bias"],
        "blocks.1": ["blocks.1.up.weight", "blocks.1.up.bias", "blocks.1.down.bias"],
        "blocks.2": [f"blocks.2.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")],
    }


def test_the_model_is_an_ordinary_one_afterwards(tmp_path: Path) -> None:
    module = Net()
    run(tmp_path, "peft_offload", module)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in module.blocks)
    x = torch.randn(2, 6)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module.blocks[0]))(x), module.blocks[0](x))


def test_a_failed_forward_leaves_no_copies(device: Device, tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.blocks[1](batch[0][:, :2])

    module = Fails()
    before = module.blocks[1].up.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer(tmp_path, PEFT(METHOD, summary=False), strategy="peft_offload").fit(module, data(8), data(8))
    assert device.alive == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # nothing is left to watch others' saving
    assert torch.equal(module.blocks[1].up.weight, before)


def test_a_run_resumes_from_a_checkpoint_of_another_strategy(tmp_path: Path) -> None:
    straight = run(tmp_path, "auto", Net(adam=True), max_epochs=2)
    half = trainer(tmp_path, PEFT(METHOD, summary=False), max_epochs=1)
    torch.manual_seed(0)
    half.fit(Net(adam=True), data(8), data(8))
    half.save_checkpoint(tmp_path / "half.ckpt")
    module = Net(adam=True)
    made = trainer(tmp_path, strategy=PEFTOffloadStrategy(METHOD), max_epochs=2)
    made.fit(module, data(8), data(8), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(dict(module.state_dict()), straight["state"], rtol=0, atol=0)


def test_without_an_adapter_or_blocks_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nothing was injected into Net. Give the strategy a method"):
        trainer(tmp_path, strategy="peft_offload").fit(Net(), data(8), data(8))
    strategy = PEFTOffloadStrategy(LoRA(r=2), blocks="layers")
    with pytest.raises(AdapterError, match=r"PEFTOffloadStrategy: Net has no module 'layers'"):
        trainer(tmp_path, strategy=strategy).fit(Net(), data(8), data(8))


def test_under_mixed_precision_it_says_that_little_is_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path, strategy=PEFTOffloadStrategy(METHOD), precision="bf16-mixed", fast_dev_run=True)
    with pytest.warns(UserWarning, match="Use precision='bf16-true'"):
        made.fit(Net(), data(8), data(8))


def test_it_is_known_by_name() -> None:
    assert StrategyRegistry["peft_offload"]["strategy"] is PEFTOffloadStrategy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_takes_less_memory_than_a_run_without_it(tmp_path: Path) -> None:
    class Large(Net):
        def __init__(self) -> None:
            super().__init__(adam=True)  # plain steps diverge at this width
            for block in self.blocks:
                block.up, block.down = nn.Linear(6, 2**20), nn.Linear(2**20, 6)

    peaks, states = [], []
    for strategy in ("peft_offload", "auto"):
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        made = trainer(tmp_path, PEFT(METHOD, summary=False), strategy=strategy, accelerator="gpu", devices=1)
        made.fit(module := Large(), data(2), data(2))
        peaks.append(torch.cuda.max_memory_allocated())
        states.append({key: value for key, value in module.state_dict().items() if "adapters" in key})
    assert peaks[0] < peaks[1]
    torch.testing.assert_close(states[0], states[1])
