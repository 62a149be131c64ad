"""Pages of the reference: what each room exports, by its docstrings; mkdocstrings writes them out."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import lightning_peft
from lightning_peft.engine import METHODS

# room -> what its page is for
ROOMS = {
    "callbacks": "What is given to the Trainer.",
    "strategies": "Several devices and processes: `Trainer(strategy=...)`.",
    "recipes": "Ready modules and data, for the command line and the tutorials.",
    "interop": "Adapter folders, and files of other libraries.",
    "engine": "For those who write methods, or a training loop of their own.",
    "parts.losses": "Losses that some methods ask for.",
    "kernels": "Operations that methods share, with a Triton kernel each where that is faster.",
}
PACKAGE = Path(lightning_peft.__file__).parent


def exported(room: str) -> dict[str, str]:
    """Public name -> its module, of one room; in the order of its ``__init__``, or of the file that it is."""
    path = PACKAGE / room.replace(".", "/")
    found: dict[str, str] = {}
    if path.is_dir():
        for node in ast.walk(ast.parse((path / "__init__.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("lightning_peft")):
                module = f"lightning_peft.{room}.{node.module}" if node.level else str(node.module)
                found |= {alias.name: module for alias in node.names if alias.asname == alias.name}
    else:
        for node in ast.parse(path.with_suffix(".py").read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found[node.name] = f"lightning_peft.{room}"
    return found


def room_page(room: str) -> str:
    """All that a room exports, each with its signature and its docstring."""
    package = import_module(f"lightning_peft.{room}")
    entries = [f"::: {module}.{name}" for name, module in exported(room).items() if callable(getattr(package, name))]
    head = f"# lightning_peft.{room}\n\n{ROOMS[room]}"
    return "\n\n".join([head, *entries]) + "\n"


def index_page() -> str:
    """What ``import lightning_peft`` gives, in one table."""
    home = {name: room for room in ROOMS for name in exported(room)}
    rows = ["| Name | What it does |", "| --- | --- |"]
    for name in sorted(vars(lightning_peft), key=str.lower):
        thing = getattr(lightning_peft, name)
        if name.startswith("_") or not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        line = (inspect.getdoc(thing) or "").partition("\n")[0].replace("``", "`").replace("|", "\\|")
        method = next((registry for registry, cls in METHODS.items() if cls is thing), None)
        page = f"../methods/{method}.md" if method else f"{home[name]}.md#{exported(home[name])[name]}.{name}"
        rows.append(f"| [`{name}`]({page}) | {line} |")
    rooms = "\n".join(f"- [lightning_peft.{room}]({room}.md): {text}" for room, text in ROOMS.items())
    return f"# Reference\n\n{rooms}\n\n## What `import lightning_peft` gives\n\n" + "\n".join(rows) + "\n"
