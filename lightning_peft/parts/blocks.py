"""The blocks of a model: the repeated parts that it is a stack of."""

from collections.abc import Sequence

from torch import nn

from lightning_peft.engine import TargetError
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.slots import base_class, holds_adapters
from lightning_peft.engine.targets import as_patterns, base_modules, matches


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | None = None, who: str = "blocks") -> list[str]:
    """Names of the blocks of ``model``, in the order in which they are stored.

    Found by themselves are the members of each ``ModuleList`` or ``Sequential`` whose members are all of one class and
    have layers of their own. Where such a member is but a stage, a list of like blocks in turn (as in ConvNeXt, Swin
    and ResNet), the inner ones count.

    Args:
        model: where to look.
        blocks: path of the list of blocks (``"model.layers"``, or the last parts of it); or several patterns, as in
            ``target_modules``, that select each a ``ModuleList`` of blocks, or single blocks.
        who: how errors name the caller.

    Raises:
        TargetError: there is no module of that path, or no list of blocks is found.

    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> find_blocks(nn.ModuleDict({"stem": nn.Linear(2, 2), "layers": nn.ModuleList([block(), block()])}))
    ['layers.0', 'layers.1']
    """
    modules = {name: module for name, module in base_modules(model) if name}
    names: list[str] = []
    for pattern in as_patterns(blocks):
        found = [name for name, module in modules.items() if matches(pattern, name, module)]
        if not found:
            raise TargetError(
                f"{who}: {base_class(model).__name__} has no module {pattern!r}.{nearest(pattern, modules)} Give the "
                "path of the list that holds the blocks."
            )
        lists = (nn.ModuleList, nn.Sequential) if isinstance(blocks, str) and len(found) == 1 else (nn.ModuleList,)
        for name in found:
            members = _children(modules[name]) if isinstance(modules[name], lists) else {"": None}
            names += [_below(name, key) for key in members]
    if blocks is None:
        names = _search(model, "")
    if not names:
        raise TargetError(
            f"{who}: no list of like blocks is found in {base_class(model).__name__}. Give its path "
            "(blocks='net.layers') or the paths of single blocks (blocks=['net.first', 'net.second'])."
        )
    return names


def stages_of(blocks: Sequence[str]) -> list[list[str]]:
    """Blocks by the lists that hold them: the stages of a model that has several.

    >>> stages_of(["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"])
    [['layers.0.blocks.0', 'layers.0.blocks.1'], ['layers.1.blocks.0']]
    """
    stages: dict[str, list[str]] = {}
    for name in blocks:
        stages.setdefault(name.rpartition(".")[0], []).append(name)
    return list(stages.values())


def stage_modules(model: nn.Module, stages: Sequence[Sequence[str]]) -> list[str]:
    """Of each of several stages the outermost module that holds its blocks, and none of the others.

    >>> net = nn.ModuleDict({key: nn.Sequential(nn.Sequential(nn.Linear(2, 2))) for key in "ab"})
    >>> stage_modules(net, [["a.0"], ["b.0"]])
    ['a', 'b']
    """
    found = []
    for stage in stages:
        others = [name for other in stages if other is not stage for name in other]
        path = stage[0].split(".")
        outer = (".".join(path[:depth]) for depth in range(1, len(path) + 1))
        called = (n for n in outer if not isinstance(model.get_submodule(n), nn.ModuleList | nn.ModuleDict))
        found.append(next(n for n in called if not any(name.startswith(n + ".") for name in others)))
    return found


def _search(module: nn.Module, path: str) -> list[str]:
    members = _children(module)
    if not _is_stack(module, at_least=2):
        return [name for key, child in members.items() for name in _search(child, _below(path, key))]
    stages = [(key, *stage) for key, child in members.items() if (stage := _stage(child)) is not None]
    if len(stages) < len(members):
        return [_below(path, key) for key in members]
    return [_below(path, key, inner, last) for key, inner, stack in stages for last in _children(stack)]


def _stage(block: nn.Module) -> tuple[str, nn.Module] | None:
    """(name, stack) of the stack that makes up most of ``block``, if there is one; the name is empty for itself."""
    if _is_stack(block):
        return "", block
    size = sum(p.numel() for p in block.parameters())
    for key, child in _children(block).items():
        if _is_stack(child) and 2 * sum(p.numel() for p in child.parameters()) > size:
            return key, child
    return None


def _is_stack(module: nn.Module, at_least: int = 1) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < at_least:
        return False
    members = list(module)
    alike = len({base_class(m) for m in members}) == 1
    return alike and all(_children(m) and next(m.parameters(), None) is not None for m in members)


def _below(*keys: str) -> str:
    return ".".join(filter(None, keys))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Direct children by name, without what was injected."""
    return {key: child for key, child in module.named_children() if not (key == "adapters" and holds_adapters(module))}
