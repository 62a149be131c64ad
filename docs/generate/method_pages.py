"""Makes the pages about methods out of the registry: no method is listed by hand.

``python docs/generate/method_pages.py`` brings the table in the README up to date.
"""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from formula import typeset

from lightning_peft import list_methods
from lightning_peft.engine import Method

TABLE = "<!-- methods -->"
TOP = Path(__file__).parents[2]
README = TOP / "README.md"
SUITE = TOP / "tests" / "methods" / "test_invariants.py"
# the labels in the docstring of a method's file that hold formulas
MATHEMATICS = ("Formula", "Shapes", "Init", "Merge", "Schedule", "Loss")
# task -> a ready configuration for it
CONFIGS = {"vision": "digits.yaml", "text": "source_code.yaml", "diffusion": "denoise_digits.yaml"}


def methods_table() -> str:
    """All methods, one row each, with links to their pages; a script of the page filters it."""
    head = ["Class", "What it does", "Family", "For", "Trains", "Starts as the base", "Merges", "Calibrated"]
    head += ["Extra cost per step", "Paper"]
    rows = [
        [
            f"[{row.cls.__name__}](methods/{row.name}.md)",
            _purpose(row.cls),
            row.family,
            ", ".join(row.cls.modalities),
            trained(row.cls),
            "yes" if row.cls.identity_at_init else "no",
            "yes" if row.mergeable else "no",
            "yes" if row.cls.calibrated else "no",
            cost(row.cls),
            _paper(row.paper),
        ]
        for row in list_methods()
    ]
    return f'<div class="filterable" markdown="1">\n\n{_table(head, rows)}\n\n</div>'


def readme_table() -> str:
    """The same for the README, shorter."""
    rows = [
        [f"`{row.name}`", f"`{row.cls.__name__}`", _paper(row.paper), _purpose(row.cls), trained(row.cls)]
        for row in list_methods()
    ]
    return _table(["Name", "Class", "Paper", "What it does", "Trains"], rows)


def trained(cls: type[Method]) -> str:
    """What trains by default: base parameters as the method describes them, or numbers per layer by its formula."""
    if "trained_in_place" in vars(cls):
        beside = f"{_summary(_count(cls))}; in place " if cls.acts_on != "layers" else ""
        return beside + _summary(cls.trained_in_place)
    head = " and the head" if getattr(cls, "modules_to_save", ()) == "output-head" else ""
    where = " per layer" if cls.acts_on == "layers" else ""
    return f"{_summary(_count(cls))}{where}{head}"


def _count(cls: type[Method]) -> Any:
    """The function that says by a formula how many numbers train."""
    own = vars(cls)
    return own.get("num_prompt") or own.get("num_trainable") or own.get("total_trainable") or cls.num_trainable


def cost(cls: type[Method]) -> str:
    """What a step takes beyond a forward and a backward of LoRA, as the file of the method says."""
    return _plain(_labels(inspect.getdoc(sys.modules[cls.__module__]) or "").get("Cost", "none"))


