"""What ``mkdocs build`` adds to docs/: the start page, the API reference, the results, links into the code.

The pages of docs/ are written for a reader of the repository: links are relative, to files and directories. On the site

- README.md is the start page;
- each package of ``SOURCES`` has a page made from its docstrings, without importing it;
- each directory of docs/results has a page that lists its runs;
- a link to a directory leads to its page, a link to code leads to its place in the API reference, and a link to
  another file of the repository leads to a copy of it.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCES = ("wn_rl", "agents")
SHORT = ("wn_rl.report", "wn_rl.video", "wn_rl.commands")
"""Packages of which the reference gives one line for each name: people use their commands, not their modules."""
WITH_CODE = ("agents",)
"""Packages whose functions are shown with their code, to be read beside the papers."""
START = "index.md"
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s#]*)()\)")
_FENCE = re.compile(r"^ *(```|~~~)")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):<code>~?([^<]+)</code>")


# --- the packages and their modules ---------------------------------------------------------------------------------


def packages(root: Path = ROOT) -> list[str]:
    """Return the dotted names of the packages in ``SOURCES``, a package before those inside it."""
    found = []
    for source in SOURCES:
        directories = {path.parent for path in (root / source).rglob("*.py")}
        names = (".".join(directory.relative_to(root).parts) for directory in directories)
        found += sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))
    return found


def modules(package: str, root: Path = ROOT) -> list[str]:
    """Return the dotted names of a package's own public modules, without the package itself."""
    directory = root.joinpath(*package.split("."))
    return [f"{package}.{path.stem}" for path in sorted(directory.glob("*.py")) if not path.stem.startswith("_")]


def _file(module: str) -> Path:
    """Return the file of a module or package; it need not exist."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _tree(module: str) -> ast.Module:
    file = _file(module)
    return ast.parse(file.read_text(encoding="utf-8") if file.exists() else "")


def _definitions(module: str) -> dict[str, str]:
    """Return the first line of the docstring of each public class, function and constant that has one, by name."""
    found = {}
    body = _tree(module).body
    for node, after in zip(body, [*body[1:], None], strict=False):  # an empty file has no node
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = ast.get_docstring(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(after, ast.Expr):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            found[ast.unparse(target)] = after.value.value if isinstance(after.value, ast.Constant) else None
    return {name: text.partition("\n")[0] for name, text in found.items() if text and not name.startswith("_")}


def exported(package: str) -> dict[str, str]:
    """Return where each name that a package offers is defined: name → dotted name.

    A package offers what is in its ``__all__``; without one, what it imports ``as`` the same name.
    """
    tree = _tree(package)
    chosen = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = alias.asname or alias.name
                if name in chosen[0] if chosen else alias.asname == alias.name:
                    imported[name] = f"{module}.{alias.name}"
    return {name: _defined(place) for name, place in sorted(imported.items()) if not _file(place).exists()}


def _defined(place: str) -> str:
    """Follow a name through the packages that pass it on."""
    module, _, name = place.rpartition(".")
    if _file(module).name == "__init__.py":
        return exported(module).get(name, place)
    return place


# --- the API reference ----------------------------------------------------------------------------------------------


def page_of(package: str) -> str:
    """Return the file of a package's page, relative to docs/."""
    return f"reference/{package}.md"


def reference_page(package: str) -> str:
    """Return the Markdown of a package's page: its docstring, the names that it offers, its modules."""
    lines = [f"# {package} {{#{package}}}", ""]
    lines += [ast.get_docstring(_tree(package)) or "", ""]
    names = {name: place for name, place in exported(package).items() if not _is_short(place)}
    if names:
        lines += [f"| from `{package}` | |", "|---|---|"]
        for name, place in names.items():
            module, _, defined = place.rpartition(".")
            if summary := _definitions(module).get(defined):
                lines.append(f"| {_reference(place, name, optional=False)} | {_cell(summary)} |")
        lines.append("")
    for module in modules(package):
        lines += [f"::: {module}", "    options:", "      heading_level: 2"]
        if package in WITH_CODE:
            lines.append("      show_source: true")
        if _is_short(module):
            lines += ["      members: false", ""]
            table = [f"| `{name}` | {_cell(summary)} |" for name, summary in _definitions(module).items()]
            lines += ["| | |", "|---|---|", *table] if table else []
        lines.append("")
    return "\n".join(lines)


