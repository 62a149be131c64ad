"""Errors that say what happened, what was expected, the nearest valid names, and what to do next."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AdapterError(ValueError):
    """Something about an adapter is wrong; nothing has been changed when it is raised."""


class TargetError(AdapterError):
    """A name or pattern selects nothing, or something that the method cannot adapt."""


class MergeError(AdapterError):
    """An adapter cannot be folded into the base weights."""


class AdapterFileError(AdapterError):
    """An adapter file is damaged, of another kind, unsafe, or belongs to another model."""


def joined(names: Sequence[str]) -> str:
    """The first three of ``names``.

    >>> joined(["a", "b", "c", "d"])
    "'a', 'b', 'c', ..."
    """
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def nearest(name: str, valid: Iterable[str], n: int = 3) -> str:
    """A sentence with the valid names nearest to ``name``, compared by their last parts; may be empty.

    >>> nearest("q_porj", ["layers.0.q_proj", "layers.1.q_proj", "layers.0.mlp"])
    " Did you mean 'q_proj'?"
    """
    parts = name.count(".") + 1
    tails = {tail.lower(): tail for full in valid if (tail := ".".join(full.split(".")[-parts:]))}
    close = get_close_matches(name.lower(), tails, n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(tails[tail]) for tail in close)}?" if close else ""
