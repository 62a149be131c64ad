"""Terms that methods add to the loss of a batch, where Lightning optimizes by itself."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from lightning_peft.callbacks.instance_hooks import instead, unwrap
from lightning_peft.callbacks.probe import batch_loss
from lightning_peft.callbacks.telemetry import PREFIX
from lightning_peft.engine import total_loss
from lightning_peft.interop.files import adapted_root


@contextmanager
def with_terms(trainer: L.Trainer, module: L.LightningModule, names: Collection[str]) -> Iterator[None]:
    """While it lasts, ``training_step`` returns its loss with the terms of the adapters ``names``, and logs them."""

    def run(self: L.LightningModule, own: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():  # the loss of a batch on the side, that of the base among them
            return own(*args)
        batch, index = (*args, 0)[:2]
        answer, terms = total_loss(
            adapted_root(self), lambda: own(*args), lambda: batch_loss(trainer, self, batch, index), names
        )
        self.log_dict({f"{PREFIX}/{key}": value for key, value in terms.items()})
        return answer

    instead(module, "training_step", run, once=lambda _: False)
    try:
        yield
    finally:
        unwrap(module, "training_step", run)