def reference_index() -> str:
    """Return the Markdown of the reference's first page: a line for each package."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings. A name that begins with an underscore may change any day.",
        "",
    ]
    lines += ["| package | what it holds |", "|---|---|"]
    for package in packages():
        summary = (ast.get_docstring(_tree(package)) or "").partition("\n")[0]
        lines.append(f"| [`{package}`]({package}.md) | {_cell(summary)} |")
    return "\n".join([*lines, ""])


def _reference(place: str, text: str, *, optional: bool) -> str:
    """Return a link to a dotted name's entry in the reference; unless optional, mkdocs complains if there is none."""
    return f'<autoref {"optional " if optional else ""}identifier="{place}"><code>{text}</code></autoref>'


def _is_short(module: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in SHORT)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


# --- the results ----------------------------------------------------------------------------------------------------


def results_pages() -> dict[str, str]:
    """Return the page of each directory of docs/results: file relative to docs/ → Markdown."""
    pages = {}
    for directory in sorted(path for path in (DOCS / "results").iterdir() if path.is_dir()):
        runs = sorted(path.parent for path in directory.glob("*/summary.json"))
        lines = [f"# Results: {directory.name}", ""]
        if runs:
            lines += [
                "Scores are raw points: mean ± standard deviation over the episodes of one evaluation in the training. "
                "*Best* is the highest mean. How and with what the runs were made: [raw results](../README.md).",
                "",
                "| run | frames | episodes | last evaluation | best evaluation | files |",
                "|---|---|---|---|---|---|",
                *(_run_row(run) for run in runs),
            ]
        else:
            lines += [f"- [{file.name}]({file.name})" for file in sorted(directory.iterdir()) if file.is_file()]
        pages[f"results/{directory.name}/index.md"] = "\n".join([*lines, ""])
    return pages


def _run_row(run: Path) -> str:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    last, best = summary["final_evaluation"], summary["best_evaluation"]
    scores = [f"{score['mean']:.1f} ± {score['std']:.1f}".replace("-", "−") for score in (last, best)]
    files = ", ".join(f"[{file.stem}]({run.name}/{file.name})" for file in sorted(run.iterdir()) if file.is_file())
    return f"| {run.name} | {summary['frames']:,} | {last['episodes']} | {' | '.join(scores)} | {files} |"


# --- the tour -------------------------------------------------------------------------------------------------------


def tour_page(script: str) -> str:
    """Return the Markdown of a script of cells: the docstring, then a heading, a line and the code of each cell.

    Args:
        script: Python code in which a line ``# %% Title. Some text.`` begins a cell.
    """
    docstring = ast.get_docstring(ast.parse(script)) or ""
    title, _, rest = docstring.partition("\n")
    lines = [f"# {title.rstrip('.')}", "", rest.strip(), ""]
    for cell in script.split("\n# %% ")[1:]:
        head, _, code = cell.partition("\n")
        heading, _, text = head.partition(". ")
        lines += [f"## {heading.rstrip('.')}", "", text, "", "```python", code.strip("\n"), "```", ""]
    return "\n".join(lines)


# --- links ----------------------------------------------------------------------------------------------------------


