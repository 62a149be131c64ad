"""The loss of a batch, computed on the side of training."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_peft.engine import AdapterError


def batch_loss(trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """The loss of ``batch`` in evaluation mode, without a graph; nothing else changes.

    Raises:
        AdapterError: ``training_step`` optimizes by itself, or returns no loss.
    """
    return batch_losses(trainer, module, batch, batch_idx, gradients=False)["loss"]


def batch_losses(
    trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int, gradients: bool = True
) -> dict[str, Tensor]:
    """All tensors that ``training_step`` returns for ``batch``, the loss as ``"loss"``; otherwise as `batch_loss`.

    Raises:
        AdapterError: ``training_step`` optimizes by itself, or returns no loss.
    """
    if not module.automatic_optimization:
        raise AdapterError(
            "PEFT: the loss of a batch cannot be measured on the side, because training_step optimizes by itself. Use "
            "automatic optimization, or another method."
        )
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    arguments = (batch, batch_idx) if takes_index else (batch,)
    wanted = torch.set_grad_enabled(gradients and torch.is_grad_enabled())
    # the step itself, not through wrappers of the strategy, which would wait for a backward of their own
    with wanted, _without_a_trace(module), trainer.strategy.precision_plugin.train_step_context():
        answer = module.training_step(*arguments)
    losses = answer if isinstance(answer, Mapping) else {"loss": answer}
    if not isinstance(losses.get("loss"), Tensor):
        raise AdapterError(
            f"PEFT: training_step returned {type(answer).__name__} where the loss of a batch is measured. Let it "
            "return the loss, or a mapping with it under 'loss'."
        )
    return {key: value for key, value in losses.items() if isinstance(value, Tensor)}


@contextmanager
def _without_a_trace(module: L.LightningModule) -> Iterator[None]:
    modes: dict[nn.Module, bool] = {m: m.training for m in module.modules()}
    metrics = {m: copy.deepcopy(m.__dict__) for m in modes if isinstance(m, Metric)}
    own: dict[str, Any] = {name: module.__dict__[name] for name in ("log", "log_dict") if name in module.__dict__}
    module.__dict__.update(log=_nothing, log_dict=_nothing)
    for m in modes:
        m.training = False
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for m, training in modes.items():
            m.training = training
        for metric, before in metrics.items():
            metric.__dict__.update(before)
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        module.__dict__.update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes what would be logged."""
