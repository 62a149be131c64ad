"""Training events: how a method takes part in a training loop, Lightning's or a plain one.

The PEFT callback tells them to the methods by itself. A plain loop calls `notify`::

    for step, batch in enumerate(batches):
        notify(model, "on_train_batch_start", optimizer, step=step)
        compute_loss(model, batch).backward()
        notify(model, "on_before_optimizer_step", optimizer, step=step)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, step=step)
        optimizer.zero_grad()
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.engine.calibration import check_calibrated
from lightning_peft.engine.errors import AdapterError
from lightning_peft.engine.inject import Injection, record_of
from lightning_peft.engine.slots import Adapter, adapters_of

Event = Literal["on_train_batch_start", "on_before_optimizer_step", "on_after_optimizer_step"]


@dataclasses.dataclass(frozen=True)
class Training:
    """What a method sees of the loop that trains its adapters.

    Args:
        model: the module that was given to `inject`.
        name: under which name.
        optimizers: all that step.
        step: optimizer steps that have been taken.
        epoch: epochs that have been completed.
        total_steps: optimizer steps that the whole run takes, if that is known.
        loss: computes the loss of the coming batch without gradients and without a trace: random numbers, modes and
            logs stay as they are. None in a loop that offers none.
        average: the mean of a tensor over all devices that train together.
    """

    model: nn.Module
    name: str
    optimizers: Sequence[Optimizer]
    step: int = 0
    epoch: int = 0
    total_steps: int | None = None
    loss: Callable[[], Tensor] | None = None
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def injection(self) -> Injection:
        """What `inject` did under this name."""
        return record_of(self.model).injections[self.name]

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that the method keeps beside its adapters (`Method.initial_state`); saved and resumed."""
        return self.injection.state

    def adapters(self) -> list[tuple[str, nn.Module, Adapter]]:
        """(module name, module, adapter) of all that were injected under this name."""
        return adapters_of(self.model, self.name)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained under this name, frozen at the moment or not."""
        own = {id(p) for _, _, adapter in self.adapters() for p in adapter.parameters()}
        in_place = self.injection.in_place
        return {name: p for name, p in self.model.named_parameters() if name in in_place or id(p) in own}

    def batch_loss(self) -> float:
        """`loss`, averaged over devices.

        Raises:
            AdapterError: the loop offers none.
        """
        if self.loss is None:
            method = type(self.injection.method).__name__
            raise AdapterError(
                f"{method} measures the loss of a batch while training. Train with the PEFT callback, or give it: "
                "notify(model, 'on_train_batch_start', optimizer, step=step, loss=lambda: compute_loss(model, batch))."
            )
        with torch.no_grad():
            return self.average(self.loss().detach()).item()

    def run_length(self) -> int:
        """`total_steps`.

        Raises:
            AdapterError: it is not known.
        """
        if self.total_steps is None:
            method = type(self.injection.method).__name__
            raise AdapterError(
                f"{method} has a schedule over the whole run, whose length is not known. Give the Trainer max_steps or "
                "max_epochs, or a plain loop: notify(model, event, optimizer, step=step, total_steps=...)."
            )
        return self.total_steps

    def is_new(self, choice: Any) -> bool:
        """Whether ``choice`` differs from that of the last call, which nothing saves: after a resume all is new."""
        new = self.injection.choice != choice
        self.injection.choice = choice
        return new


def notify(
    model: nn.Module,
    event: Event,
    optimizers: Optimizer | Sequence[Optimizer],
    names: Collection[str] | None = None,
    **now: Any,
) -> dict[str, Tensor]:
    """Tell an event to the methods in ``model`` whose adapters are active, in the order of injection.

    With ``"on_before_optimizer_step"``, the gradients of their penalties are added first: once for each step, however
    many batches it has.

    Args:
        model: the module that was given to `inject`.
        event: ``"on_train_batch_start"`` before the first batch of each optimizer step,
            ``"on_before_optimizer_step"`` when its gradients are complete, ``"on_after_optimizer_step"`` behind it.
        optimizers: one, or all that step.
        names: of the adapters to tell; all by default.
        now: ``step``, ``epoch``, ``total_steps``, ``loss`` and ``average`` of `Training`.

    Returns:
        Name -> value of the penalties that were added.
    """
    several = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    added: dict[str, Tensor] = {}
    for name, injection in record_of(model).injections.items():
        if injection.active and (names is None or name in names):
            check_calibrated(model, name)
            training = Training(model, name, several, **now)
            if event == "on_before_optimizer_step":
                added |= {f"{name}/{key}": value for key, value in _penalize(training).items()}
            getattr(injection.method, event)(training)
    return added


def _penalize(training: Training) -> dict[str, Tensor]:
    """Add the gradients of the penalties of a method; not by ``backward``, which wrappers of the model listen to."""
    penalties = training.injection.method.penalties(training)
    trained = [p for p in training.parameters().values() if p.requires_grad] if penalties else []
    if trained:
        gradients = torch.autograd.grad(sum(penalties.values()), trained, allow_unused=True)  # type: ignore[arg-type]
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return {key: value.detach() for key, value in penalties.items()}
