"""Adapted layers on random inputs: whether a file that was converted, or a model that was merged, answers the same.

Layer by layer, so that nothing has to be known of what the model around them takes.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_peft.engine import Layer, Target, adapter_state, adapters_of
from lightning_peft.engine.method import METHOD_STATE
from lightning_peft.engine.record import record_of
from lightning_peft.engine.slots import active_adapters, effective, holds_adapters
from lightning_peft.engine.targets import candidates


class Answers(NamedTuple):
    """What layers answer to random inputs, and what cannot be asked that way.

    Args:
        outputs: name of the weight -> output with the adapters, and without them.
        beside: key -> tensor of all else that was trained.
        others: how many adapters are no change of weights: a layer alone may lack what they wait for.
    """

    outputs: dict[str, tuple[Tensor, Tensor]]
    beside: dict[str, Tensor]
    others: int


@torch.no_grad()
def answers(model: nn.Module, name: str = "default", at: Collection[str] = ()) -> Answers:
    """Those of all weights that adapter ``name`` changes, and of those ``at`` these names.

    ``model`` is the one that was given to `inject`, in evaluation mode.
    """
    targets = [t for t in changed(model, name) if t.name not in at] + named(model, at)
    asked = {t.site.prefix(t.owner) for t in targets}
    in_place = {f"{t.owner}.{parameter}".lstrip(".") for t in targets for parameter in (t.site.weight, t.site.bias)}
    beside = {
        key: value.detach().cpu()
        for key, value in adapter_state(model, name).items()
        if not key.startswith((METHOD_STATE, *asked)) and key not in in_place
    }
    others = sum(adapter.unmergeable_because() is not None for _, _, adapter in adapters_of(model, name))
    return Answers(outputs(targets), beside, others)


def changed(model: nn.Module, name: str = "default") -> list[Target]:
    """The weights that adapter ``name`` changes: by an adapter that is a change of weights, or in place."""
    trained = {id(model.get_parameter(key)) for key in record_of(model).injections[name].in_place}
    sits = {(id(m), a.site.weight) for _, m, a in adapters_of(model, name) if a.unmergeable_because() is None}
    everything = [(t, id(t.module), id(t.module._parameters[t.site.weight])) for t in candidates(model)]
    return [t for t, module, weight in everything if (module, t.site.weight) in sits or weight in trained]


def named(model: nn.Module, names: Collection[str]) -> list[Target]:
    """The weights of these names."""
    return [t for t in candidates(model) if t.name in names]


@torch.no_grad()
def outputs(targets: Iterable[Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> output for a random input, the same at each call: with the adapters that act there, and without.

    Of a weight that its module reads without being called, the effective value in place of an output.
    """
    answered = {}
    for target in tqdm(list(targets), desc="Comparing", unit="layer", delay=2, leave=False):
        module, site = target.module, target.site
        acting = active_adapters(module, site.weight) if holds_adapters(module) else ()
        if site.read or site.kind == "norm":
            with_, without = map(_flat, (effective(module, site, acting), site.get(module)))
        else:
            x = _input(target)
            with_ = module(x)
            without = Layer(module, site)(x) if acting else with_
        answered[target.name] = (with_.float().cpu(), without.float().cpu())
    return answered


def _input(target: Target) -> Tensor:
    """A random input: five tokens, or indices, or an image a little larger than the kernel."""
    generator, module = torch.Generator().manual_seed(0), target.module
    like = target.site.get(module)[0]
    if target.site.kind == "embedding":
        return torch.randint(target.shape[1], (1, 64), generator=generator).to(like.device)
    size: tuple[Any, ...] = (1, 5, target.shape[1])
    if target.site.kind == "conv":
        kernel: Any = zip(module.kernel_size, module.dilation, strict=True)  # type: ignore[arg-type]
        size = (1, module.in_channels, *(2 * (1 + d * (k - 1)) for k, d in kernel))
    x = torch.randn(size, generator=generator)
    return x.to(like.device, like.dtype if like.is_floating_point() else None)


def _flat(parameters: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in parameters if tensor is not None])


def compared(before: Answers, after: Answers) -> str:
    """How far apart they are, in a line."""
    first, second = before.outputs, after.outputs
    parts = []
    if first:
        largest, where = difference({k: v[0] for k, v in first.items()}, {k: v[0] for k, v in second.items()})
        effect = max(_distance(with_, without) for with_, without in (*first.values(), *second.values()))
        parts.append(
            f"{len(first)} layers on random inputs: largest difference {largest:.1e} of the output"
            f"{f' ({where})' if where else ''}, where the adapter changes up to {effect:.1e} of it"
        )
    if before.others:
        parts.append(f"{before.others} adapters are no change of weights: their tensors are compared, not what they do")
    if before.beside or after.beside:
        largest, where = difference(before.beside, after.beside)
        parts.append(f"{len(before.beside)} tensors: largest difference {largest:.1e}{f' ({where})' if where else ''}")
    return "; ".join(parts) + "."


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `_distance` and its key; infinite for a tensor that is missing on one side."""
    worst = (0.0, "")
    for key in {**one, **other}:
        both = key in one and key in other and one[key].shape == other[key].shape
        worst = max(worst, (_distance(one[key], other[key]) if both else math.inf, key))
    return worst if worst[0] else (0.0, "")


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not one.numel():
        return 0.0
    size = float(one.double().abs().max()) or 1.0
    return float((one.double() - other.double()).abs().max()) / size
