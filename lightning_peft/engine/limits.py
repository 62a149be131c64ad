"""Types of hyper-parameters that say what is allowed; every method is checked against its own when it is made.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Recipe:
...     r: Count = 8
...     alpha: Positive | None = None
>>> check_fields(Recipe(r=0))
Traceback (most recent call last):
lightning_peft.engine.errors.AdapterError: Recipe: r must be an integer >= 1, got 0.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from lightning_peft.engine.errors import AdapterError


class Limit(NamedTuple):
    """What is expected of a value, in words, and whether it holds."""

    expected: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:  # stands in signatures, and so in ``--help``
        return repr(self.expected)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _all_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))


Count = Annotated[int, Limit("an integer >= 1", lambda v: isinstance(v, int) and v >= 1)]
WholeNumber = Annotated[int, Limit("an integer >= 0", lambda v: isinstance(v, int) and v >= 0)]
Positive = Annotated[float, Limit("a number > 0", lambda v: _number(v) and v > 0)]
NonNegative = Annotated[float, Limit("a number >= 0", lambda v: _number(v) and v >= 0)]
NonZero = Annotated[float, Limit("a number other than 0", lambda v: _number(v) and v != 0)]
OneOrMore = Annotated[float, Limit("a number >= 1", lambda v: _number(v) and v >= 1)]
Probability = Annotated[float, Limit("a number in [0, 1)", lambda v: _number(v) and 0 <= v < 1)]
Patterns = Annotated[str | tuple[str, ...], Limit("a pattern or several", lambda v: _all_strings(v))]
Share = Annotated[float, Limit("a number in (0, 1)", lambda v: _number(v) and 0 < v < 1)]


def check_fields(method: Any) -> None:
    """Raise an `AdapterError` for the first field of a dataclass whose value its type does not allow."""
    for field in dataclasses.fields(method):
        for name, value, limit in _limited(field.name, getattr(method, field.name), field.type):
            check_range(type(method).__name__, name, value, limit.holds(value), limit.expected)


def _limited(name: str, value: Any, annotation: Any) -> Iterator[tuple[str, Any, Limit]]:
    """Name, value and limit of all that is in ``value``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from ((name, value, limit) for limit in annotation.__metadata__ if isinstance(limit, Limit))
    elif origin is Literal:
        yield name, value, Limit(one_of(parts), lambda v: v in parts)
    elif origin is dict:
        for key, item in value.items():
            yield from _limited(f"{name}[{key!r}]", item, parts[1])
    elif type(None) in parts and value is not None:
        for part in parts:
            yield from _limited(name, value, part)


def one_of(choices: Iterable[Any]) -> str:
    """What is expected where these are all that is allowed."""
    return f"one of {', '.join(map(repr, choices))}"


def check_range(who: str, field: str, value: Any, ok: bool, expected: str) -> None:
    """Raise an `AdapterError` that names the field, its value and the allowed range, unless ``ok``."""
    if not ok:
        raise AdapterError(f"{who}: {field} must be {expected}, got {value!r}.")
