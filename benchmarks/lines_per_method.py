"""Lines of code that a method costs: each method file here, and each folder of HF PEFT's tuners, counted the same way.

Blank lines, comments and docstrings do not count. What methods share (``adapters`` and ``parts`` here, ``tuners_utils``
and the like there) belongs to no single one; it is counted by itself.

``python -m benchmarks.lines_per_method`` prints every method.
"""

import ast
import importlib.util
import io
import statistics
import tokenize
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lightning_peft
from benchmarks.row import Row
from lightning_peft import list_methods

PACKAGE = Path(lightning_peft.__file__).parent
GOAL = 45

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    r"""Lines that are neither blank nor all comment nor part of a docstring.

    >>> code_lines("'What.'\n\nx = (1,  # one\n     2)\n\ndef f():\n    '''Why.\n\n    '''\n    # how\n    return 2\n")
    4
    """
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        documentable = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documentable and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - documented)


def total(files: Iterable[Path]) -> int:
    """Lines of all these files."""
    return sum(code_lines(file.read_text()) for file in files)


def ours() -> dict[str, dict[str, int]]:
    """Family -> method -> lines of its file."""
    families: dict[str, dict[str, int]] = {}
    for row in list_methods():
        file = PACKAGE / "methods" / row.family / f"{row.name}.py"
        families.setdefault(row.family, {})[row.name] = total([file])
    return families


def tuners() -> Path:
    """The folder of HF PEFT's tuners."""
    return Path(importlib.util.find_spec("peft").origin).parent / "tuners"


def theirs() -> dict[str, int]:
    """Tuner of HF PEFT -> lines of its folder."""
    folders = [init.parent for init in sorted(tuners().glob("*/__init__.py"))]
    return {folder.name: total(folder.rglob("*.py")) for folder in folders}


def run() -> list[Row]:
    """The medians."""
    here = [lines for family in ours().values() for lines in family.values()]
    there = list(theirs().values())
    what = f"lines of code per method, median of {len(here)}; beside it HF PEFT's {len(there)} tuners"
    return [Row(what, statistics.median(here), statistics.median(there), "lines", f"at most {GOAL} lines")]


def main() -> None:
    """Every method, family by family, and the tuner of the same name where there is one."""
    families, there = ours(), theirs()
    here = {name: lines for family in families.values() for name, lines in family.items()}
    table = Table(title="Lines of code per method", title_justify="left")
    for column in ("Family", "Method", "Lines", "HF PEFT's tuner of that name"):
        table.add_column(column, justify="left" if column in ("Family", "Method") else "right")
    for family, methods in families.items():
        for name, lines in methods.items():
            table.add_row(family, name, str(lines), f"{there[name]:,}" if name in there else "")
        table.add_row(family, f"median of {len(methods)}", f"{statistics.median(methods.values()):g}", style="bold")
        table.add_section()
    medians = f"{statistics.median(here.values()):g}", f"{statistics.median(there.values()):,g}"
    table.add_row("all", f"median of {len(here)} methods, {len(there)} tuners", *medians, style="bold")
    shared = [path for room in ("adapters", "parts") for path in (PACKAGE / room).glob("*.py")]
    table.add_row("", "shared: adapters, parts; tuners/*.py", f"{total(shared):,}", f"{total(tuners().glob('*.py')):,}")
    console = Console(width=110)
    console.print(table)
    longest = [f"{name} {lines}" for name, lines in sorted(here.items(), key=lambda item: -item[1]) if lines > GOAL]
    console.print(f"Over the goal of {GOAL}: {', '.join(longest) or 'none'}")


if __name__ == "__main__":
    main()
