"""Fully sharded training (FSDP2) of adapted models: the base in shards, the adapters whole on every rank.

Each rank holds its share of the base, and puts a block together while it runs. Adapters are small: they stay out of the
shards, in their own precision, and their gradients are averaged after the last backward of an accumulation window. What
the base trains in place (a head, sampled blocks) is sharded like the rest of it, and torch averages its gradients.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_peft.callbacks.checkpoints import base_tensors
from lightning_peft.callbacks.sharding import check_sharding
from lightning_peft.engine import AdapterError, Method, adapters_of
from lightning_peft.engine.errors import joined
from lightning_peft.engine.record import has_record, record_of
from lightning_peft.engine.slots import whole
from lightning_peft.engine.state import remember_values
from lightning_peft.interop.files import adapted_root
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.nf4 import refuse_packed
from lightning_peft.strategies.averaging import AveragingStrategy
from lightning_peft.strategies.injecting import InjectingStrategy
from lightning_peft.strategies.ranks import check_same_start

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class PEFTFSDPStrategy(AveragingStrategy, InjectingStrategy, ModelParallelStrategy):
    """FSDP2 for any LightningModule: the base is sharded over all ranks, adapters are whole and in step on each.

    A model that calls ``fully_shard`` in ``configure_model`` stays as it has sharded itself, whether adapters were
    injected before or after; any other is sharded here, each block and then the rest. Nothing has to be overridden.

    Checkpoints hold the adapter alone, in one file of the same form as under any other strategy: the base is never put
    together for them, and they load wherever the same method is.

    Args:
        method: what to inject, as `PEFT` takes it; None if a `PEFT` callback is in the Trainer's list.
        blocks: path of the list of blocks, or several paths; found by themselves by default. Each is a unit that is put
            together while it runs.
        mp_policy: precision in which the units compute and send; that of their parameters by default. (To *store* the
            base in bfloat16, ask the Trainer for ``precision="bf16-true"``; adapters stay in float32.)
        save_distributed_checkpoint: write a folder in which each rank saves its share, in place of one file.
        process_group_backend: of torch.distributed; ``"nccl"`` on GPUs and ``"gloo"`` on CPUs by default.
        timeout: of torch.distributed.

    Raises:
        AdapterError: when a run starts, nothing was injected, the ranks differ in the model, the model has parameters
            without values (meta device) or that are tensor parallel, or ``blocks`` names none.
    """

    averages_whole_parameters = True  # what is not sharded is in step all the same

    def __init__(
        self,
        method: Method | list[Method] | str | None = None,
        *,
        blocks: str | Sequence[str] | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            method=method,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.blocks, self.mp_policy = blocks, mp_policy
        self._whole: list[nn.Parameter] = []

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Checkpoints come before the model is sharded, as under any other strategy."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizer states are those of any other strategy."""
        return True

    def setup_environment(self) -> None:
        """All ranks share the data and the base."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the model if it has not done so itself; then as in ``ModelParallelStrategy``."""
        module: Any = self.lightning_module
        root = adapted_root(module)
        _reshard(module)
        _check(module)
        check_sharding(self, module)
        check_same_start(module)
        remember_values(root)
        if not any(isinstance(m, FSDPModule) for m in module.modules()):
            self._shard(module, root)
        _shard_copies(root)
        self._whole = [p for p in module.parameters() if not isinstance(p, DTensor)]
        self._trained = None
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        with _configured(module):
            super().setup(trainer)

    def on_validation_end(self) -> None:
        """Methods that choose what trains at a step choose among the shards."""
        _reshard(self.lightning_module)  # type: ignore[arg-type]

    def _shard(self, module: nn.Module, root: nn.Module) -> None:
        adapters = {p for _, _, adapter in adapters_of(root) for p in adapter.parameters()}
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"], "ignored_params": adapters}
        if self.mp_policy is not None:
            options["mp_policy"] = self.mp_policy
        for name in self._found_blocks(root):
            fully_shard(root.get_submodule(name), **options)
        fully_shard(module, **options)
        for step in _STEPS:  # Lightning calls these, and not the forward of the module
            if is_overridden(step, module):
                register_fsdp_forward_method(module, step)
                function: Any = getattr(module, step).__func__
                function.__signature__ = inspect.signature(getattr(type(module), step))  # torch's lacks one argument

    def _found_blocks(self, root: nn.Module) -> list[str]:
        try:
            return find_blocks(root, self.blocks, who=type(self).__name__)
        except AdapterError as error:
            if self.blocks is not None:
                raise
            rank_zero_warn(f"PEFTFSDPStrategy: the whole model is put together at once while it runs. {error}")
            return []

    def averaged_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Those that are whole; the gradients of shards torch has averaged in the backward."""
        return self._whole

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """As ``torch.nn.utils.clip_grad_norm_``, which does not take shards and whole tensors together."""
        gradients = [p.grad for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        kinds = [[g for g in gradients if isinstance(g, DTensor) is sharded] for sharded in (False, True)]
        norms = [whole(get_total_norm(kind)) for kind in kinds if kind]
        if norms:
            total = torch.linalg.vector_norm(torch.stack(norms))
            for gradient in gradients:
                _local(gradient).mul_((clip_val / (total + 1e-6)).clamp(max=1.0))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: without the frozen base, which is not put together for it."""
        module: Any = self.lightning_module
        root = adapted_root(module)
        if not has_record(root) or record_of(root).merged is not None:
            return super().lightning_module_state_dict()
        base = base_tensors(module)
        return self._saved({key: value for key, value in module.state_dict().items() if key not in base})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As any optimizer gives it; in shards where each rank saves its share."""
        raw: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._saved(raw.state_dict())

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self._save_distributed_checkpoint else tree_map(whole, state)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """A file, or a folder that was saved in shares; in both cases whole tensors on each rank."""
        path = Path(self.broadcast(checkpoint_path))
        if not (path / _METADATA_FILENAME).is_file():
            return super(ParallelStrategy, self).load_checkpoint(path, weights_only)
        checkpoint = _load_distributed_checkpoint(path)
        count = sum(key.startswith("optimizer_") for key in checkpoint)
        states = [checkpoint.pop(f"optimizer_{i}") for i in range(count)]
        for state in states:  # the folder has names in place of numbers
            state["state"] = {int(key): value for key, value in state.get("state", {}).items()}
        return checkpoint | {"optimizer_states": states}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As in any other strategy; each rank takes its share of what is sharded."""
        module: Any = self.lightning_module
        live = module.state_dict(keep_vars=True)
        state = {key: _sharded_like(live.get(key), value) for key, value in checkpoint["state_dict"].items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As in any other strategy; each rank takes its share of what is sharded."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            indices = [i for group in saved["param_groups"] for i in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            of_index = dict(zip(indices, parameters, strict=False))
            state = {
                i: {key: _sharded_like(of_index.get(i), value) for key, value in values.items()}
                for i, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _check(module: Any) -> None:
    who = PEFTFSDPStrategy.__name__
    if not has_record(adapted_root(module)):
        raise AdapterError(
            f"{who}: nothing was injected into {type(module).__name__}. Give the strategy a method: "
            f"{who}(method=LoRA(r=8)), or the Trainer a callback: callbacks=[PEFT(LoRA(r=8))]."
        )
    empty = [name for name, p in module.named_parameters() if p.is_meta]
    if empty:
        raise AdapterError(
            f"{who}: {len(empty)} parameters on the meta device have no values ({joined(empty)}). "
            "Load the base before the run starts, in __init__, setup or configure_model: it is sharded after that."
        )
    refuse_packed(module, who)


@contextmanager
def _configured(module: Any) -> Iterator[None]:
    """``ModelParallelStrategy`` asks for an own ``configure_model``; what it is for is done."""
    if is_overridden("configure_model", module):
        yield
        return
    module.configure_model = MethodType(lambda self: None, module)
    try:
        yield
    finally:
        del module.configure_model


def _reshard(module: nn.Module) -> None:
    """Let the modules hold their shards: after a forward without a backward some still hold whole parameters."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


def _shard_copies(root: nn.Module) -> None:
    """Shard the copies of the base that the engine keeps of what is trained in place, each like its parameter."""
    for injection in record_of(root).injections.values():
        for name, other in injection.in_place.items():
            injection.in_place[name] = _sharded_like(root.get_parameter(name), other)


def _sharded_like(live: Any, value: Any) -> Any:
    """The share of this rank in ``value``, if ``live`` is sharded and ``value`` is a whole tensor of its shape."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not isinstance(live, DTensor) or not is_whole or value.shape != live.shape:
        return value
    # every rank has all of it: nothing is sent
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
