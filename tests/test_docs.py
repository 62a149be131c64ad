"""The documentation is true: its code runs, its links lead somewhere, and no method is missing from its table."""

import dataclasses
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.engine import METHODS

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
PROSE = [*PAGES, TOP / "CONTRIBUTING.md", TOP / "tutorials" / "README.md"]
BLOCK = re.compile(r"^(<!-- not executed -->\n)?```python\n(.*?)^```$", re.M | re.S)
# what a page says is printed: a comment behind or below a print, and tables
PRINTED = re.compile(r"^print\([^\n]*\)(?:  # ([^\n]*)|\n((?:# [^\n]*\n)+))|^```text\n(PEFT '.*?)^```$", re.M | re.S)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Net(L.LightningModule):
    """What the pages call ``Net``: two linear layers with the same start at each call."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a page's code finds: ``Net``, ``module``, ``data``; short runs, an empty folder, a registry of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tutorials").symlink_to(TOP / "tutorials")
    short = {"limit_train_batches": 2, "limit_test_batches": 1, "limit_val_batches": 0}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    monkeypatch.setattr(L, "Trainer", functools.partial(L.Trainer, **short, **quiet, enable_checkpointing=False))
    before = dict(METHODS)
    # the code of a page is a module, as dataclasses and pickle expect
    page = ModuleType("pages.example")
    # they stay: whoever looks through all subclasses later must find the modules of those that pages define
    sys.modules.update({"pages": ModuleType("pages"), page.__name__: page})
    vars(page).update(Net=Net, module=Net(), data=DataLoader(TensorDataset(torch.randn(16, 8)), batch_size=4))
    yield vars(page)
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``docs/hooks.py``, which MkDocs loads by its path too."""
    spec = importlib.util.spec_from_file_location("docs_hooks", TOP / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@by_page
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # lightning 2.6 calls what torch 2.15 has deprecated
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # HF PEFT asks transformers for it
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: Path, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text()
    for block in BLOCK.finditer(text):
        skipped, code = block.groups()
        if "import peft" in code:
            pytest.importorskip("peft")
        if not skipped:
            # blank lines in front: an error shows the line of the page
            exec(compile("\n" * text.count("\n", 0, block.start(2)) + code, str(page), "exec"), namespace)
    printed = " ".join(capsys.readouterr().out.split())
    for behind, below, table in PRINTED.findall(text):
        said = " ".join((behind or table or re.sub("^# ", "", below, flags=re.M)).split())
        assert said in printed


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_somewhere(page: Path) -> None:
    generated = {TOP / "docs" / "methods" / f"{name}.md" for name in METHODS}
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    inside = {Path(os.path.normpath(page.parent / t)) for t in targets if t and "://" not in t}
    assert [path for path in inside - generated if not path.exists()] == []


def test_figures_of_a_decision_stand_on_the_pages_that_its_row_cites() -> None:
    text = (TOP / "docs" / "choose-a-method.md").read_text()
    rows = [line for line in text.partition("## Which layers")[0].splitlines() if re.match(r"\| (?!If you|---)", line)]
    assert len(rows) > 40
    for row in rows:
        pages = [TOP / "docs" / page for page in re.findall(r"\]\(([\w-]+\.md)", row)]
        pages += [TOP / "benchmarks" / "README.md"] * ("`benchmarks/README.md`" in row)
        cited = "".join(page.read_text() for page in pages)
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", row)
        figures = re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w-])", prose)
        assert [figure for figure in figures if figure.rstrip(",") not in cited] == [], row


def test_every_promise_is_held_by_a_test() -> None:
    rows = [line for line in (TOP / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not re.match(r"\| (Promise|---) ", row)]
    assert len(promises) >= 27
    for row in promises:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (TOP / "tests" / file).read_text(), re.M), f"{file}::{test}"


def test_every_method_has_a_row_and_a_page(hooks: ModuleType) -> None:
    table = hooks.on_page_markdown(f"before\n\n{hooks.TABLE}\n\nafter")
    for name, cls in METHODS.items():
        assert f"[{cls.__name__}](methods/{name}.md)" in table
        page = hooks.method_page(cls)
        assert page.startswith(f"# {cls.__name__}\n")
        assert "**Formula**" in page
        for argument in (field.name for field in dataclasses.fields(cls)):
            meaning = re.search(rf"^\| `{argument}` \| .* \| (.*) \|$", page, re.M)
            assert meaning, f"{cls.__name__}: {argument} is missing"
            assert meaning[1], f"{cls.__name__}: {argument} has no meaning in a docstring"


def test_the_table_in_the_readme_is_true(hooks: ModuleType) -> None:
    text = (TOP / "README.md").read_text()
    current = hooks.update(text).splitlines()
    stale = [line for line in text.splitlines() if line not in current]
    assert stale == [], "python docs/hooks.py makes the table anew"


def test_the_readme_keeps_two_marks_around_its_table(hooks: ModuleType) -> None:
    assert hooks.update(f"a\n{hooks.TABLE}\nold\n{hooks.TABLE}\nb\n").splitlines()[:2] == ["a", hooks.TABLE]
    assert "outdated" not in hooks.update(f"a\n{hooks.TABLE}\noutdated\n{hooks.TABLE}\nb\n")
    assert (TOP / "README.md").read_text().count(hooks.TABLE) == 2
