"""Shadows: modules of the same classes as those of a model, which share its parameters and buffers and never run.

Another library may put its layers into a shadow as if that were the model, and the model stays as it is.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_peft.engine import TargetError, slots
from lightning_peft.engine.slots import plain_name


def shadow_of(module: nn.Module, path: str, twins: dict[str, nn.Module], made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The shadow of ``module``; ``twins`` gets each part of it under its plain path.

    Of a module that is compiled or wrapped it is the shadow of what is inside, whose names are plain.
    """
    for name, child in module._modules.items():
        if child is not None and not plain_name(name):
            return shadow_of(child, path, twins, made)
    if module not in made:
        made[module] = twin = twins[path] = twin_of(module)
        twin._modules = {
            name: None if child is None else shadow_of(child, f"{path}.{name}".lstrip("."), twins, made)
            for name, child in twin._modules.items()
        }
    return made[module]


def twin_of(module: nn.Module) -> nn.Module:
    """A module of the same class with the same parameters, buffers and children, without hooks and adapters."""
    is_loop = hasattr(module, "training_step")  # which holds a Trainer, that nobody is to copy
    twin = nn.Module() if is_loop else object.__new__(slots.base_class(module))
    kept = ("_parameters", "_buffers", "training") if is_loop else module.__dict__.keys() - {*slots.STATE, "_peft"}
    twin.__dict__.update({key: module.__dict__[key] for key in kept})
    twin._modules = {name: child for name, child in module._modules.items() if not isinstance(child, slots.Adapters)}
    twin.__dict__.update({name: type(hooks)() for name, hooks in twin.__dict__.items() if name.endswith("_hooks")})
    return twin


Holders = list[tuple[nn.Module, str]]


def replaced(shadow: nn.Module, twins: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module, Holders]]:
    """(path, module of the shadow, what stands in its place, what had it as a child: no more)."""
    inside: list[str] = []
    for name, twin in twins.items():
        if any(name.startswith(outer) for outer in inside) or not name:
            continue
        layer = shadow.get_submodule(name)
        if layer is twin:
            continue
        inside.append(f"{name}.")
        holders = [(m, key) for m in layer.modules() for key, child in m._modules.items() if child is twin]
        below = {path.removeprefix(f"{name}."): part for path, part in twins.items() if path.startswith(f"{name}.")}
        if not holders or any(twin.get_submodule(path) is not part for path, part in below.items()):
            raise TargetError(f"{type(layer).__name__} rebuilds {name!r}, which cannot be done here. Exclude it.")
        for holder, key in holders:
            holder.__dict__[key] = holder._modules.pop(key)
        yield name, twin, layer, holders