def method_page(cls: type[Method]) -> str:
    """What the file of a method says about itself, and the facts it declares."""
    whole = inspect.getdoc(cls) or ""
    text, doctest = re.match(r"(.*?)(^>>> .*)?\Z", whole, re.S | re.M).groups()  # type: ignore[union-attr]
    labels = _labels(inspect.getdoc(sys.modules[cls.__module__]) or "")
    arguments = [
        [f"`{field.name}`", f"`{_default(field)}`", _argument(cls, field.name)]
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    facts = {
        "Name": f"`{cls.name}`, in the family *{cls.family}*",
        "Acts on": _places(cls),
        "Trains": trained(cls),
        "Starts as the base": "yes" if cls.identity_at_init else "no",
        "Merges": "yes" if cls.mergeable else "no",
        "Calibrated": "yes: its start is measured on training data" if cls.calibrated else "no",
        "Extra cost per step": cost(cls),
        "Gives the base back": "yes, bit for bit" if cls.keeps_base else "no: no copy of the base is kept",
        "Meant for": ", ".join(cls.modalities),
    }
    paragraphs = re.split(r"^(?:Args|Raises):", text, flags=re.M)[0].strip().split("\n\n")
    parts = [f"# {cls.__name__}", _purpose(cls), *map(_plain, paragraphs[1:])]
    for label, value in labels.items():
        if label in MATHEMATICS:
            parts.append(f'**{label}**\n\n<p class="formula">{_with_links(typeset(value))}</p>')
        elif label not in ("Cost", "Example"):
            linked = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", _plain(value))
            parts.append(f"**{label}**\n\n{linked}")
    parts.append("## Use\n\n" + _use(cls, labels))
    parts.append("## Facts\n\n" + _table(["Fact", ""], [[key, value] for key, value in facts.items()]))
    if arguments:
        parts.append("## Arguments\n\n" + _table(["Argument", "Default", "Meaning"], arguments))
    errors = _section(text, "Raises")
    if errors:
        parts.append("## Errors\n\n" + "\n".join(f"- `{name}`: {_plain(why)}" for name, why in errors.items()))
    if doctest:
        parts.append(
            f"## Checked example\n\n```pycon\n>>> from lightning_peft import {cls.__name__}\n{doctest.strip()}\n```"
        )
    parts.append(
        "## What the tests hold\n\nEvery method goes through the same suite, `tests/methods/test_invariants.py`: "
        f"`python -m pytest tests/methods -k {cls.name}`.\n\n"
        + _table(["Test", cls.__name__], [[claim, held] for claim, held in invariants(cls).items()])
    )
    return "\n\n".join(parts) + "\n"


def _with_links(formula: str) -> str:
    """``as LoRA`` leads to the page of that method."""
    pages = {row.cls.__name__: row.name for row in list_methods()}
    return re.sub(
        r"\bas (\w+)", lambda m: f'as <a href="../{pages[m[1]]}/">{m[1]}</a>' if m[1] in pages else m[0], formula
    )


def invariants(cls: type[Method]) -> dict[str, str]:
    """What the suite asks of every method, in the words of its tests, and what this one answers."""
    facts = {"mergeable": cls.mergeable, "keeps_base": cls.keeps_base}
    answers = {}

    def names(tree: ast.AST) -> set[str]:
        return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    for test in ast.parse(SUITE.read_text()).body:
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            claim = test.name.removeprefix("test_").replace("_", " ")
            # a test that asks for a declared fact expects an error, or has nothing to say, where it does not hold
            asked, refuses = names(test) & facts.keys(), "raises" in names(test)
            conditions = [names(node.test) & facts.keys() for node in ast.walk(test) if isinstance(node, ast.If)]
            if refuses and not all(conditions):
                held = "yes, or refused with an error where it cannot be"  # no declared fact alone decides
            elif not all(facts[fact] for fact in asked):
                held = "refused with an error" if refuses else "does not apply"
            elif cls.acts_on == "layers" and any("acts_on" in names(node) for node in test.decorator_list):
                held = "does not apply"
            else:
                held = "yes"
            answers[claim.capitalize()] = held
    return answers


def _places(cls: type[Method]) -> str:
    if not cls.adapter_types:
        return "parameters of the base itself"
    layers = [kind for kind in cls.adapter_types if kind != "module"]
    whole = ["whole modules"] if "module" in cls.adapter_types else []
    return " and ".join(([", ".join(layers) + " layers"] if layers else []) + whole)


def _use(cls: type[Method], labels: dict[str, str]) -> str:
    """The same in Python, in YAML and on the command line, in tabs."""
    arguments = _example(cls, labels)
    call = f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    python = f"import lightning as L\nfrom lightning_peft import PEFT, {cls.__name__}\n\n"
    python += f"trainer = L.Trainer(callbacks=[PEFT({call})])"
    init = "".join(f"\n            {name}: {json.dumps(value)}" for name, value in arguments.items())
    yaml = "trainer:\n  callbacks:\n    - class_path: PEFT\n      init_args:\n        method:\n"
    yaml += f"          class_path: {cls.__name__}" + (f"\n          init_args:{init}" if init else "")
    tabs = {"Python": f"```python\n{python}\n```", "YAML": f"```yaml\n{yaml}\n```"}
    if command := example_command(cls):
        tabs["Command line"] = f"```console\n{command}\n```"
    return "\n\n".join(f'=== "{name}"\n\n{textwrap.indent(text, "    ")}' for name, text in tabs.items())


def example_command(cls: type[Method]) -> str:
    """A run on one of the ready configurations; none for a method that needs a module or a model of your own."""
    labels = _labels(inspect.getdoc(sys.modules[cls.__module__]) or "")
    if "Needs" in labels:
        return ""
    config = next(CONFIGS[task] for task in CONFIGS if task in cls.modalities)
    method = "--trainer.callbacks.method"
    options = [
        f"{method}.{name}={value if isinstance(value, int | float | str) else json.dumps(value)}"
        for name, value in _example(cls, labels).items()
    ]
    words = ["lightning-peft", "fit", "--config", f"tutorials/configs/{config}", f"{method}={cls.__name__}", *options]
    return shlex.join(words)


def _example(cls: type[Method], labels: dict[str, str]) -> dict[str, Any]:
    """The arguments of an example: those that the file of the method names, or the first number among its own."""
    if "Example" in labels:
        return dict(ast.literal_eval(labels["Example"]))
    numbers = {f.name: f.default for f in dataclasses.fields(cls) if type(f.default) in (int, float)}  # type: ignore[arg-type]
    own = [name for name in numbers if name in vars(cls).get("__annotations__", {})]
    first = next(iter(own), "r" if "r" in numbers else None)
    return {first: numbers[first]} if first else {}


def _purpose(cls: type[Method]) -> str:
    """The first line of the file, after the name of the method."""
    line = (inspect.getdoc(sys.modules[cls.__module__]) or "").partition("\n")[0]
    purpose = line.partition(": ")[2] or line
    return _plain(purpose[:1].upper() + purpose[1:])


def _summary(function: Any) -> str:
    """The first sentence of a docstring, without its full stop; formulas as code."""
    line = (inspect.getdoc(function) or "").partition("\n")[0].removesuffix(".")
    return f"`{line}`" if re.search(r"[*_/=]|^\d", line) and "``" not in line else _plain(line)


def _labels(text: str) -> dict[str, str]:
    """The lines ``Label:   text``, each with its continuation lines, of the docstring of a file."""
    found: dict[str, str] = {}
    for line in text.split("\n\n", 1)[-1].splitlines():
        start = re.match(r"([A-Z][\w' ]*): +(.*)|([A-Z][\w' ]+):$", line)
        if start:
            label = start[1] or start[3]
            found[label] = start[2] or ""
        elif line.strip() and found:
            found[label] = f"{found[label]} {line.strip()}".strip()
    return found


def _section(text: str, title: str) -> dict[str, str]:
    """Name -> text of one section of a docstring in Google's style."""
    body = re.search(rf"^{title}:\n((?:    .*\n?)+)", text, re.M)
    entries = re.split(r"^(?=\S)", textwrap.dedent(body[1]), flags=re.M) if body else []
    pairs = [" ".join(entry.split()).partition(": ") for entry in entries if entry.strip()]
    return {name: meaning for name, _, meaning in pairs}


def _argument(cls: type[Method], name: str) -> str:
    """What an argument means, from the class that explains it."""
    for parent in cls.__mro__:
        meaning = _section(inspect.getdoc(parent) or "", "Args").get(name, "")
        if meaning and not meaning.startswith("see `"):
            return _plain(meaning)
    return ""


def _default(field: Any) -> str:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    text = repr(value)
    return text if len(text) < 40 else "see the meaning"


def _paper(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def _plain(text: str) -> str:
    return text.replace("``", "`")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def update(text: str) -> str:
    """``text`` with the table between its two marks made anew."""
    before, _, rest = text.partition(TABLE)
    return f"{before}{TABLE}\n{readme_table()}\n{TABLE}{rest.partition(TABLE)[2]}"


if __name__ == "__main__":
    README.write_text(update(README.read_text()))
