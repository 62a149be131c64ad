"""Optimizer state by the names of parameters, so that a run resumes although its parameter groups changed.

PyTorch stores the state by position. When a run goes on with other groups (all parameters before, the trainable ones
now; one group before, one with and one without weight decay now), it refuses, or gives a parameter the state of
another. Here a checkpoint also holds the names, and where they differ, the state is put in the order of today.

Hyper-parameters come from the checkpoint, so that a learning rate goes on where its schedule was. A value that tells
joined or split groups apart stays as it is configured now: it is why they were joined or split.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.engine import AdapterFileError
from lightning_peft.engine.slots import plain_name

_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")  # in the state of schedulers


def names_in(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters in each group; empty for one that is not the module's."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def restore_by_name(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    stored: Sequence[list[list[str]]],
    schedulers: Sequence[tuple[Any, dict[str, Any]]] = (),
) -> None:
    """Let the next state that each of ``optimizers`` loads be put in the order that its parameters have now.

    Where nothing changed, nothing is touched.

    Args:
        module: the module whose parameters are optimized.
        optimizers: the optimizers as they are now.
        stored: what `names_in` was for each of them when the state was saved.
        schedulers: (scheduler, stored state) pairs; the stored state is changed in place.

    Raises:
        AdapterFileError: the number of optimizers differs.
    """
    if len(optimizers) != len(stored):
        raise AdapterFileError(
            f"PEFT: the checkpoint has the state of {len(stored)} optimizers, but configure_optimizers makes "
            f"{len(optimizers)}. Make as many, or start afresh: PEFT(init_from=folder)."
        )
    for optimizer, before in zip(optimizers, stored, strict=True):
        now = names_in(module, optimizer)
        if now == before:
            continue
        origins = _origins(before, now)
        for scheduler, state in schedulers:
            if scheduler.optimizer is optimizer:
                _refit_scheduler(scheduler, state, origins)
        _refit_on_load(optimizer, before, now, origins)
        new = set(chain(*now)) - set(chain(*before))
        fresh = [name for name, p in module.named_parameters() if p.requires_grad and plain_name(name) in new]
        if fresh:
            rank_zero_warn(
                f"PEFT: the checkpoint has no optimizer state for {len(fresh)} parameters, which start afresh: "
                f"{', '.join(fresh[:5])}{', ...' if len(fresh) > 5 else ''}."
            )


def _origins(before: list[list[str]], now: list[list[str]]) -> list[set[int]]:
    """For each group, which stored groups its parameters were in."""
    group_of = {name: i for i, names in enumerate(before) for name in names if name}
    return [{group_of[name] for name in names if name in group_of} for names in now]


def _inherited(
    key: str, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], origins: list[set[int]]
) -> list[Any]:
    """The value of ``key`` in each group: the stored one, unless it tells groups apart that were joined or split."""
    values = []
    for group, origin in zip(now, origins, strict=True):
        relatives = [other for other, others in zip(now, origins, strict=True) if origin & others]
        stored = [before[i][key] for i in sorted(origin) if key in before[i]]
        same = all(_equal(value, stored[0]) for value in stored)
        alike = all(_equal(other.get(key), group.get(key)) for other in relatives)
        values.append(stored[0] if stored and same and alike else group.get(key))
    return values


def _equal(a: Any, b: Any) -> bool:
    return bool((a == b).all()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def _refit_on_load(
    optimizer: Optimizer, before: list[list[str]], now: list[list[str]], origins: list[set[int]]
) -> None:
    def hook(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        handle.remove()
        stored = state_dict["param_groups"]
        ids = chain.from_iterable(group["params"] for group in stored)
        id_of = dict(zip(chain.from_iterable(before), ids, strict=True))
        groups: list[dict[str, Any]] = [{} for _ in now]
        for key in dict.fromkeys(key for group in (*stored, *optimizer.param_groups) for key in group):
            if key not in ("params", "param_names"):
                values = _inherited(key, stored, optimizer.param_groups, origins)
                for group, live, value in zip(groups, optimizer.param_groups, values, strict=True):
                    if value is not None or key in live:
                        group[key] = value
        state: dict[Any, Any] = {}
        position = 0
        for group, names in zip(groups, now, strict=True):
            group["params"] = list(range(position, position + len(names)))
            for i, name in zip(group["params"], names, strict=True):
                if name and id_of.get(name) in state_dict["state"]:
                    state[i] = state_dict["state"][id_of[name]]
            position += len(names)
        return {**state_dict, "state": state, "param_groups": groups}

    handle = optimizer.register_load_state_dict_pre_hook(hook)


def _refit_scheduler(scheduler: Any, state: dict[str, Any], origins: list[set[int]]) -> None:
    for key in _PER_GROUP:
        if isinstance(state.get(key), list):
            stored = [{key: value} for value in state[key]]
            state[key] = _inherited(key, stored, [{key: value} for value in getattr(scheduler, key)], origins)
    for inner, its_state in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        _refit_scheduler(inner, its_state, origins)
