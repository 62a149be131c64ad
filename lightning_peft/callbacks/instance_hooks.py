"""Hooks wrapped on one LightningModule or strategy, its class untouched.

The wrapper is a bound method named like the hook, so that Lightning's own inspection, ``copy.deepcopy`` and ``pickle``
treat it like any method.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn


def around(module: nn.Module, hook: str, then: Callable[[Any, dict[str, Any]], None]) -> None:
    """Let ``then(module, checkpoint)`` run with every call of a checkpoint hook, the module's own first on saving.

    Wrapping the same hook with the same function again changes nothing.
    """
    previous = module.__dict__.get(hook)
    if _runs(previous, then):
        return

    def wrapper(self: nn.Module, checkpoint: dict[str, Any]) -> None:
        own = getattr(type(self), hook).__get__(self) if previous is None else MethodType(previous.__func__, self)
        if hook == "on_save_checkpoint":
            own(checkpoint)
            then(self, checkpoint)
        else:
            then(self, checkpoint)
            own(checkpoint)

    _hang(wrapper, module, hook, then)


def instead(
    module: nn.Module | Strategy,
    hook: str,
    run: Callable[..., Any],
    once: Callable[[Any], bool] = lambda module: True,
    what: Any = None,
) -> None:
    """Let ``run(module, own, *args, **kwargs)`` answer in the place of ``module.<hook>``, which is ``own``.

    The wrapper takes itself off with the call at which ``once(module)`` holds. Wrapping the same hook with the same
    ``what`` (by default ``run``) again changes nothing.
    """
    what = what or run
    previous = module.__dict__.get(hook)
    if _runs(previous, what):
        return

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if once(self):
            if previous is None:
                del self.__dict__[hook]
            else:
                self.__dict__[hook] = previous
        own = getattr(type(self), hook).__get__(self) if previous is None else previous
        return run(self, own, *args, **kwargs)

    wrapper.previous = previous  # type: ignore[attr-defined]
    if isinstance(module, nn.Module) and is_overridden(hook, module):
        # Lightning asks it for its arguments, and looks below one wrapper alone
        wrapper.__wrapped__ = inspect.unwrap(getattr(module, hook))  # type: ignore[attr-defined]
    _hang(wrapper, module, hook, what)


def within(
    module: nn.Module | Strategy,
    hook: str,
    context: Callable[[Any], AbstractContextManager[Any]],
    once: Callable[[Any], bool] = lambda module: True,
) -> None:
    """Let ``module.<hook>`` run inside ``context(module)``; otherwise as `instead`."""

    def run(self: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with context(self):
            return own(*args, **kwargs)

    instead(module, hook, run, once, what=context)


def unwrap(module: nn.Module, hook: str, what: Callable[..., Any]) -> None:
    """Take off what `within` or `instead` put around ``module.<hook>`` with this, if it is the last put there."""
    wrapper: Any = module.__dict__.get(hook)
    if _runs(wrapper, what):
        del module.__dict__[hook]
        if wrapper.previous is not None:
            module.__dict__[hook] = wrapper.previous


def after(
    module: nn.Module, hook: str, then: Callable[[Any], None], once: Callable[[Any], bool] = lambda module: True
) -> None:
    """Let ``then(module)`` run after ``module.<hook>``, unless that raises; ``once`` as in `within`."""

    @contextmanager
    def context(self: nn.Module) -> Iterator[None]:
        yield
        then(self)

    within(module, hook, context, once)


def before(
    module: nn.Module | Strategy, hook: str, then: Callable[[Any], None], once: Callable[[Any], bool] = lambda _: True
) -> None:
    """Let ``then(module)`` run before ``module.<hook>``; ``once`` as in `within`."""

    @contextmanager
    def context(self: Any) -> Iterator[None]:
        then(self)
        yield

    within(module, hook, context, once)


def _hang(wrapper: Any, module: nn.Module | Strategy, hook: str, what: Any) -> None:
    wrapper.__name__, wrapper.runs = hook, (wrapper, what)
    module.__dict__[hook] = MethodType(wrapper, module)


def _runs(method: Any, what: Any) -> bool:
    """Whether ``method`` is a wrapper of ours for ``what``, and not one around it that took over its attributes."""
    wrapper, own = getattr(method, "runs", (None, None))
    return own is what and wrapper is method.__func__
