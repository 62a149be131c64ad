"""What a notebook prints and draws while it is tested is kept for its page on the site: it need not run twice."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs" / "generate"))
PASSED = pytest.StashKey[bool]()


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    """Remember which cells ran to their end."""
    if call.when == "call":
        item.stash[PASSED] = call.excinfo is None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the notebooks of which all cells did."""
    from notebooks import keep

    cells: dict[Any, list[Any]] = {}
    for item in getattr(session, "items", []):
        if hasattr(item, "test_outputs"):
            cells.setdefault(item.parent, []).append(item)
    for notebook, items in cells.items():
        if all(item.stash.get(PASSED, False) for item in items):
            for item in items:
                item.cell.outputs = item.test_outputs
            keep(notebook.nb, notebook.path)
