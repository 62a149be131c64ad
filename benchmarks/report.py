"""Pages of the documentation whose tables are measured, and what they are measured on."""

import os
import platform
import re
from pathlib import Path

import torch


def hardware() -> str:
    """Processor, cores, torch: what a timing must be read with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def replace_between(mark: str, made: str, page: Path) -> None:
    """Put ``made`` between ``<!-- mark -->`` and ``<!-- end of mark -->`` of ``page``.

    Raises:
        ValueError: the page is there, and has no such marks.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    text = page.read_text() if page.exists() else f"{begin}\n{end}\n"
    if not re.search(f"{begin}.*?{end}", text, flags=re.S):
        raise ValueError(f"{page} has no place for this table. Put {begin} and {end} where it belongs.")
    page.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{made}\n{end}", text, flags=re.S))
    print(page)
