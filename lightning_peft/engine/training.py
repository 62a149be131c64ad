"""Training events: how a method takes part in a training loop, Lightning's or a plain one.

The PEFT callback tells them to the methods by itself. A plain loop calls `notify`::

    for step, batch in enumerate(batches):
        notify(model, "on_train_batch_start", optimizer, step=step)
        compute_loss(model, batch).backward()
        notify(model, "on_before_optimizer_step", optimizer, step=step)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, step=step)
        optimizer.zero_grad()

A method that adds terms to the loss of each batch (BALoRA) needs `total_loss` around its computation, there and in
manual optimization::

        loss, terms = total_loss(model, lambda: compute_loss(model, batch))
        loss.backward()
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.engine.calibration import Loss, check_calibrated
from lightning_peft.engine.errors import AdapterError
from lightning_peft.engine.inject import disabled
from lightning_peft.engine.record import Injection, record_of
from lightning_peft.engine.slots import adapters_of

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

    def adapters(self) -> list[tuple[str, nn.Module, Any]]:
        """(module name, module, adapter) of all that were injected under this name; of the classes of the method."""
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
                _check_watched(training)
                added |= {f"{name}/{key}": value for key, value in _penalize(training).items()}
            getattr(injection.method, event)(training)
    return added


def total_loss(
    model: nn.Module,
    compute: Callable[[], Loss],
    base: Callable[[], Any] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """The loss of a batch, with the terms that methods add to it which look at the outputs of the model.

    Where a method does, the batch goes through the base model first, without gradients.

    Args:
        model: the module that was given to `inject`.
        compute: computes the loss of the batch with ``model``; or a mapping with ``"loss"`` in it.
        base: runs the same batch through ``model``, whose adapters are switched off then; ``compute`` in evaluation
            mode, with the same random numbers, by default.
        names: of the adapters whose terms to add; all by default.

    Returns:
        What ``compute`` returned with the terms added, and name -> value of each.

    Raises:
        AdapterError: the module that a method looks at was not called.
    """
    chosen = {n: i for n, i in record_of(model).injections.items() if i.active and (names is None or n in names)}
    paths = {name: path for name, injection in chosen.items() if (path := injection.method.watched(model))}
    if not paths:
        return compute(), {}
    with disabled(model), torch.no_grad(), _outputs(model, paths.values()) as base_outputs:
        (base or functools.partial(_on_the_side, model, compute))()
    with _outputs(model, paths.values()) as outputs:
        answer = compute()
    terms: dict[str, Tensor] = {}
    for name, path in paths.items():
        if not outputs[path] or len(outputs[path]) != len(base_outputs[path]):
            raise AdapterError(
                f"{type(chosen[name].method).__name__} looks at what {path!r} answers, and it was called "
                f"{len(outputs[path])} times for this batch, {len(base_outputs[path])} times in the base model. Name "
                "the module whose outputs are the logits."
            )
        chosen[name].watched = True
        for mine, theirs in zip(outputs[path], base_outputs[path], strict=True):
            for key, term in chosen[name].method.output_losses(mine, theirs).items():
                terms[f"{name}/{key}"] = terms.get(f"{name}/{key}", 0) + term / len(outputs[path])
    added: Any = sum(terms.values())
    answer = {**answer, "loss": answer["loss"] + added} if isinstance(answer, Mapping) else answer + added
    return answer, {key: value.detach() for key, value in terms.items()}


@contextmanager
def _outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Path -> what this module answers while it lasts, call by call."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: found[path].append(y))
        for path in found
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _on_the_side(model: nn.Module, compute: Callable[[], Any]) -> None:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            compute()
    finally:
        for module, training in modes.items():
            module.training = training


def _check_watched(training: Training) -> None:
    method = training.injection.method
    if method.watched(training.model) and not training.injection.watched:
        raise AdapterError(
            f"{type(method).__name__} adds terms to the loss of each batch, and this loss is without them. In manual "
            "optimization and in a plain loop: loss, terms = total_loss(model, lambda: compute_loss(model, batch))."
        )


def _penalize(training: Training) -> dict[str, Tensor]:
    """Add the gradients of the penalties of a method; not by ``backward``, which wrappers of the model listen to."""
    penalties = training.injection.method.penalties(training)
    if any(penalty.requires_grad for penalty in penalties.values()):  # not while all that they are of is frozen
        trained = [p for p in training.parameters().values() if p.requires_grad]
        gradients = torch.autograd.grad(sum(penalties.values()), trained, allow_unused=True)  # type: ignore[arg-type]
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return {key: value.detach() for key, value in penalties.items()}
