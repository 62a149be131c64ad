"""Routing: many adapters in one batch, each sample answered with one of its own.

While it lasts, each slot holds one `_Route` in the place of its adapters, which gives each its part of the batch. Where
all of them are of one kind that knows a way for many (`Adapter.together`), the layer below runs once for all samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine import slots
from lightning_peft.engine.errors import AdapterError
from lightning_peft.engine.inject import ModelT, Record, check_known, record_of
from lightning_peft.engine.slots import Adapter, Layer, adapters_of

BASE = "none"  # in the place of an adapter name


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
            adapters are merged. Inside: a layer is given a batch that fits not the number of names.
    """
    record = record_of(model)
    names = _checked(model, record, adapter_names)
    before = [(module, module._active, module._called) for _, module in slots.slots(model)]
    outer, record.routed = record.routed, True
    try:
        for path, module in slots.slots(model):
            stacks = {name: tuple(slots.named(module, name)) for name in set(names)}
            module._active = ()  # type: ignore[assignment]  # nothing may act through a weight that is read
            route = _Route(path, [stacks[name] for name in names]) if any(stacks.values()) else None
            module._called = () if route is None else (route,)  # type: ignore[assignment]
        yield model
    finally:
        record.routed = outer
        for module, active, called in before:
            module._active, module._called = active, called


def _checked(model: nn.Module, record: Record, adapter_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(adapter_names, str) or not adapter_names:
        raise AdapterError(
            f"routed: expected an adapter name for each sample of the batch, such as ['a', 'b'], got {adapter_names!r}."
        )
    names = tuple(adapter_names)
    if record.merged is not None:
        raise AdapterError("the adapters are merged into the base. unmerge(model) before routing samples to them.")
    if BASE in record.injections:
        raise AdapterError(f"routed: {BASE!r} stands for the base, but an adapter has that name. Inject it as another.")
    wanted = [name for name in dict.fromkeys(names) if name != BASE]
    check_known(record, wanted)
    for name, injection in record.injections.items():
        if injection.in_place and (name in wanted or injection.active):
            what = "cannot be routed" if name in wanted else "is active, so that no sample would see the base"
            fix = "Leave it out" if name in wanted else "set_active(model, ()) first"
            raise AdapterError(
                f"adapter {name!r} trains parameters in place ({next(iter(injection.in_place))!r}), which all samples "
                f"of a batch share: it {what}. {fix}, or run batches of its own for it."
            )
    read = {id(owner) for m in model.modules() if slots.is_slot(m) for owner in m._reads}  # type: ignore[union-attr]
    for name in wanted:
        for path, module, adapter in adapters_of(model, name):
            if adapter.site.kind == "module":
                because = f"sits around {path!r} as a whole and not on one layer"
            elif id(module) in read:
                because = f"sits on {path!r}, whose weight is read without a call of the layer"
            else:
                continue
            raise AdapterError(
                f"adapter {name!r} cannot be routed: {type(adapter).__name__} {because}, so that it cannot act on some "
                "samples of a batch. Run batches of its own for it."
            )
    return names


class _Route:
    """In the place of the adapters of one slot: ``stacks[i]`` are those of sample i."""

    def __init__(self, path: str, stacks: list[tuple[Adapter, ...]]) -> None:
        self.path = path
        self.stacks = list(dict.fromkeys(stacks))
        self.of = [self.stacks.index(stack) for stack in stacks]
        self.adapters = [adapter for stack in self.stacks for adapter in stack]
        self.site = self.adapters[0].site
        self.one_kind = max(map(len, self.stacks)) == 1 and len({type(a) for a in self.adapters}) == 1
        self._made: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor, list[int]]] = {}

    def __call__(self, x: Tensor, layer: Layer) -> Any:
        self._check(x, layer)
        if len(self.stacks) == 1:
            return layer.under(self.stacks[0])(x)
        index, order, back, lengths = self._plan(len(x) // len(self.of), x.device)
        if self.one_kind:
            y = type(self.adapters[0]).together(self.adapters, x, layer, index)
            if y is not None:
                return y
        parts = x.index_select(0, order).split(lengths)
        answers = [layer.under(stack)(part) for stack, part in zip(self.stacks, parts, strict=True)]
        return torch.cat(answers).index_select(0, back)

    def _plan(self, repeats: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """The adapter of each sample, -1 for none; samples in the order of the stacks, and back; length of each."""
        key = repeats, device
        if key not in self._made:
            ranks = iter(range(len(self.stacks)))
            number = [next(ranks) if stack else -1 for stack in self.stacks]
            with torch.inference_mode(False):  # else a later pass that trains could not save them
                of = torch.tensor(self.of).repeat_interleave(repeats)
                order = of.argsort(stable=True)
                tensors = [t.to(device) for t in (torch.tensor(number)[of], order, order.argsort())]
            self._made[key] = (*tensors, torch.bincount(of, minlength=len(self.stacks)).tolist())  # type: ignore[assignment]
        return self._made[key]

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
