"""The house rules that a reader relies on: who imports whom, what is public, what a method file looks like."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft.engine import METHODS, Method

PACKAGE = Path(lightning_peft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# from the bottom to the top: a room imports from its own floor and from those below
FLOORS = [
    {"kernels"},
    {"engine"},
    {"adapters", "parts"},
    {"methods"},
    {"callbacks", "strategies", "interop", "merging"},
    {"cli", "recipes"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
PAPERS = {name: cls for name, cls in METHODS.items() if cls.family != "interop"}  # the other one is a bridge
by_method = pytest.mark.parametrize("cls", PAPERS.values(), ids=PAPERS.keys())


def room_of(file: Path) -> str:
    """The top folder, or the file itself where it lies in none."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Full names of all that a file imports, at the top or inside of functions."""
    package = ["lightning_peft", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor() -> None:
    assert {room_of(file) for file in FILES} - {"__init__"} <= FLOOR.keys()


@by_file
def test_no_room_imports_from_a_higher_floor(file: Path) -> None:
    if room_of(file) != "__init__":
        own = [name.split(".")[1] for name in imported(file) if name.startswith("lightning_peft.")]
        gathered = FLOOR["callbacks"]  # what the package itself exports comes from up to there
        higher = [name for name in own if FLOOR.get(name, gathered) > FLOOR[room_of(file)] and name != "__version__"]
        assert higher == []


@by_file
def test_the_lower_rooms_know_torch_and_a_progress_bar_and_nothing_else(file: Path) -> None:
    if FLOOR.get(room_of(file), 9) <= FLOOR["methods"]:
        allowed = {"torch", "tqdm", "lightning_peft", *sys.stdlib_module_names}
        allowed |= {"triton"} if room_of(file) == "kernels" else set()
        assert {name.split(".")[0] for name in imported(file)} <= allowed


def test_importing_the_package_loads_no_optional_library() -> None:
    optional = {"transformers", "diffusers", "timm", "peft", "torchvision", "triton", "bitsandbytes"}
    optional |= {"jsonargparse", "sklearn", "matplotlib"}
    # Lightning loads some of them by itself, where they are installed
    code = (
        "import sys, lightning, torch; before = set(sys.modules); import lightning_peft; "
        f"print(sorted({optional} & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_these() -> None:
    """A name that is added here is promised for a long time; methods promise themselves."""
    rooms = {path.stem for path in PACKAGE.iterdir()}
    public = {name for name in vars(lightning_peft) if not name.startswith("_")} - rooms
    assert sorted(public - {cls.__name__ for cls in METHODS.values()}) == [
        "AdapterError",
        "InvertedHingeLoss",
        "PEFT",
        "PEFTDDPStrategy",
        "PEFTFSDPStrategy",
        "PEFTFederatedStrategy",
        "PEFTOffloadStrategy",
        "combine",
        "contrastive_denoising_loss",
        "disabled",
        "get_method",
        "inject",
        "list_methods",
        "load_adapter",
        "load_experts",
        "merge",
        "routed",
        "save_adapter",
        "set_active",
        "set_trainable",
        "unload",
        "unmerge",
    ]


def test_folders_exports_and_registry_agree() -> None:
    files = {path.stem: path.parent.name for path in (PACKAGE / "methods").glob("*/*.py") if path.stem != "__init__"}
    assert {name: cls.family for name, cls in PAPERS.items()} == files
    for cls in METHODS.values():
        assert getattr(lightning_peft, cls.__name__) is cls
        assert cls.__name__.lower() == cls.name


@pytest.mark.parametrize("family", sorted((PACKAGE / "methods").glob("*/__init__.py")), ids=lambda f: f.parent.name)
def test_exports_of_a_family_are_sorted_and_explicit(family: Path) -> None:
    lines = [line for line in family.read_text().splitlines() if line.startswith("from")]
    assert lines == sorted(lines)
    for line in lines:
        _, module, _, name, _, alias = line.split()
        assert name == alias
        assert module == f".{name.lower()}"


def file_of(cls: type[Method]) -> Path:
    return PACKAGE / "methods" / cls.family / f"{cls.name}.py"


@by_method
def test_a_method_is_a_file_of_one_page(cls: type[Method]) -> None:
    assert 30 <= len(file_of(cls).read_text().splitlines()) <= 150


@by_method
def test_a_method_file_says_what_the_paper_says(cls: type[Method]) -> None:
    text = ast.get_docstring(ast.parse(file_of(cls).read_text()))
    assert text is not None
    labels = [line.partition(":")[0] for line in text.splitlines() if line[:1].isupper() and ":" in line[:30]]
    wanted = ["Paper", "Formula", "Shapes", "Init", "Merge"]
    assert [label for label in labels if label in wanted] == wanted
    if cls.paper:
        assert cls.paper in text


@by_method
def test_a_method_shows_its_formula_in_a_doctest(cls: type[Method]) -> None:
    assert ">>> " in (cls.__doc__ or "")


@by_method
def test_a_method_imports_other_methods_only_as_parents(cls: type[Method]) -> None:
    prefix = "lightning_peft.methods."
    others = [name for name in imported(file_of(cls)) if name.startswith(prefix)]
    parents = {f"{parent.__module__}.{parent.__name__}" for parent in cls.__mro__[1:]}
    assert set(others) <= parents


@by_file
def test_library_code_has_no_bare_assert(file: Path) -> None:
    assert not [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]


def test_the_invariant_suite_names_no_method() -> None:
    suite = Path(__file__).parent / "methods"
    words = {
        node.value if isinstance(node, ast.Constant) else node.id
        for file in suite.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant | ast.Name)
    }
    assert not words & {name for cls in METHODS.values() for name in (cls.name, cls.__name__)}
