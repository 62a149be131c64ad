"""What MkDocs calls while it builds the site: pages of methods and tutorials are made, and links find their way.

A page may link to any file of the repository by its relative path, as GitHub shows it. Here such a link leads to the
page that is made of the file; the name of a file without a page stays as text.
"""

import posixpath
import re
from typing import Any

from method_pages import TABLE, method_page, methods_table
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from notebooks import FOLDER, TOP, executed, notebooks, page
from reference import ROOMS, index_page, room_page

from lightning_peft import list_methods

# file of the repository -> page of the site; what is below docs/ is its own page
INCLUDED = {
    "tutorials/README.md": "tutorials/index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# pages whose table needs the whole width
WIDE = {"tutorials/index.md", "benchmarks.md"}
# names of families that are no plain words
FAMILIES = {"lora": "LoRA", "interop": "HF PEFT"}
# code comes first, so that an index and a call in it are not taken for a link
LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<image>!?)\[(?P<label>[^\[\]]*)\]\((?P<where>[^)\s]+)\)", re.M | re.S
)


def on_config(config: Any) -> Any:
    """Put the tutorials, and one page for each method, into the navigation."""
    sections = {title: pages for entry in config.nav for title, pages in entry.items() if isinstance(pages, list)}
    sections["Tutorials"].extend(f"tutorials/{path.stem}.md" for path in notebooks())
    families: dict[str, list[dict[str, str]]] = {}
    for row in list_methods():
        family = FAMILIES.get(row.family, row.family.capitalize())
        families.setdefault(family, []).append({row.cls.__name__: f"methods/{row.name}.md"})
    sections["Methods"].extend({family: pages} for family, pages in families.items())
    return config


@event_priority(100)
def on_files(files: Any, config: Any) -> Any:
    """Add what is made: pages of methods, tutorials with their pictures, and files that stand elsewhere."""
    for row in list_methods():
        files.append(File.generated(config, f"methods/{row.name}.md", content=method_page(row.cls)))
    paths = notebooks()
    for path, notebook in zip(paths, executed(paths), strict=True):
        text, pictures = page(notebook, path.stem)
        text = relinked(text, f"tutorials/{path.name}", f"tutorials/{path.stem}.md")
        head, _, rest = text.lstrip().partition("\n")
        text = f"{head}\n\n[Download this notebook]({path.stem}/{path.name})\n{rest}"
        files.append(File.generated(config, f"tutorials/{path.stem}/{path.name}", abs_src_path=str(path)))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for file, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{file}", content=content))
    files.append(File.generated(config, "reference/index.md", content=index_page()))
    for room in ROOMS:
        files.append(File.generated(config, f"reference/{room}.md", content=room_page(room)))
    for source, target in INCLUDED.items():
        text = relinked((TOP / source).read_text(), source, target)
        wide = "---\nhide: [navigation, toc]\n---\n\n" if target in WIDE else ""
        files.append(File.generated(config, target, content=wide + text))
    for file in sorted((FOLDER / "pictures").glob("*.png")):
        files.append(File.generated(config, f"tutorials/pictures/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the table where a page asks for it, and let links of pages below docs/ lead to pages."""
    text = markdown.replace(TABLE, methods_table()) if TABLE in markdown else markdown
    return text if page.file.generated_by else relinked(text, f"docs/{page.file.src_uri}", page.file.src_uri)


def relinked(text: str, source: str, target: str) -> str:
    """The links of a file of the repository as links of the page that is made of it."""

    def place(link: str) -> str | None:
        path, sharp, anchor = link.partition("#")
        if "://" in link or not path:
            return link
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = INCLUDED.get(found, found.removeprefix("docs/"))
        if re.fullmatch(r"tutorials/\d.*\.ipynb", page):
            page = page.removesuffix(".ipynb") + ".md"
        elif not found.startswith("docs/") and found not in INCLUDED and not page.endswith(".png"):
            return None
        return posixpath.relpath(page, posixpath.dirname(target) or ".") + sharp + anchor

    def link(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        bang, label, where = match["image"], match["label"], match["where"]
        to = place(where)
        return label if to is None else f"{bang}[{label}]({to})"

    return re.sub(LINK, link, text)
