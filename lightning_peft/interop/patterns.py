"""Patterns that stand in files: a regular expression can be written so that no one lives to see it fail to match."""

import contextlib
import re
from collections.abc import Iterator
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from lightning_peft.engine import AdapterFileError

_LENGTH = 64  # of the names that are matched, about
_WAYS = 10**8  # as many as four stars have


def check_pattern(pattern: str, source: str) -> None:
    """Raise an `AdapterFileError` if ``pattern`` of the file ``source`` may take very long; what is none is not asked.

    >>> check_pattern(r"blocks.[0-3].*(q|v)_proj", "file")
    >>> check_pattern(r"(a+)+b", "file")
    Traceback (most recent call last):
    lightning_peft.engine.errors.AdapterFileError: file: the pattern '(a+)+b' could take very long to match. ...
    """
    with contextlib.suppress(re.error, RecursionError, OverflowError):
        if _ways(_parser.parse(pattern)) > _WAYS:
            raise AdapterFileError(
                f"{source}: the pattern {pattern[:80]!r} could take very long to match. Write it with fewer "
                "repetitions, and none within another."
            )


def strings(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from strings(item)


def _ways(nodes: Any) -> float:
    """At most so many ways there are to match a name, all of which are tried before a match fails."""
    total = 1.0
    for op, argument in nodes:
        total = min(total * _ways_of(op, argument), float("inf"))
    return total


def _ways_of(op: Any, argument: Any) -> float:
    if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
        least, most, repeated = argument
        most, one = min(most, _LENGTH), _ways(repeated)
        shortest, longest = repeated.getwidth()
        steady = one == 1 and shortest == longest  # then the number of repetitions is all there is to choose
        return max(most - least, 0) + 1 if steady else (one + 1) ** most
    if op is _constants.BRANCH:
        ways = [_ways(branch) for branch in argument[1]]
        first = [branch[0] if len(branch) else None for branch in argument[1]]
        literals = {node[1] for node in first if node and node[0] is _constants.LITERAL}
        return max(ways) if len(literals) == len(first) else sum(ways)
    if op is _constants.SUBPATTERN:
        return _ways(argument[3])
    if op is _constants.ATOMIC_GROUP:
        return _ways(argument)
    if op in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _ways(argument[1])
    if op is _constants.GROUPREF_EXISTS:
        return sum(_ways(branch or ()) for branch in argument[1:])
    return 1
