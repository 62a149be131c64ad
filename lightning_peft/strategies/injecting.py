"""What ``method=`` of a strategy does: the method is injected ahead of every callback, and the rest is `PEFT`'s."""

from typing import Any

from lightning.pytorch.strategies import Strategy

from lightning_peft.callbacks import PEFT
from lightning_peft.engine import AdapterError, Method


class InjectingStrategy(Strategy):
    """A strategy that takes a method by itself: in front of another strategy in the list of parent classes.

    Before the ``setup`` of any callback, a ``PEFT(method)`` callback is put in front of all callbacks of the Trainer.
    So callbacks that copy the model, such as averaging, may stand anywhere in the list: they find it adapted.

    Args:
        method: as `PEFT` takes it; None leaves it to a `PEFT` callback in the Trainer's list.
        kwargs: for the other strategy.

    Raises:
        AdapterError: ``method`` is not one, or, when a run starts, the Trainer has a PEFT callback as well.
    """

    def __init__(self, *args: Any, method: Method | list[Method] | str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self._peft = None if method is None else PEFT(method)

    def setup_environment(self) -> None:
        """The first event at which all callbacks are known, and the last before any of them acts."""
        if self._peft is not None and self.lightning_module is not None:
            self._put_in_front(self._peft, self.lightning_module.trainer.callbacks)  # type: ignore[attr-defined]
        super().setup_environment()

    def _put_in_front(self, peft: PEFT, callbacks: list[Any]) -> None:
        if any(isinstance(c, PEFT) and c is not peft for c in callbacks):
            raise AdapterError(
                f"{type(self).__name__}: it was given method={self.method!r}, and the Trainer has a PEFT callback too. "
                "Keep one: leave method out of the strategy, or PEFT out of the callbacks."
            )
        callbacks[:] = [peft, *(c for c in callbacks if c is not peft)]
