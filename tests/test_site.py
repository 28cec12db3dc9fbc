"""The documentation as a site: no page is forgotten, links lead where they lead on GitHub, and it fits a phone."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.browser import CHROMIUM, browser
from tests.test_architecture import LAYERS
from wn_rl import config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def nav_files(nav: Any) -> Iterator[str]:
    """Yield the files that the ``nav`` of mkdocs.yml names."""
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from nav_files(item)


def test_the_navigation_has_every_page_once() -> None:
    named = list(nav_files(SETTINGS["nav"] + HOOKS.made_nav()))
    made = {HOOKS.START, *HOOKS.made_pages()}
    assert sorted(named) == sorted(PAGES | made)


def test_warnings_are_errors_in_the_check_and_readme_names_its_command() -> None:
    check = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "site='mkdocs build --strict'\n" in check
    (line,) = (line for line in check.splitlines() if line.partition(" $site")[1] and "=1 " in line)
    assert line.partition("#")[0].strip() == "NO_MKDOCS_2_WARNING=1 $site"  # with --quiet, warnings are no errors
    assert "`mkdocs build --strict`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(SETTINGS["validation"]["links"].values()) == {"warn"}
    assert "/site/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


# --- the API reference


def test_packages_and_modules_are_found_and_private_ones_left_out(tmp_path: Path) -> None:
    for file in ("wn_rl/__init__.py", "wn_rl/one.py", "wn_rl/_two.py", "wn_rl/inner/three.py", "wn_rl/_hidden/four.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert HOOKS.packages(tmp_path) == ["wn_rl", "wn_rl.inner"]
    assert HOOKS.modules("wn_rl", tmp_path) == ["wn_rl.one"]
    assert HOOKS.modules("wn_rl.inner", tmp_path) == ["wn_rl.inner.three"]


def test_every_public_module_is_in_the_reference() -> None:
    there = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for source in ("wn_rl", "agents")
        for file in (ROOT / source).rglob("*.py")
        if not file.name.startswith("_")
    }
    text = "\n".join(HOOKS.reference_page(package) for package in HOOKS.packages())
    assert set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)) == there


def test_the_names_that_wn_rl_offers_lead_to_where_they_are_defined() -> None:
    import wn_rl

    assert HOOKS.exported("wn_rl").keys() == set(wn_rl.__all__) - {"__version__"}
    for name, place in HOOKS.exported("wn_rl").items():
        value = getattr(wn_rl, name)
        assert place == f"{value.__module__}.{value.__qualname__}"
        assert f'identifier="{place}"><code>{name}</code>' in HOOKS.reference_page("wn_rl")


def test_the_tour_keeps_all_its_code() -> None:
    page = HOOKS.tour_page(
        '"""A tour.\n\nIt is short.\n"""\n\n# %% Begin. With a word.\nx = 1\n\n# %% End.\nprint(x)\n'
    )
    assert page == (
        "# A tour\n\nIt is short.\n\n## Begin\n\nWith a word.\n\n```python\nx = 1\n```\n\n## End\n\n\n\n"
        "```python\nprint(x)\n```\n"
    )


# --- links


@pytest.mark.parametrize(
    ("source", "link", "there"),
    [
        ("README.md", "[a](docs/resume.md)", "[a](resume.md)"),
        ("README.md", "![a](docs/quick.png)", "![a](quick.png)"),
        ("README.md", "[![a](docs/quick.png)](docs/report.md)", "[![a](quick.png)](report.md)"),
        ("README.md", "[a](#set-up)", "[a](#set-up)"),
        ("README.md", "[a](docs/results/quick)", "[a](results/quick/index.md)"),
        ("docs/report.md", "[a](../README.md#results)", "[a](index.md#results)"),
        ("docs/report.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("docs/report.md", "[a](results)", "[a](results/README.md)"),
        ("docs/report.md", "[a](../configs/paper.yaml)", "[a](source/configs/paper.yaml.md)"),
        ("docs/report.md", "[a](../agents/dqn.py)", "[a](reference/agents.md)"),
        ("docs/report.md", "[a](../wn_rl/networks)", "[a](reference/wn_rl.networks.md)"),
        ("docs/report.md", "[a](../wn_rl/networks/__init__.py)", "[a](reference/wn_rl.networks.md)"),
        ("docs/report.md", "[a `b`](../benchmarks)", "a `b`"),
        ("docs/results/README.md", "[a](../algorithm.md)", "[a](../algorithm.md)"),
        ("docs/report.md", "```\n[a](../benchmarks)\n```", "```\n[a](../benchmarks)\n```"),
    ],
)
def test_a_link_leads_where_it_leads_on_github(source: str, link: str, there: str) -> None:
    page = "index.md" if source == "README.md" else source.removeprefix("docs/")
    assert HOOKS.rewrite_links(link, ROOT / source, page) == there


def test_a_broken_link_is_left_for_mkdocs_to_refuse() -> None:
    for link in ("[a](gone.md)", "[a](../wn_rl/gone.py)"):
        assert "gone" in HOOKS.rewrite_links(link, DOCS / "report.md", "report.md").partition("(")[2]


# --- the pages


class Structure(HTMLParser):
    """The words of a page and the elements around them."""

    BLOCKS = frozenset(("blockquote", "h1", "h2", "h3", "h4", "hr", "li", "ol", "pre", "table", "td", "th", "tr", "ul"))
    ELEMENTS = BLOCKS | {"a", "code", "em", "img", "strong"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.ELEMENTS and not self._code:
            self.found.append(f"<{tag}>")
        self._code += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag == "pre"
        if tag in self.ELEMENTS and not self._code:
            self.found.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.found += data.split()


@pytest.mark.parametrize("page", sorted(PAGES | {"../README.md"}))
def test_a_page_is_rendered_as_on_github(page: str) -> None:
    """The site's Markdown and GitHub's differ in lists, for one: what is inside an item needs four spaces here."""
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("pymdownx")
    text = (DOCS / page).read_text(encoding="utf-8")
    extensions = ["tables", "attr_list", "pymdownx.superfences"]
    settings = {"pymdownx.highlight": {"use_pygments": False}}
    ours = markdown.markdown(text, extensions=[*extensions, "pymdownx.highlight"], extension_configs=settings)
    theirs = MarkdownIt("commonmark").enable("table").render(text)
    assert Structure(ours).found == Structure(theirs).found


def test_architecture_draws_the_layers_that_are_checked_and_names_every_part() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = text.split("| parts of `wn_rl`, from the top |\n|---|\n")[1].split("\n\n")[0]
    rows = [tuple(re.findall(r"`(\w+)`", row)) for row in table.splitlines()]
    assert rows == list(reversed(LAYERS))
    for package in HOOKS.packages():
        assert re.search(rf"^ *(\S+, )?{package.split('.')[-1]}/", text, flags=re.MULTILINE), package


def test_the_table_of_presets_says_what_the_files_say() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (DOCS / "training.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    presets = re.findall(r"\[`(\w+)`\]", " ".join(rows[0]))
    assert set(presets) == set(config.preset_names())
    keys = [row for row in rows[1:] if len(row) == len(presets) + 1 and row[0].startswith("`")]
    assert len(keys) >= 10
    for key, *cells in keys:
        for preset, cell in zip(presets, cells, strict=True):
            value = getattr(config.load(preset), key.strip("`"))
            if isinstance(value, bool):
                assert cell == ("yes" if value else "no"), (key, preset)
            elif isinstance(value, str):
                assert cell == value, (key, preset)
            else:
                number = float(cell.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(cell[-1], 1)
                assert number == pytest.approx(value), (key, preset)


# --- the site in a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The built site and its address; the site that is there already, where nothing has changed since."""
    pytest.importorskip("mkdocs")
    directory = ROOT / "site"
    sources = [ROOT / "mkdocs.yml", ROOT / "README.md"]
    sources += [file for part in ("docs", "wn_rl", "agents", "configs") for file in (ROOT / part).rglob("*.*")]
    newest = max(file.stat().st_mtime for file in sources if "__pycache__" not in file.parts)
    if not (directory / "sitemap.xml").exists() or (directory / "sitemap.xml").stat().st_mtime < newest:
        directory = tmp_path_factory.mktemp("site")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
        subprocess.run(command, cwd=ROOT, check=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield directory, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="browser: there is no Chromium here")
