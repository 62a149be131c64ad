"""Data parallel training that sends nothing but the gradients of what trains, whatever trains at a step.

There is no ``DistributedDataParallel`` around the module: no broadcast of the base at the start, no buckets made once
and for all, and no search for unused parameters. After the last backward of an accumulation window the gradients that
are there are averaged over the ranks, where torch's wrapper does it too: before ``on_after_backward``, before they are
unscaled and clipped.
"""

from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_peft.engine import AdapterError, Method
from lightning_peft.engine.record import has_record
from lightning_peft.engine.slots import is_slot
from lightning_peft.interop.files import adapted_root
from lightning_peft.strategies.averaging import AveragingStrategy
from lightning_peft.strategies.injecting import InjectingStrategy
from lightning_peft.strategies.ranks import check_same_start


class PEFTDDPStrategy(AveragingStrategy, InjectingStrategy, DDPStrategy):
    """Data parallel training in which the frozen base is not sent, and what trains may change from step to step.

    All ranks have to start from the same model; that is checked, not brought about. Running statistics of normalisation
    layers that are in training mode are averaged together with the gradients; all other buffers are left to their rank.

    Args:
        method: what to inject, as `PEFT` takes it; None if a `PEFT` callback is in the Trainer's list.
        accelerator: this and the following are those of Lightning's ``DDPStrategy``.
        parallel_devices: see there.
        cluster_environment: see there.
        checkpoint_io: see there.
        precision_plugin: see there.
        process_group_backend: see there.
        timeout: see there.
        start_method: see there.
        for_the_wrapper: any other argument of ``DDPStrategy``, which is refused.

    Raises:
        AdapterError: an argument is for torch's wrapper; or, when a run starts, nothing was injected, the ranks differ
            in the model, or a BatchNorm with an adapter would be replaced by ``sync_batchnorm``.
    """

    def __init__(
        self,
        method: Method | list[Method] | str | None = None,
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **for_the_wrapper: Any,
    ) -> None:
        if for_the_wrapper:
            raise AdapterError(
                f"{type(self).__name__}: there is no argument {min(for_the_wrapper)!r}, as there is no "
                "DistributedDataParallel in it that could take it. Unused parameters and changing ones need no option "
                "here; leave it out."
            )
        super().__init__(
            method=method,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    def setup(self, trainer: Trainer) -> None:
        """As in ``DDPStrategy``, without its wrapper and without its broadcast."""
        if self._layer_sync is not None and trainer.state.fn == TrainerFn.FITTING:
            self._refuse_to_lose_adapters(self.model)
            self.model = self._layer_sync.apply(self.model)  # type: ignore[arg-type]
        self._trained = None
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        if not has_record(adapted_root(model)):
            raise AdapterError(
                f"{type(self).__name__}: nothing was injected into {type(model).__name__}. Give the strategy a method: "
                f"{type(self).__name__}(method=LoRA(r=8)), or the Trainer a callback: callbacks=[PEFT(LoRA(r=8))]."
            )
        check_same_start(model)
        return model

    @staticmethod
    def _refuse_to_lose_adapters(model: Any) -> None:
        adapted = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and is_slot(m)]
        if adapted:
            raise AdapterError(
                f"sync_batchnorm replaces {len(adapted)} BatchNorm layers that have an adapter, among them "
                f"{adapted[0]!r}, and the adapters would be without effect. Leave sync_batchnorm out, or those layers "
                "with exclude_modules."
            )
