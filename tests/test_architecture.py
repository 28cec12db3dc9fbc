"""Imports run downward, as docs/architecture.md draws them: no circle, no upward arrow, no module over 500 lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors", "output"),
    ("layout",),
    ("parameterizations", "cli"),
    ("networks", "atari", "diagnostics"),
    ("replay", "sb3"),
    ("config",),
    ("machine", "runs"),
    ("evaluation",),
    ("training",),
    ("report", "video"),
    ("api", "commands"),
    ("__main__",),
)
"""Parts of wn_rl from the lowest up; one imports from those below it, and from itself."""
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the absolute name of every imported module, and whether it is imported only for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                there = ROOT / Path(*whole.split("."))
                yield (
                    (whole if there.is_dir() or there.with_suffix(".py").exists() else module),
                    id(node) in typing_only,
                )


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", modules("wn_rl"), ids=name_of)
def test_a_module_of_wn_rl_imports_only_from_below(path: Path) -> None:
    own = part_of(name_of(path))
    for module, typing_only in imports(path):
        root = module.split(".")[0]
        assert root not in ("agents", "train", "evaluate", "tests", "benchmarks"), f"{module} stands above wn_rl"
        if root != "wn_rl" or typing_only or not own or module == "wn_rl":
            continue
        assert HEIGHT[part_of(module)] < HEIGHT[own] or part_of(module) == own, f"{name_of(path)} imports {module}"


def test_parameterizations_serve_any_torch_model() -> None:
    """They import torch and nothing else of the project."""
    for path in modules("wn_rl/parameterizations"):
        for module, _ in imports(path):
            assert module.split(".")[0] != "wn_rl" or part_of(module) == "parameterizations", f"{path}: {module}"


def test_an_algorithm_knows_no_backend() -> None:
    for path in modules("agents"):
        if "backends" in path.parts:
            continue
        for module, _ in imports(path):
            assert ".backends" not in module, f"{name_of(path)} imports {module}"


def test_no_circle_of_imports() -> None:
    paths = [*modules("wn_rl"), *modules("agents")]
    # A package's own list of names imports its modules; that these know the package is no circle of theirs.
    graph = {
        name_of(path): {module for module, typing_only in imports(path) if not typing_only}
        for path in paths
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for following in sorted(graph.get(module, ())):
            if following in graph:
                visit(following, (*way, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", [*modules("wn_rl"), *modules("agents")], ids=name_of)
def test_no_module_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_algorithm_fits_on_a_few_screens() -> None:
    """agents/dqn.py is the algorithm: plain torch, under 250 lines, no word of what carries it out faster."""
    source = (ROOT / "agents" / "dqn.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 250
    code = source.split('"""', 2)[2]
    for word in ("graph", "compile", "kernel", "thread", "ctypes", "stream"):
        assert word not in code.replace("with its graph", ""), word
