"""Routing: many adapters in one batch, each sample answered with one of its own.

While it lasts, each slot holds one `_Route` in the place of its adapters, which gives each its part of the batch. Where
all of them share a way for many (`Adapter.together`), the layer below runs once for all samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine import slots
from lightning_peft.engine.errors import AdapterError
from lightning_peft.engine.record import ModelT, Record, check_known, record_of
from lightning_peft.engine.slots import Adapter, Layer, Samples

BASE = "none"  # in the place of an adapter name

Spread = dict[tuple[tuple[int, ...], bool, int, torch.device], Samples]


@contextmanager
def routed(model: ModelT, adapter_names: Sequence[str]) -> Iterator[ModelT]:
    """While it lasts, sample i of each batch is answered with adapter ``adapter_names[i]`` alone.

    Which adapters are active does not count meanwhile, and cannot be changed. A batch that is k times as long has k
    samples for each name, one behind the other, as beams of ``generate`` are. Gradients go to each adapter from its
    own samples alone; where activations are checkpointed, call ``backward`` inside too.

    Every adapted layer must have the samples along the first axis of its input.

    Args:
        model: the model that was given to `inject`.
        adapter_names: one for each sample of a batch; ``"none"`` stands for the base.

    Raises:
        AdapterError: there is no adapter of that name, or it cannot act on a part of a batch: it trains parameters in
            place, sits around more than one layer, or on a weight that is read without a call of its layer. Or the
            adapters are merged. Inside: a layer is given a batch that does not fit the number of names.
    """
    record = record_of(model)
    names = _checked(record, adapter_names)
    read = {id(owner) for _, m in slots.base_modules(model) if slots.is_slot(m) for owner in m._reads}  # type: ignore[union-attr]
    spread: Spread = {}
    routes = [(module, _route(path, module, names, id(module) in read, spread)) for path, module in slots.slots(model)]
    before: list[tuple[Any, Any, Any]] = [(module, module._active, module._called) for module, _ in routes]
    outer, record.routed = record.routed, True
    try:
        for module, route in routes:
            module._active = ()  # type: ignore[assignment]  # nothing may act through a weight that is read
            module._called = () if route is None else (route,)  # type: ignore[assignment]
        yield model
    finally:
        record.routed = outer
        for module, active, called in before:
            module._active, module._called = active, called


def _checked(record: Record, adapter_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(adapter_names, str) or not adapter_names:
        raise AdapterError(
            f"routed: expected an adapter name for each sample of the batch, such as ['a', 'b'], got {adapter_names!r}."
        )
    names = tuple(adapter_names)
    if None in names or "__base__" in names:  # as HF PEFT has it
        raise AdapterError(f"routed: {BASE!r} stands for the base, got {list(names)}.")
    if record.merged is not None:
        raise AdapterError(
            "routed: the adapters are merged into the base. unmerge(model) before routing samples to them."
        )
    if BASE in record.injections:
        raise AdapterError(f"routed: {BASE!r} stands for the base, but an adapter has that name. Inject it as another.")
    wanted = [name for name in dict.fromkeys(names) if name != BASE]
    check_known(record, wanted)
    for name, injection in record.injections.items():
        if injection.in_place and (name in wanted or injection.active):
            what = "cannot be routed" if name in wanted else "is active, so that no sample would see the base"
            fix = "Leave it out" if name in wanted else "set_active(model, ()) first"
            raise AdapterError(
                f"routed: adapter {name!r} trains parameters in place ({next(iter(injection.in_place))!r}), which all "
                f"samples of a batch share: it {what}. {fix}, or run batches of its own for it."
            )
    return names


def _route(path: str, module: nn.Module, names: Sequence[str], is_read: bool, spread: Spread) -> "_Route | None":
    """What takes the place of the adapters of this slot; None where the names have none in it."""
    stacks = {name: tuple(slots.named(module, name)) for name in dict.fromkeys(names)}
    for name, stack in stacks.items():
        for adapter in stack:
            if adapter.site.kind == "module":
                because = f"sits around {slots.plain_name(path)!r} as a whole and not on one layer"
            elif is_read:
                because = f"sits on {slots.plain_name(path)!r}, whose weight is read without a call of the layer"
            else:
                continue
            raise AdapterError(
                f"routed: adapter {name!r} cannot be routed: {type(adapter).__name__} {because}, so that it cannot act "
                "on some samples of a batch. Run batches of its own for it."
            )
    return _Route(path, [stacks[name] for name in names], spread) if any(stacks.values()) else None


class _Route:
    """In the place of the adapters of one slot: ``stacks[i]`` are those of sample i; all slots share ``spread``."""

    def __init__(self, path: str, stacks: list[tuple[Adapter, ...]], spread: Spread) -> None:
        self.path = path
        self.stacks = sorted(dict.fromkeys(stacks), key=lambda stack: not stack)  # samples without an adapter last
        number = {stack: i for i, stack in enumerate(self.stacks)}
        self.of = tuple(number[stack] for stack in stacks)
        self.adapters = [adapter for stack in self.stacks for adapter in stack]
        self.site = self.adapters[0].site
        ways = {type(adapter).together.__func__ for adapter in self.adapters}  # type: ignore[attr-defined]
        self.together = type(self.adapters[0]).together if max(map(len, self.stacks)) == len(ways) == 1 else None
        self.spread = spread

    def __call__(self, x: Tensor, layer: Layer) -> Any:
        self._check(x, layer)
        if len(self.stacks) == 1:
            return layer.under(self.stacks[0])(x)
        samples = self._samples(len(x) // len(self.of), x.device)
        y = None if self.together is None else self.together(self.adapters, x, layer, samples)
        if y is not None:
            return y
        return samples.joined(
            [layer.under(stack)(part) for stack, part in zip(self.stacks, samples.parts(x), strict=True)]
        )

    def _samples(self, repeats: int, device: torch.device) -> Samples:
        key = self.of, bool(self.stacks[-1]), repeats, device
        if key not in self.spread:
            with torch.inference_mode(False):  # else a later pass that trains could not save them
                of = torch.tensor(self.of).repeat_interleave(repeats)
                index = of if self.stacks[-1] else of.where(of < len(self.stacks) - 1, -1)
                order = of.argsort(stable=True)
                lengths = of.bincount(minlength=len(self.stacks)).tolist()
                self.spread[key] = Samples(index.to(device), order.to(device), order.argsort().to(device), lengths)
        return self.spread[key]

    def _check(self, x: Tensor, layer: Layer) -> None:
        axes = {"linear": 2, "embedding": 1, "norm": 2}.get(self.site.kind) or self.site.get(layer.module)[0].dim()
        if x.dim() < axes:
            raise AdapterError(
                f"routed: {self.path!r} was called with one sample {tuple(x.shape)} and not with a batch. Give one of "
                "length 1, or run one adapter at a time with set_active."
            )
        if len(x) % len(self.of):
            raise AdapterError(
                f"routed: {len(self.of)} adapter names for a batch of {len(x)} at {self.path!r}. Give one name for "
                "each sample; a layer that all samples share, or whose first axis is another, cannot be routed."
            )