def rewrite_links(markdown: str, source: Path, page: str, copies: set[Path] | None = None) -> str:
    """Return the text of a page with its relative links as the site needs them.

    Args:
        markdown: the text of the page.
        source: the file that its links are relative to.
        page: the page, relative to docs/.
        copies: gets the files of the repository that the site has to copy.
    """

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        image = found[0].startswith("!")
        if not image:
            text = _IMAGE.sub(link, text)
        if not target or re.match(r"[a-z]+:", target) or target.startswith("/"):
            return found[0] if image else f"[{text}]({target}{anchor})"
        path = Path(posixpath.normpath((source.parent / target).as_posix()))
        place = _place(path, copies)
        if place is None:
            return text
        return f"{'!' if image else ''}[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"

    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        lines.append(line if fence or mark else _IMAGE.sub(link, _LINK.sub(link, line)))
    return "\n".join(lines)


def _place(path: Path, copies: set[Path] | None) -> str | None:
    """Return where the site has what a link leads to, relative to docs/; None: nowhere, the link is dropped."""
    if path == ROOT / "README.md":
        return START
    if DOCS in path.parents:
        place = path.relative_to(DOCS).as_posix()
        if path.is_dir():
            return f"{place}/README.md" if (path / "README.md").exists() else f"{place}/index.md"
        return place
    if path in ROOT.parents or not path.exists():
        return path.as_posix()  # mkdocs says that it isn't there
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if path.suffix in ("", ".py") and name in packages():
        return page_of(name)
    package = name.rpartition(".")[0]
    if path.suffix == ".py" and package in packages() and name in modules(package):
        return page_of(package)
    if path.is_dir():
        return None
    if copies is not None:
        copies.add(path)
    return f"source/{path.relative_to(ROOT).as_posix()}" + ("" if path.suffix == ".md" else ".md")


def _copy(path: Path) -> str:
    """Return the page that shows a file of the repository: Markdown as it is, everything else as code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path.relative_to(ROOT).as_posix()}\n\n````{path.suffix.lstrip('.')}\n{text.rstrip()}\n````\n"


# --- what mkdocs calls ----------------------------------------------------------------------------------------------


def made_nav() -> list[dict[str, list[str | dict[str, str]]]]:
    """Return what the navigation has after the ``nav`` of mkdocs.yml."""
    return [
        {"Results": ["results/README.md", *results_pages()]},
        {"API reference": ["reference/index.md", *({package: page_of(package)} for package in packages())]},
    ]


def made_pages() -> dict[str, str]:
    """Return the pages that are made, without the start page: file relative to docs/ → Markdown."""
    return {
        "tour.md": tour_page((DOCS / "tour.py").read_text(encoding="utf-8")),
        "reference/index.md": reference_index(),
        **{page_of(package): reference_page(package) for package in packages()},
        **results_pages(),
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that GitHub gives them, and put the made pages into the navigation."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    assert config.nav is not None
    config.nav += made_nav()
    config.watch += [str(ROOT / "README.md"), *(str(ROOT / source) for source in SOURCES)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File, InclusionLevel

    made = {START: (ROOT / "README.md").read_text(encoding="utf-8"), **made_pages()}
    copies: set[Path] = set()
    for file in files.documentation_pages():
        rewrite_links(file.content_string, DOCS / file.src_uri, file.src_uri, copies)
    rewrite_links(made[START], ROOT / "README.md", START, copies)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted(copies):
        page = _place(path, None)
        assert page is not None
        files.append(File.generated(config, page, content=_copy(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite links."""
    name = page.file.src_uri
    if name.startswith("source/"):
        return rewrite_links(markdown, ROOT / name.removeprefix("source/"), name)
    return rewrite_links(markdown, ROOT / "README.md" if name == START else DOCS / name, name)


def on_page_content(html: str, **_: object) -> str:
    """Make a link of each role in a docstring, e.g. ``:func:`wn_rl.networks.build_q_network```."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        module, _, defined = name.rpartition(".")
        # A package's page has no entry for what its own __init__.py defines.
        in_package = _file(module).name == "__init__.py" and defined in _definitions(module)
        known = name.split(".")[0] in SOURCES and not _is_short(name) and not in_package
        return _reference(name if _file(name).exists() else _defined(name), name, optional=not known)

    return _ROLE.sub(link, html)
