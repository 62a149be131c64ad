"""Learning rates that differ between the parameters of an adapter, inside the user's own ``configure_optimizers``.

Each parameter group that the user makes is split by ratio while it is made, so that schedulers, which come after, see
all groups and treat them alike. The ratio itself is applied around ``optimizer.step`` only: a scheduler reads and
writes the rate that the user asked for, and so does a checkpoint.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.engine import adapters_of
from lightning_peft.engine.record import record_of

_RATIO, _ASKED = "peft_lr_ratio", "peft_lr_asked"


def ratios(root: nn.Module) -> dict[int, float]:
    """id of each adapter parameter -> ratio of its learning rate to that of its group, where that is not 1."""
    found = {
        id(parameter): injection.method.learning_rate_ratio(adapter, key)
        for name, injection in record_of(root).injections.items()
        for _, _, adapter in adapters_of(root, name)
        for key, parameter in adapter.named_parameters()
    }
    return {parameter: ratio for parameter, ratio in found.items() if ratio != 1}


@contextmanager
def groups_split(by_ratio: Mapping[int, float]) -> Iterator[None]:
    """While it lasts, every optimizer that is made splits its groups by ratio."""
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        parts: dict[float, list[Any]] = {}
        for item in [given] if isinstance(given, Tensor) else list(given):
            parameter = item[1] if isinstance(item, tuple) else item  # named parameters come in pairs
            parts.setdefault(by_ratio.get(id(parameter), 1.0), []).append(item)
        for ratio in sorted(parts):
            original(self, {**param_group, "params": parts[ratio], _RATIO: ratio})

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


def scale_in_step(optimizer: Optimizer) -> None:
    """Let the rates of ``optimizer`` have their ratio while it steps, and only then; twice is the same as once."""
    if any(group.get(_RATIO, 1) != 1 for group in optimizer.param_groups) and not hasattr(optimizer, "_peft_scaled"):
        optimizer._peft_scaled = True  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(lambda o, args, kwargs: _scale(o))
        optimizer.register_step_post_hook(lambda o, args, kwargs: unscale(o))


def _scale(optimizer: Optimizer) -> None:
    unscale(optimizer)
    for group in optimizer.param_groups:
        group[_ASKED] = group["lr"]
        group["lr"] = group["lr"] * group.get(_RATIO, 1)


def unscale(optimizer: Optimizer) -> None:
    """Give back the rates that were asked for, if a step did not end (an error, non-finite gradients)."""
    for group in optimizer.param_groups:
        if _ASKED in group:
            group["lr"] = group.pop(_ASKED)
