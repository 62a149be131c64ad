"""Pages of the documentation whose tables are measured."""

import re
from pathlib import Path


def replace_between(mark: str, made: str, page: Path) -> None:
    """Put ``made`` between ``<!-- mark -->`` and ``<!-- end of mark -->`` of ``page``."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    text = page.read_text() if page.exists() else f"{begin}\n{end}\n"
    page.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{made}\n{end}", text, flags=re.S))
    print(page)
