"""Training on one device that holds, of the frozen blocks of a model, only the one that runs.

A frozen block lives in the memory of the host. Copies of its weights come to the device for its forward, and again for
its part of the backward: autograd remembers *which* weights it will need, not the copies. What trains stays on the
device: adapters, everything outside the blocks, and blocks that require gradients at the time. So a method that samples
blocks (LISA) needs the memory of those that it has sampled.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_peft.engine import AdapterError, Method
from lightning_peft.engine.inject import owners_of
from lightning_peft.engine.record import has_record
from lightning_peft.engine.slots import base_parameters
from lightning_peft.interop.files import adapted_root
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.nf4 import refuse_packed
from lightning_peft.strategies.injecting import InjectingStrategy


class PEFTOffloadStrategy(InjectingStrategy, SingleDeviceStrategy):
    """One device; frozen blocks stay in the memory of the host, and come only while they run.

    Numbers are those of a run without it. It costs the way of each frozen block to the device, twice a step; on a GPU
    the next block is on its way while one computes. Activation checkpointing (non-reentrant) goes with it, and so does
    ``precision="bf16-true"``; under mixed precision autograd keeps cast weights of its own, which stay on the device.

    Args:
        method: what to inject, as `PEFT` takes it; None if a `PEFT` callback is in the Trainer's list.
        blocks: path of the list of blocks, or several paths; found by themselves by default.
        device: where to compute; the Trainer's by default.
        kwargs: of Lightning's ``SingleDeviceStrategy``.

    Raises:
        AdapterError: when a run starts, nothing was injected, or there are no blocks.
    """

    def __init__(
        self,
        method: Method | list[Method] | str | None = None,
        *,
        blocks: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(device="cpu" if device is None else device, method=method, **kwargs)
        self.blocks = blocks
        # the Trainer fills in its own
        self.parallel_devices: list[torch.device] = [] if device is None else [torch.device(device)]
        self._offloaded: list[_Block] = []

    @property
    def root_device(self) -> torch.device:
        """Where everything is computed."""
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    def setup(self, trainer: Trainer) -> None:
        """As in ``SingleDeviceStrategy``, but for the blocks: they come to the device when they run or train."""
        self._remove()
        if isinstance(self.precision_plugin, MixedPrecision):
            rank_zero_warn(
                "PEFTOffloadStrategy: under mixed precision autograd keeps the cast weights of frozen blocks on the "
                "device, so that little memory is saved in training. Use precision='bf16-true': adapters stay in "
                "float32."
            )
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move all but the blocks, whose weights stay where they are."""
        module: Any = self.lightning_module
        root, who = adapted_root(module), type(self).__name__
        if not has_record(root):
            raise AdapterError(
                f"{who}: nothing was injected into {type(module).__name__}. Give the strategy a method: "
                f"{who}(method=LoRA(r=8)), or the Trainer a callback: callbacks=[PEFT(LoRA(r=8))]."
            )
        refuse_packed(module, who)
        inside = _inside(root, find_blocks(root, self.blocks, who=who))
        homes = {p: p.data for parameters in inside.values() for p in parameters}
        for p in homes:
            p.data = p.data.new_empty(0)
        try:
            module.to(self.root_device)
        finally:
            for p, home in homes.items():
                p.data = _to_host(home, self.root_device)
        self._offloaded = [_Block(root.get_submodule(n), ps, self.root_device) for n, ps in inside.items()]
        for block, following in itertools.pairwise(self._offloaded):
            block.following, following.previous = following, block

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Blocks that began to train come to the device, those that were frozen leave it: first those that leave."""
        for block in sorted(self._offloaded, key=lambda block: block.trains):
            block.leave()
            if block.trains == block.away:
                block.move(self.optimizers)

    def teardown(self) -> None:
        """The model is an ordinary one again."""
        self._remove()
        super().teardown()

    def _remove(self) -> None:
        for block in self._offloaded:
            block.remove()
        self._offloaded = []


class _Saved(NamedTuple):
    """What autograd keeps in place of a weight: which one, and how it was viewed."""

    which: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class _Block:
    """The base parameters of one block, and where they are.

    ``away`` says that they live on the host; ``copies`` are then those on the device, if any, ``home`` what the
    parameters hold otherwise, and ``coming`` copies that were begun ahead of need.
    """

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], device: torch.device) -> None:
        self.parameters, self.device, self.away = parameters, device, True
        self.home: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.coming: list[Tensor] = []
        self.following: _Block | None = None
        self.previous: _Block | None = None
        self._in_backward, self._has_backward = False, False
        self._saving: list[saved_tensors_hooks | None] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    @property
    def trains(self) -> bool:
        """Whether one of its base parameters requires gradients."""
        return any(p.requires_grad for p in self.parameters)

    def move(self, optimizers: Sequence[Optimizer] = ()) -> None:
        """Let the parameters live on the device if they lived on the host, and the other way round."""
        for p in self.parameters:
            p.data = _to_device(p.data, self.device) if self.away else _to_host(p.data, self.device)
            for optimizer in optimizers:
                state = optimizer.state.get(p, {})
                state |= {k: v.to(p.device) for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
        self.away, self.coming = not self.away, []

    def start(self) -> None:
        """Begin to copy, beside what is computed at present."""
        if not self.away or self.copies or self.coming:
            return
        if self._side is None:
            self.coming = [_to_device(p.data, self.device) for p in self.parameters]
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self.coming = [_to_device(p.data, self.device) for p in self.parameters]

    def enter(self) -> None:
        """Let the parameters hold copies on the device."""
        if not self.away or self.copies:
            return
        with torch.inference_mode(False), torch.no_grad():
            self.start()
            if self._side is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._side)
                for copy in self.coming:
                    copy.record_stream(torch.cuda.current_stream(self.device))
            self.home, self.copies, self.coming = [p.data for p in self.parameters], self.coming, []
            for p, copy in zip(self.parameters, self.copies, strict=True):
                p.data = copy

    def leave(self) -> None:
        """Let the parameters hold what lives on the host; the copies are gone with that."""
        with torch.inference_mode(False), torch.no_grad():
            for p, home in zip(self.parameters, self.home, strict=False):
                p.data = home
        self.home, self.copies, self.coming = [], [], []
        self._in_backward, self._has_backward = False, False

    def remove(self) -> None:
        """Give the module its forward back."""
        self.leave()
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.away and self.trains and torch.is_grad_enabled():
            self.move()  # it began to train after the batch had started
        self.enter()
        if self.following is not None and not self._in_backward:
            self.following.start()
        # in a checkpointed region nothing is kept, and what is recomputed lives for a moment
        others = torch._C._autograd._top_saved_tensors_default_hooks(True)
        hooks = saved_tensors_hooks(self._pack, self._unpack) if self.copies and others is None else None
        if hooks is not None:
            hooks.__enter__()
        self._saving.append(hooks)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hooks = self._saving.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)
        if not self._in_backward:
            self.leave()
        outputs = _with_gradient(output)
        if self.away and outputs and torch.is_grad_enabled():
            self._has_backward = True
            register_multi_grad_hook(outputs, self._before_backward, mode="any")
            inputs = _with_gradient((args, kwargs))
            if inputs:
                register_multi_grad_hook(inputs, self._after_backward)

    def _before_backward(self, gradient: Tensor) -> None:
        if self.following is not None:
            self.following.leave()
        self._enter_backward()
        if self.previous is not None and self.previous._has_backward:
            self.previous.start()

    def _enter_backward(self) -> None:
        if not self._in_backward:  # the end of the backward is the last chance: a first block sees no other sign of it
            torch.autograd.Variable._execution_engine.queue_callback(self.leave)
        self._in_backward = True
        self.enter()

    def _after_backward(self, gradients: Any) -> None:
        self.leave()

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage().data_ptr()
        for which, copy in enumerate(self.copies):
            if copy.untyped_storage().data_ptr() == storage:
                return _Saved(which, tensor.size(), tensor.stride(), tensor.storage_offset())
        return tensor

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        self._enter_backward()  # if the gradient came through an output that was not seen
        held = self.copies[saved.which] if self.away else self.parameters[saved.which].data
        return held.as_strided(saved.size, saved.stride, saved.offset)


def _inside(root: nn.Module, blocks: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Block -> its base parameters, without those that something outside of it uses too."""
    owners, base = owners_of(root), {id(p) for p in base_parameters(root).values()}
    inside = {}
    for block in blocks:
        own = [p for p in root.get_submodule(block).parameters() if id(p) in base]
        inside[block] = [p for p in own if all(name.startswith(f"{block}.") for name in owners[id(p)])]
    return {block: parameters for block, parameters in inside.items() if parameters}


def _with_gradient(nested: Any) -> list[Tensor]:
    return [t for t in tree_leaves(nested) if isinstance(t, Tensor) and t.requires_grad]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy, on a CPU too, so that what is on the device is another tensor everywhere."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def _to_host(tensor: Tensor, device: torch.device) -> Tensor:
    """In pinned memory where ``device`` can fetch from it faster."""
    held = tensor.to("cpu")
    return held.pin_memory() if device.type == "cuda" and not held.is_pinned() else held
