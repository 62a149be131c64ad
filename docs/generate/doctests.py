"""Examples in docstrings stand bare, as ``help()`` shows them; on a page they are blocks of code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?!\s*\n).*)*", re.M)


class Doctests(griffe.Extension):
    """Put a fence around each run of ``>>>`` lines."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by mkdocstrings for each object that it reads."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match[str]) -> str:
    indent = match[1]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"
