"""The site as people see it: in a real browser, on a desktop and on a phone, in light and in dark; and its links.

``make docs`` builds the site and runs this.
"""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from lightning_peft import list_methods

SITE = Path(__file__).parents[1] / "site"
ROOT = "https://site/"  # stands for the site in links
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
TUTORIALS = sorted(path.parent.name for path in SITE.glob("tutorials/[0-9]*/index.html"))
PAGES = ["", "methods/", "methods/lora/", "tutorials/", "tutorials/01_first_steps/", "benchmarks/"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served."""
    assert (SITE / "index.html").exists(), "the site is not built: make docs"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM and not os.environ.get("CI"):
        pytest.skip("no Chromium here; apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def windows(browser: Browser) -> Any:
    """One window for each kind of screen; its cache makes the next page faster."""

    @functools.cache
    def window(screen: str, scheme: Any) -> BrowserContext:
        width, height = SCREENS[screen]
        return browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)

    return window


@pytest.fixture
def opened(windows: Any, address: str) -> Iterator[Any]:
    """Opens a page of the site; in the end, none of them may have complained, or asked anybody else for anything."""
    complaints: list[str] = []
    pages: list[Page] = []

    def opened(path: str, screen: str = "desktop", scheme: str = "light") -> Page:
        pages.append(page := windows(screen, scheme).new_page())
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"{request.url} failed"))
        page.on("request", lambda request: None if request.url.startswith(address) else complaints.append(request.url))
        assert page.goto(address + path, wait_until="load").ok
        return page

    yield opened
    for page in pages:
        page.close()
    assert complaints == []


def boxes(page: Page, what: str) -> list[tuple[float, float]]:
    """Width and height of all such elements."""
    measure = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.width, box.height])"
    return [(width, height) for width, height in page.eval_on_selector_all(what, measure)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_its_screen(path: str, screen: str, scheme: str, opened: Any) -> None:
    page = opened(path, screen, scheme)
    assert page.locator("article h1").is_visible()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= SCREENS[screen][0]
    # every picture can be drawn, and none is wider than the screen
    drawn = "Promise.all([...document.querySelectorAll('article img')].map(i => i.decode().then(() => i.clientWidth)))"
    assert all(0 < width <= SCREENS[screen][0] for width in page.evaluate(drawn))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(background) < 3 * 128) == (scheme == "dark")


def test_pictures_are_where_they_belong(opened: Any) -> None:
    assert len(boxes(opened(""), "article img")) >= 1
    assert len(boxes(opened("tutorials/"), "article img")) == len(TUTORIALS)
    for name in TUTORIALS:
        assert len(boxes(opened(f"tutorials/{name}/"), "article img")) >= 1, name


@pytest.mark.parametrize("row", list_methods(), ids=lambda row: row.name)
def test_the_page_of_a_method_shows_its_formulas(row: Any, opened: Any) -> None:
    page = opened(f"methods/{row.name}/")
    assert page.locator("article h1").inner_text().startswith(row.cls.__name__)
    formulas = boxes(page, ".formula math")
    assert formulas
    # a lone sign is small; a formula that is not drawn has no size
    assert min(min(box) for box in formulas) > 0
    assert max(height for _, height in formulas) > 12
    tables = boxes(page, "article table")
    assert len(tables) >= 2
    labels = page.locator(".tabbed-labels label").all_inner_texts()
    assert labels[:2] == ["Python", "YAML"]


def test_the_table_of_methods_can_be_filtered(opened: Any) -> None:
    methods = {row.cls.__name__: row for row in list_methods()}
    page = opened("methods/")

    def shown() -> set[str]:
        return set(page.locator(".filterable tbody tr:visible td:first-child").all_inner_texts())

    assert shown() == set(methods)
    page.get_by_label("Merges").select_option("no")
    assert shown() == {name for name, row in methods.items() if not row.mergeable}
    page.get_by_label("For", exact=True).select_option("text")
    expected = {name for name, row in methods.items() if not row.mergeable and "text" in row.cls.modalities}
    assert shown() == expected
    assert page.locator(".filter output").inner_text() == f"{len(expected)} of {len(methods)}"
    page.get_by_role("button", name="All").click()
    assert shown() == set(methods)
    page.get_by_label("Words that a row must contain").fill("Kronecker product")
    assert {"LoKr", "DiffuseKronA"} <= shown() < set(methods)
    page.get_by_label("Words that a row must contain").fill("no method has these words")
    assert shown() == set()


def test_the_search_finds_a_method(opened: Any) -> None:
    page = opened("")
    page.get_by_label("Search").first.fill("SideTuning")
    page.wait_for_selector(".md-search-result__item a")
    assert "sidetuning" in str(page.locator(".md-search-result__item a").first.get_attribute("href")).lower()


def test_every_link_leads_somewhere() -> None:
    files = {file.relative_to(SITE).as_posix(): file.read_bytes() for file in SITE.rglob("*.html")}
    pages = {path: BeautifulSoup(content, "html.parser") for path, content in files.items()}
    names = {path: {tag.get("id") or tag.get("name") for tag in page.find_all(True)} for path, page in pages.items()}
    dead = []
    for path, page in pages.items():
        for tag in page.find_all(["a", "img", "script", "link"]):
            link = urlsplit(urljoin(f"{ROOT}{path}", tag.get("href") or tag.get("src") or ""))
            if f"{link.scheme}://{link.netloc}/" != ROOT:
                continue
            target = unquote(link.path).lstrip("/")
            file = f"{target}index.html" if target.endswith("/") or not target else target
            if not (SITE / file).is_file() or (link.fragment and unquote(link.fragment) not in names.get(file, ())):
                dead.append((path, urlunsplit(link)))
    assert len(pages) > len(list_methods())
    assert dead == []
