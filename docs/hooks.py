"""Makes the pages about methods out of the registry: no method is listed by hand.

MkDocs calls the functions named ``on_...``; ``python docs/hooks.py`` brings the table in the README up to date.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from lightning_peft import list_methods
from lightning_peft.engine import Method

TABLE = "<!-- methods -->"
README = Path(__file__).parents[1] / "README.md"


def on_config(config: Any) -> Any:
    """Put one page for each method into the navigation."""
    section = next(entry["Methods"] for entry in config.nav if isinstance(entry, dict) and "Methods" in entry)
    section.extend({row.cls.__name__: f"methods/{row.name}.md"} for row in list_methods())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add these pages."""
    from mkdocs.structure.files import File

    for row in list_methods():
        files.append(File.generated(config, f"methods/{row.name}.md", content=method_page(row.cls)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table where a page asks for it."""
    return markdown.replace(TABLE, methods_table())


def methods_table() -> str:
    """All methods, one row each, with links to their pages."""
    rows = []
    for row in list_methods():
        rows.append(
            [
                f"[{row.cls.__name__}](methods/{row.name}.md)",
                f"`{row.name}`",
                row.family,
                _purpose(row.cls),
                trained(row.cls),
                "yes" if row.cls.identity_at_init else "no",
                "yes" if row.mergeable else "no",
                "yes" if row.cls.calibrated else "no",
                cost(row.cls),
                _paper(row.paper),
            ]
        )
    head = ["Class", "Name", "Family", "What it does", "Trains", "Starts as the base", "Merges"]
    head += ["Calibrated", "Extra cost per step", "Paper"]
    return _table(head, rows)


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
    parts.append(_table(["Fact", ""], [[key, value] for key, value in facts.items()]))
    for label, value in labels.items():
        if label == "Cost":
            continue
        prose = label not in ("Formula", "Shapes", "Init", "Merge", "Schedule", "Loss")
        parts.append(f"**{label}**\n\n{_plain(value) if prose else f'`{value}`'}")
    parts.append(f"## Use\n\n```python\n{_use(cls)}\n```\n\n```console\n{_command(cls)}\n```")
    if arguments:
        parts.append("## Arguments\n\n" + _table(["Argument", "Default", "Meaning"], arguments))
    errors = _section(text, "Raises")
    if errors:
        parts.append("## Errors\n\n" + "\n".join(f"- `{name}`: {_plain(why)}" for name, why in errors.items()))
    if doctest:
        parts.append(
            f"## Checked example\n\n```pycon\n>>> from lightning_peft import {cls.__name__}\n{doctest.strip()}\n```"
        )
    return "\n\n".join(parts) + "\n"


def _places(cls: type[Method]) -> str:
    if not cls.adapter_types:
        return "parameters of the base itself"
    layers = [kind for kind in cls.adapter_types if kind != "module"]
    whole = ["whole modules"] if "module" in cls.adapter_types else []
    return " and ".join(([", ".join(layers) + " layers"] if layers else []) + whole)


def _use(cls: type[Method]) -> str:
    name = cls.__name__
    return (
        f"import lightning as L\nfrom lightning_peft import PEFT, {name}\n\n"
        f"trainer = L.Trainer(callbacks=[PEFT({name}())])"
    )


def _command(cls: type[Method]) -> str:
    return f"lightning-peft fit --config tutorials/configs/digits.yaml --trainer.callbacks.method={cls.__name__}"


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
        start = re.match(r"([A-Z][\w ]*): +(.*)|([A-Z][\w ]+):$", line)
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
