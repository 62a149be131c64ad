"""What was injected into a model, kept on the module that was given to `inject`."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.engine import slots
from lightning_peft.engine.errors import AdapterError, nearest
from lightning_peft.engine.method import Method

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclasses.dataclass
class Injection:
    """What one call of `inject` did to a model.

    Args:
        method: the method that was injected.
        in_place: base parameter trained in place -> its other value (the base's while the adapter is active, the
            trained one while it is not), or None if the method keeps no copy.
        active: whether it acts at present.
        state: what the method keeps beside its adapters (`Method.initial_state`).
        choice: what the method chose last for training (`Training.is_new`); never saved.
        watched: whether its terms were added to the loss of a batch (`total_loss`); never saved.
    """

    method: Method
    in_place: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    active: bool = True
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    choice: Any = None
    watched: bool = False


@dataclasses.dataclass
class Record:
    """All that the engine remembers of a model; kept on the module that was given to `inject`.

    Args:
        injections: adapter name -> what was done.
        trainable: base parameters that required gradients before the first injection.
        buffers: persistent buffers of the base as they were before.
        merged: what `merge` took out, as long as it can be undone.
        samples: base parameter -> the values that tell one base from another, where they have to be remembered: of
            what is sharded, or in codes of another library.
        routed: whether the samples of a batch have adapters of their own at present.
        giving_back: the hook by which ``load_state_dict`` reads `method_states`, if there are any.
    """

    injections: dict[str, Injection] = dataclasses.field(default_factory=dict)
    trainable: set[str] = dataclasses.field(default_factory=set)
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    merged: Any = None
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    routed: bool = False
    giving_back: RemovableHandle | None = None


def record_of(model: nn.Module, create: bool = False) -> Record:
    """The record of ``model`` itself.

    Raises:
        AdapterError: nothing was injected into this module; the submodule that was adapted instead is named.
    """
    if "_peft" not in model.__dict__:
        if not create:
            inner = next((n for n, m in model.named_modules() if "_peft" in m.__dict__), None)
            fix = f"Its submodule {inner!r} is the one that was adapted." if inner else "Call inject(model, method)."
            raise AdapterError(f"{slots.base_class(model).__name__} has no adapters. {fix}")
        model.__dict__["_peft"] = Record()
    return model.__dict__["_peft"]


def forget(model: nn.Module) -> None:
    """Take the record off ``model``."""
    record = model.__dict__.pop("_peft")
    if record.giving_back is not None:
        record.giving_back.remove()


def has_record(model: nn.Module) -> bool:
    """Whether something was injected into ``model`` itself."""
    return "_peft" in model.__dict__


def check_restorable(injection: Injection) -> None:
    """Raise an `AdapterError` if the base value of what was trained in place is not known any more."""
    if any(other is None for other in injection.in_place.values()):
        raise AdapterError(
            f"{type(injection.method).__name__} trained the base in place and kept no copy of it, so there is no base "
            "to go back to. Load the base checkpoint again."
        )


def check_known(record: Record, names: Iterable[str]) -> None:
    """Raise an `AdapterError` for the first name that no adapter has."""
    for name in names:
        if not isinstance(name, str) or name not in record.injections:
            there = ", ".join(record.injections)
            raise AdapterError(
                f"there is no adapter {name!r}.{nearest(str(name), record.injections)} There are: {there or 'none'}."
            )


def check_not_routed(record: Record) -> None:
    """Raise an `AdapterError` while each sample of a batch has an adapter of its own."""
    if record.routed:
        raise AdapterError(
            "routed: its block has not ended, and puts back what acted before when it does. Leave it before you change "
            "adapters; inside, routed(model, ['none']) answers as the base."
        )
