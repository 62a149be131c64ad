"""The documentation is true: its code runs, its links lead somewhere, and no method is missing from its table."""

import dataclasses
import functools
import html
import importlib
import inspect
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft import PEFT
from lightning_peft.cli import main
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
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``docs/generate/method_pages.py``, which is no part of a package."""
    monkeypatch.syspath_prepend(TOP / "docs" / "generate")
    return importlib.import_module("method_pages")


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


def test_every_method_has_a_row_and_a_page(pages: ModuleType) -> None:
    table = pages.methods_table()
    for name, cls in METHODS.items():
        assert f"[{cls.__name__}](methods/{name}.md)" in table
        page = pages.method_page(cls)
        assert page.startswith(f"# {cls.__name__}\n")
        assert "**Formula**" in page
        assert "</math>" in page
        for argument in (field.name for field in dataclasses.fields(cls)):
            meaning = re.search(rf"^\| `{argument}` \| .* \| (.*) \|$", page, re.M)
            assert meaning, f"{cls.__name__}: {argument} is missing"
            assert meaning[1], f"{cls.__name__}: {argument} has no meaning in a docstring"


def test_a_page_claims_no_more_than_the_suite_asks(pages: ModuleType) -> None:
    held = {name: pages.invariants(METHODS[name]) for name in ("lora", "vpt", "lisa")}
    assert held["lora"]["Merged equals unmerged"] == "yes"
    assert held["vpt"]["Merged equals unmerged"] == "refused with an error"
    assert held["vpt"]["Unmerge undoes merge"] == "does not apply"
    assert held["lisa"]["Disabled answers as the base"] == "refused with an error"
    assert held["lora"]["Activation checkpoints change no gradient"] == "does not apply"
    assert held["vpt"]["Activation checkpoints change no gradient"] == "yes"
    assert {row["A low rank change is saved as plain lora"][:7] for row in held.values()} == {"yes, or"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*")  # of runs of three steps
def test_the_examples_of_a_method_run(
    name: str, pages: ModuleType, namespace: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = textwrap.dedent(pages.method_page(METHODS[name]))
    python, yaml_text = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "yaml"))
    exec(textwrap.dedent(python), namespace)
    method = next(c.method for c in namespace["trainer"].callbacks if isinstance(c, PEFT))
    (callback,) = yaml.safe_load(textwrap.dedent(yaml_text))["trainer"]["callbacks"]
    told = callback["init_args"]["method"]
    assert vars(lightning_peft)[told["class_path"]](**told.get("init_args", {})) == method
    if command := pages.example_command(METHODS[name]):
        assert command in text
        monkeypatch.chdir(tmp_path)
        main([*shlex.split(command)[1:], "--trainer.fast_dev_run=3", "--trainer.logger=false"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W x + b", "<math><mrow><mi>W</mi>_<mi>x</mi></mrow></math><math><mrow><mo>+</mo><mi>b</mi></mrow></math>"),
        ("d_in", "<math><mrow><msub><mi>d</mi><mrow><mi>in</mi></mrow></msub></mrow></math>"),
        ("V_r^T", "<math><mrow><msubsup><mi>V</mi><mrow><mi>r</mi></mrow><mi>T</mi></msubsup></mrow></math>"),
        ("sqrt(2 r)", "<math><mrow><msqrt><mn>2</mn>_<mi>r</mi></msqrt></mrow></math>"),
        ("the mean of B", "the mean of <math><mrow><mi>B</mi></mrow></math>"),
        ("init_std^2", "<math><mrow><msup><mtext>init_std</mtext><mn>2</mn></msup></mrow></math>"),
        ("a head, `x`", "a head\u2060, <code>x</code>"),
    ],
)
def test_a_formula_becomes_mathematics(text: str, expected: str, pages: ModuleType) -> None:
    bare = re.sub(r"<(m\w+) (?:form|stretchy|mathvariant|class)=[^>]*>", r"<\1>", pages.typeset(text))
    plain = re.sub(r"<mspace[^>]*>", "_", bare)
    assert html.unescape(plain) == expected


@pytest.mark.parametrize("name", METHODS)
def test_no_letter_of_a_formula_is_lost(name: str, pages: ModuleType) -> None:
    labels = pages._labels(inspect.getdoc(sys.modules[METHODS[name].__module__]) or "")
    for label in pages.MATHEMATICS:
        if label in labels:
            shown = ElementTree.fromstring(f"<p>{pages.typeset(labels[label])}</p>")
            greek = str.maketrans({sign: word for word, sign in importlib.import_module("formula").GREEK.items()})
            letters = re.sub(r"[^A-Za-z0-9]", "", "".join(shown.itertext()).translate(greek))
            expected = re.sub(r"\bsqrt\b|\bkron\b|\bsum(?=_)|[^A-Za-z0-9]", "", labels[label])
            assert letters == expected


def test_the_table_in_the_readme_is_true(pages: ModuleType) -> None:
    text = (TOP / "README.md").read_text()
    current = pages.update(text).splitlines()
    stale = [line for line in text.splitlines() if line not in current]
    assert stale == [], "python docs/generate/method_pages.py makes the table anew"


def test_the_readme_keeps_two_marks_around_its_table(pages: ModuleType) -> None:
    assert pages.update(f"a\n{pages.TABLE}\nold\n{pages.TABLE}\nb\n").splitlines()[:2] == ["a", pages.TABLE]
    assert "outdated" not in pages.update(f"a\n{pages.TABLE}\noutdated\n{pages.TABLE}\nb\n")
    assert (TOP / "README.md").read_text().count(pages.TABLE) == 2
