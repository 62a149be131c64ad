"""Data parallel training that sends nothing but the gradients of what trains, whatever trains at a step.

There is no ``DistributedDataParallel`` around the module: no broadcast of the base at the start, no buckets made once
and for all, and no search for unused parameters. After the last backward of an accumulation window the gradients that
are there are averaged over the ranks, where torch's wrapper does it too: before ``on_after_backward``, before they are
unscaled and clipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_peft.engine import AdapterError, Method
from lightning_peft.engine.inject import has_record
from lightning_peft.engine.slots import is_slot
from lightning_peft.interop.files import adapted_root
from lightning_peft.strategies.injecting import InjectingStrategy
from lightning_peft.strategies.ranks import average_gradients, check_same_start

# arguments of DDPStrategy that mean something without the wrapper
_TAKEN = {
    *("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"),
    *("process_group_backend", "timeout", "start_method"),
}


class PEFTDDPStrategy(InjectingStrategy, DDPStrategy):
    """Data parallel training in which the frozen base is not sent, and what trains may change from step to step.

    All ranks have to start from the same model; that is checked, not brought about. Running statistics of normalisation
    layers that are in training mode are averaged together with the gradients; all other buffers are left to their rank.

    Args:
        method: what to inject, as `PEFT` takes it; None if a `PEFT` callback is in the Trainer's list.
        kwargs: of Lightning's ``DDPStrategy``, as far as they do not concern torch's wrapper.

    Raises:
        AdapterError: an argument is for torch's wrapper; or, when a run starts, nothing was injected, the ranks differ
            in the model, or a BatchNorm with an adapter would be replaced by ``sync_batchnorm``.
    """

    def __init__(self, method: Method | list[Method] | str | None = None, **kwargs: Any) -> None:
        foreign = sorted(kwargs.keys() - _TAKEN)
        if foreign:
            raise AdapterError(
                f"{type(self).__name__} has no argument {foreign[0]!r}: there is no DistributedDataParallel in it that "
                "could take it. Unused parameters and changing ones need no option here; leave it out."
            )
        super().__init__(method=method, **kwargs)
        self._blocked = False
        self._trained: bytes | None = None  # which parameters trained at the last average

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

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While it lasts, gradients stay as each rank has computed them."""
        before, self._blocked = self._blocked, True
        try:
            yield
        finally:
            self._blocked = before

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """As in ``Strategy``, with the gradients averaged before anybody is told that they are there."""
        module: Any = self.lightning_module
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        if not self._blocked and self.world_size > 1:
            self._average(module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _average(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        trained = bytes(p.requires_grad for p in parameters)
        average_gradients(parameters, check=trained != self._trained, others=running_statistics(module))
        self._trained = trained


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Those of the normalisation layers below ``module`` that move, because the layer is in training mode."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    return [t for m in layers for t in (m.running_mean, m.running_var) if t is not None]
