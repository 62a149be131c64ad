"""Starts that are measured on data, before the first step.

The PEFT callback calibrates by itself, on the first batches of the user's training data. A plain loop calls
`calibrate` behind `inject`::

    inject(model, CorDA(r=8))
    calibrate(model, [lambda batch=batch: compute_loss(model, batch) for batch in some_batches])
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_peft.engine.errors import AdapterError
from lightning_peft.engine.record import record_of
from lightning_peft.engine.slots import Adapter, active_adapters, adapters_of, effective

Loss = Tensor | Mapping[str, Tensor]

CALIBRATED = "calibrated"  # the key in a method's state that says so


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a method sees of the data.

    Args:
        model: the module that was given to `inject`.
        name: under which name.
        losses: each computes the loss of one batch, or a mapping with the loss and its parts.
    """

    model: nn.Module
    name: str
    losses: Sequence[Callable[[], Loss]]

    def adapters(self) -> list[tuple[str, nn.Module, Any]]:
        """(module name, module, adapter) of all that were injected under this name; of the classes of the method."""
        return adapters_of(self.model, self.name)

    def each(self) -> Iterator[tuple[str, nn.Module, Any]]:
        """`adapters`, one by one, with a bar if going through them takes longer than a moment."""
        return iter(tqdm(self.adapters(), desc=self._who, unit="layer", delay=2, leave=False))

    def weight(self, module: nn.Module, adapter: Adapter) -> Tensor:
        """What lies below ``adapter`` on ``module``: (d_out, d_in) with the adapters that were injected before."""
        active = active_adapters(module, adapter.site.weight)
        weight, _ = effective(module, adapter.site, itertools.takewhile(lambda a: a is not adapter, active))
        return weight.detach().flatten(1)

    def observe_inputs(self, observe: Callable[[nn.Module, Tensor], None]) -> None:
        """Run all batches without gradients; ``observe(module, x)`` sees inputs (tokens, d_in) of adapted layers.

        Padding is left out where a module of the model is called with an ``attention_mask`` (batch, tokens) that says
        what is padding, as the models of transformers are.
        """
        masks: list[Tensor] = []

        def find_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if not masks and isinstance(mask, Tensor) and mask.dim() == 2:
                masks.append(mask.bool())

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if masks and masks[0].shape == x.shape[:-1]:
                x = x[masks[0]]
            x = x.reshape(-1, x.shape[-1]).float()
            if not x.isfinite().all():
                raise self._unusable("input", paths[module], "not finite")
            observe(module, x)

        paths = {module: path for path, module, _ in self.adapters()}
        handles = [module.register_forward_pre_hook(hook) for module in paths]
        handles += [m.register_forward_pre_hook(find_mask, with_kwargs=True) for m in self.model.modules()]
        try:
            with torch.no_grad():
                for loss in self.losses:
                    masks.clear()
                    loss()
        finally:
            for handle in handles:
                handle.remove()

    def measured(self, what: str, path: str, value: Tensor | None) -> Tensor:
        """``value``, which was measured for the layer ``path``.

        Raises:
            AdapterError: it is missing, not finite, or zero.
        """
        if value is None:
            raise self._unusable(what, path, "missing: the layer was not called")
        if not value.isfinite().all() or not value.any():
            raise self._unusable(what, path, "zero" if not value.any() else "not finite")
        return value

    def _unusable(self, what: str, path: str, fault: str) -> AdapterError:
        return AdapterError(
            f"{self._who}: the {what} of {path!r} is {fault}. Look at the data, or leave the layer out."
        )

    @property
    def _who(self) -> str:
        return type(record_of(self.model).injections[self.name].method).__name__

    def gradients(self, part: str = "loss", power: int = 1) -> dict[str, Tensor]:
        """Layer -> mean over all batches of the gradient of the loss (d_out, d_in), to a power entry by entry.

        One layer at a time is on the device.

        Args:
            part: of the loss; a key of what the training step returns. The whole loss by default.
            power: 2 gives the diagonal of the Fisher information, as far as batches show it.
        """
        sums: dict[str, Tensor] = {}
        weights = {path: (module._parameters[a.site.weight], a.site) for path, module, a in self.adapters()}

        def keep(path: str, parameter: Tensor) -> None:
            gradient = parameter.grad.T if weights[path][1].transposed else parameter.grad  # type: ignore[union-attr]
            sums[path] = sums.get(path, 0) + gradient.flatten(1).to("cpu", torch.float32) ** power  # type: ignore[union-attr]
            parameter.grad = None

        with _requiring_gradients(self.model, [weight for weight, _ in weights.values()]):
            handles = [
                weight.register_post_accumulate_grad_hook(lambda p, path=path: keep(path, p))  # type: ignore[union-attr]
                for path, (weight, _) in weights.items()
            ]
            try:
                for loss in self.losses:
                    self._part(loss(), part).backward()
            finally:
                for handle in handles:
                    handle.remove()
        return {path: total / len(self.losses) for path, total in sums.items()}

    def _part(self, answer: Loss, part: str) -> Tensor:
        parts = answer if isinstance(answer, Mapping) else {"loss": answer}
        if part not in parts:
            raise AdapterError(
                f"{self._who} needs {part!r}, a part of the loss by itself, and the training step returns "
                f"{', '.join(parts)}. Let it return {{'loss': ..., {part!r}: ...}}, all with their graphs."
            )
        return parts[part]


def calibrate(model: nn.Module, losses: Sequence[Callable[[], Loss]], name: str = "default") -> None:
    """Measure the start of the adapters ``name``; flags, gradients and random numbers stay as they are.

    Args:
        model: the module that was given to `inject`.
        losses: each computes the loss of one batch with ``model``; or a mapping with ``"loss"`` and its parts, for a
            method that tells parts of it apart.
        name: which adapters.

    Raises:
        AdapterError: there is no batch, or a measurement is not finite; the adapters are as they were then.
    """
    injection = record_of(model).injections[name]
    who = type(injection.method).__name__
    if not losses:
        raise AdapterError(f"{who}: its start is measured on data, and there is no batch. Give it some training data.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            injection.method.calibrate(Calibration(model, name, losses))
    finally:
        for module, training in modes.items():
            module.training = training
    injection.state[CALIBRATED].fill_(1)


def check_calibrated(model: nn.Module, name: str) -> None:
    """Raise an `AdapterError` if the start of the adapters ``name`` is not measured yet."""
    state, method = record_of(model).injections[name].state, record_of(model).injections[name].method
    if CALIBRATED in state and not state[CALIBRATED]:
        raise AdapterError(
            f"{type(method).__name__}: its start is measured on data, and was not. Train with the PEFT callback, or "
            "call calibrate(model, losses) behind inject."
        )


@contextmanager
def _requiring_gradients(model: nn.Module, weights: Sequence[Any]) -> Iterator[None]:
    """While it lasts, these parameters and no others."""
    flags = {p: p.requires_grad for p in model.parameters()}
    wanted = set(weights)
    for p in flags:
        p.requires_grad_(p in wanted)
    try:
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
