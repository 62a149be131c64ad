"""Finds the modules whose forward reads a weight below them without calling its owner.

``F.linear(x, self.qkv.weight)`` inside an attention never calls ``self.qkv``, so an adapter that waits to be called
there would be silently without effect. The byte code of a forward, and of the methods it uses, shows each such read.
"""

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from lightning_peft.engine.slots import base_class, plain_name

# asking a weight for these does not use its values
_HARMLESS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda", "type"})


def readers(model: nn.Module, owner: str, parameter: str) -> list[nn.Module]:
    """The ancestors of module ``owner`` in ``model`` whose forward reads its ``parameter``; none if that is empty."""
    if not parameter:
        return []
    path = owner.split(".")
    below = [plain_name(".".join(path[depth:])).split(".") for depth in range(len(path))]
    ancestors = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return [module for module, names in zip(ancestors, below, strict=True) if _reads(module, names, parameter)]


def fused_above(model: nn.Module, owner: str) -> list[nn.Module]:
    """The ancestors of module ``owner`` that hand the weights of their layers to a fused operation in evaluation."""
    path = owner.split(".")
    ancestors = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))] if owner else []
    return [module for module in ancestors if not reads_in_training(module)]


def reads_in_training(reader: nn.Module) -> bool:
    """False for those that read in evaluation only, for a fused kernel, and call the layers in training."""
    return not isinstance(reader, nn.TransformerEncoder | nn.TransformerEncoderLayer)


def _reads(module: nn.Module, below: list[str], parameter: str) -> bool:
    # a read through a local variable or an index does not tell whose weight it is: take it for a child's
    found = set(_weights_read(base_class(module)))  # type: ignore[arg-type]  # mypy takes a class for unhashable here
    patched = module.__dict__.get("_own_forward", module.__dict__.get("forward"))
    function: Any = None if patched is None else inspect.unwrap(getattr(patched, "__func__", patched))
    if hasattr(function, "__code__"):
        found |= {read for code in _nested(function.__code__) for read in _reads_in(code)}
    return (below[-1], parameter) in found or (len(below) <= 2 and (None, parameter) in found)


@functools.cache
def _weights_read(cls: type[nn.Module]) -> frozenset[tuple[str | None, str]]:
    """(attribute that holds the owner, or None, parameter name) of each read below ``cls.forward``."""
    found, seen, todo = set(), set(), ["forward"]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _functions(cls, name):
            codes = list(_nested(function.__code__))
            for code in codes:
                found |= set(_reads_in(code))
                todo += [n for n in code.co_names if hasattr(cls, n) and not hasattr(nn.Module, n)]
            if not any(name in code.co_names for code in codes):
                break  # it does not hand over to the one of its parent
    return frozenset(found)


def _functions(cls: type[nn.Module], name: str) -> Iterator[Any]:
    """What runs when this method or property is used: that of ``cls``, then those of its parents."""
    for parent in cls.__mro__:
        member: Any = vars(parent).get(name)
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, classmethod | staticmethod):
            member = member.__func__
        function = inspect.unwrap(member) if callable(member) else None
        if hasattr(function, "__code__"):
            yield function


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _reads_in(code: CodeType) -> Iterator[tuple[str | None, str]]:
    steps = [("", None), ("", None), *((step.opname, step.argval) for step in dis.get_instructions(code)), ("", None)]
    for asked, _, (before, owner), (now, parameter), (after, use) in zip(*(steps[i:] for i in range(5)), strict=False):
        if now != "LOAD_ATTR" or (after in ("LOAD_ATTR", "LOAD_METHOD") and use in _HARMLESS):
            continue
        if asked == ("LOAD_GLOBAL", "isinstance"):  # of self.owner.weight, as T5 does
            continue
        if before == "LOAD_ATTR":
            yield owner, parameter
        elif not (before.startswith("LOAD_FAST") and owner == "self"):
            yield None, parameter
