"""Gradients that are averaged over the ranks by us, at the moment at which torch's own wrappers do it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.strategies.ranks import average_gradients


class AveragingStrategy(ParallelStrategy):
    """A strategy that averages gradients after the last backward of an accumulation window.

    That is before ``on_after_backward`` is called, and before they are unscaled and clipped. In front of another
    strategy in the list of parent classes.
    """

    _blocked = False
    _trained: bytes | None = None  # which parameters trained at the last average

    def averaged_parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """Those whose gradients each rank has for itself."""
        return module.parameters()

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
        parameters = list(self.averaged_parameters(module))
        trained = bytes(p.requires_grad for p in parameters)
        average_gradients(parameters, check=trained != self._trained, others=running_statistics(module))
        self._trained = trained


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Those of the normalisation layers below ``module`` that move, because the layer is in training mode."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    return [t for m in layers for t in (m.running_mean, m.running_var) if t is not None]
