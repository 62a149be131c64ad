"""The folders ``callbacks`` and ``kernels`` at the top lead into the package, and shadow no package of that name."""

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["callbacks", "kernels"])
def test_the_link_leads_into_the_package(name: str) -> None:
    assert (TOP / name / "source" / "__init__.py").samefile(TOP / "lightning_peft" / name / "__init__.py")


@pytest.mark.parametrize("name", ["callbacks", "kernels"])
def test_an_installed_package_of_that_name_is_still_found_at_the_top(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("HERE = 'installed'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import {name}; print({name}.HERE)"
    run = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert run.stdout.strip() == "installed", run.stderr