def test_pages_fit_a_phone_and_fetch_nothing_from_elsewhere(site: tuple[Path, str], tmp_path: Path) -> None:
    """Every page that is written by hand, and of the made ones the longest of each kind."""
    directory, address = site
    files = sorted(directory.glob("*.html"))
    for kind in ("reference", "results", "source"):
        files.append(max((directory / kind).rglob("*.html"), key=lambda file: file.stat().st_size))
    wider = (
        "[...document.querySelectorAll('.md-content *')].filter(e => { const r = e.getBoundingClientRect(); "
        "if (!r.width || r.right <= innerWidth + 1) return false; "
        "for (let a = e; a; a = a.parentElement) if (getComputedStyle(a).overflowX !== 'visible') return false; "
        "return true }).slice(0, 3).map(e => e.outerHTML.slice(0, 200))"
    )
    with browser(tmp_path) as chromium:
        chromium.look(390)
        for file in files:
            page = file.relative_to(directory).as_posix()
            chromium.open(f"{address}/{page}")
            assert chromium.complaints() == [], page
            assert [request for request in chromium.requests() if not request.startswith(address)] == [], page
            assert chromium.value("document.documentElement.scrollWidth") <= 390, page
            assert chromium.value(wider) == [], page


def test_every_page_is_reached_from_the_start(site: tuple[Path, str]) -> None:
    directory, _ = site
    seen, waiting = set(), [directory / "index.html"]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        targets = re.findall(r'href="?([^"> ]+?\.html)', file.read_text(encoding="utf-8"))
        waiting += [(file.parent / target).resolve() for target in targets if "://" not in target]
    assert {file for file in directory.rglob("*.html") if file.name != "404.html"} <= seen
    assert all(file.exists() for file in seen)
