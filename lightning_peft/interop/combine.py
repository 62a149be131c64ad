"""Adapters combined: the weighted sum of what several of them change, as a new adapter.

TIES: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, arXiv:2306.01708.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank, dense, truncated
from lightning_peft.engine import Adapter, AdapterError, adapter_state, adapters_of, check_range, inject, set_active
from lightning_peft.engine.merge import check_finite
from lightning_peft.engine.record import Record, check_known, check_restorable, record_of
from lightning_peft.engine.slots import plain_name
from lightning_peft.engine.targets import is_below
from lightning_peft.interop.as_lora import lora_of

Terms = list[tuple[float, LowRank]]  # weight and adapter


@torch.no_grad()
def combine(
    model: nn.Module, weights: Mapping[str, float], name: str, *, r: int | None = None, ties: float | None = None
) -> float:
    """Add the adapter ``name``, which changes what others do, each times its weight.

    It is a plain `LoRA`, which saves, loads, merges, routes and trains as any other. It neither acts nor trains until
    `set_active` and `set_trainable` say so, and those that it is made of stay as they are.

    What is added are the changes of the weights, ``sum_i w_i B_i A_i``, and the sum is exact: factors are
    concatenated, so that ranks add up, to at most min(d_in, d_out). An adapter that does not sit on a layer adds
    nothing there. What was trained in place (heads) becomes ``W + sum_i w_i (W_i - W)``.

    HF PEFT's ``add_weighted_adapter`` calls this ``"cat"``, and ``"svd"`` with ``r``. Its ``"linear"`` is something
    else: it adds up factors, ``(sum_i sqrt(w_i) B_i)(sum_i sqrt(w_i) A_i)``, where B of one adapter meets A of another.

    Args:
        model: the model that was given to `inject`.
        weights: adapter name -> its weight, of any sign. The adapters are LoRA, or of another method whose change is a
            product of two factors, such as PiSSA.
        name: a new name.
        r: the largest rank. Each layer gets the nearest change of that rank; nothing of the size of a weight is built.
        ties: combine by TIES instead: of each change keep this fraction of the entries, the largest; at each place
            take the sign of their sum, and the weighted mean of those that have it. That is no low-rank product any
            more: ``r`` says of which rank it becomes one, and the error is large where that is small.

    Returns:
        The largest relative error of a layer, ``|delta - delta_r| / |delta|`` in the Frobenius norm: what ``r`` cost.

    Raises:
        AdapterError: an adapter is not known, or is no low-rank product, or trains a weight in place that an adapter
            sits on; the name is taken; weights, ``r`` or ``ties`` are out of range. Nothing has been changed then.
    """
    record = record_of(model)
    _check(record, weights, name, r, ties)
    for term in weights:
        check_finite(adapter_state(model, term), AdapterError)
    layers: dict[str, Terms] = {}
    for term, weight in weights.items():
        for path, _, adapter in adapters_of(model, term):
            layers.setdefault(adapter.site.name(path), []).append((weight, _low_rank(adapter, path, term)))
    trained = list(dict.fromkeys(key for term in weights for key in record.injections[term].in_place))
    whole = list(dict.fromkeys(plain_name(key).rpartition(".")[0] for key in trained))
    _check_apart(layers, whole)
    factors, errors = {}, []
    for layer, terms in layers.items():
        down, up = _factors(terms) if ties is None else _ties(terms, ties)
        down, up, error = truncated(down, up, min(len(up), down[0].numel(), r or len(down)))
        factors[layer] = down, up
        errors.append(error)
    active = [term for term, injection in record.injections.items() if injection.active]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    set_active(model, ())  # so that what is trained in place has its base value
    try:
        inject(model, lora_of({layer: len(down) for layer, (down, _) in factors.items()}, whole, model), name)
        for path, _, adapter in adapters_of(model, name):
            down, up = factors[adapter.site.name(path)]
            adapter.lora_A.copy_(down)  # type: ignore[operator]
            adapter.lora_B.copy_(up)  # type: ignore[operator]
            adapter.requires_grad_(False)
        for key in trained:
            _add_changes(model.get_parameter(key), key, record, weights)
    finally:
        set_active(model, active)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return max(errors)


def _check(record: Record, weights: Mapping[str, float], name: str, r: int | None, ties: float | None) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(
            f"combine: expected adapter names with weights, such as {{'a': 0.7, 'b': 0.3}}, got {weights!r}."
        )
    check_known(record, weights)
    for term, weight in weights.items():
        known = isinstance(weight, int | float) and math.isfinite(weight)
        check_range("combine", f"the weight of {term!r}", weight, known, "a finite number")
    if name in record.injections:
        raise AdapterError(
            f"combine: there is an adapter {name!r} already. unload(model, {name!r}) first, or name another."
        )
    check_range("combine", "r", r, r is None or (isinstance(r, int) and r >= 1), "an integer >= 1")
    check_range("combine", "ties", ties, ties is None or 0 < ties <= 1, "a number in (0, 1]")
    if ties is not None and r is None:
        raise AdapterError("combine: TIES gives no low-rank product. Give r, the rank of the one that it becomes.")
    for term in weights:
        check_restorable(record.injections[term])


def _low_rank(adapter: Adapter, path: str, term: str) -> LowRank:
    if not isinstance(adapter, LowRank) or not adapter.adds_product:
        raise AdapterError(
            f"combine: {term!r} has a {type(adapter).__name__} on {path!r}, which is no low-rank product. Leave it "
            "out, or let it act beside the others with set_active. What is a change of weights can become LoRA: "
            f"save_adapter(model, folder, {term!r}, as_lora=16), load that under another name and combine it."
        )
    return adapter


def _check_apart(layers: Collection[str], whole: list[str]) -> None:
    """Raise an `AdapterError` if one adapter trains a weight whole that another sits on, or if there is no product."""
    for module in whole:
        for layer in layers:
            if not module or is_below(layer, module):
                raise AdapterError(
                    f"combine: {module!r} is trained in place by one of these, and {layer!r} has an adapter: that sum "
                    "is no low-rank product. Leave one of them out."
                )
    if not layers:
        raise AdapterError("combine: these train parameters in place and have no low-rank product, as LoRA has.")


def _factors(terms: Terms) -> tuple[Tensor, Tensor]:
    """Of the weighted sum, one product beside the other."""
    pairs = [(weight, *adapter.whole_factors()) for weight, adapter in terms]
    return torch.cat([down for _, down, _ in pairs]), torch.cat([weight * up for weight, _, up in pairs], dim=1)


def _ties(terms: Terms, density: float) -> tuple[Tensor, Tensor]:
    """The change (d_out, d_in, ...) by TIES, and the identity."""
    changes = torch.stack([dense(*adapter.whole_factors()) for _, adapter in terms])
    each = (-1, *[1] * (changes.dim() - 1))
    sizes = changes.abs().flatten(1)
    least = sizes.topk(max(1, int(density * sizes.shape[1]))).values[:, -1]
    kept = changes * (changes.abs() >= least.view(each))
    agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)
    weights = kept.new_tensor([weight for weight, _ in terms]).view(each)
    change = (weights * kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    return change, torch.eye(len(change), dtype=change.dtype, device=change.device)


def _add_changes(parameter: Tensor, key: str, record: Record, weights: Mapping[str, float]) -> None:
    exact = torch.promote_types(parameter.dtype, torch.float32)
    base = total = parameter.to(exact)
    for term, weight in weights.items():
        value = record.injections[term].in_place.get(key)
        total = total if value is None else total + weight * (value.to(exact) - base)
    parameter.copy_(total)
