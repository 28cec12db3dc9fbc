"""Rebuild tables and figures of docs/reproduction.md: ``python -m wn_rl.report.reproduction docs/results --out docs``.

Prose is written by hand. What stands between the lines ``<!-- generated: NAME -->`` and ``<!-- end -->`` is generated
from the runs' files alone. ``--check`` writes nothing and fails where the page does not say what the files say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from wn_rl.atari.games import find_game
from wn_rl.errors import WnRlError, one_line
from wn_rl.report import figures
from wn_rl.report.experiment_grid import GAMES, Configuration, ExperimentGrid, read_grid
from wn_rl.report.figures import Panel, Series
from wn_rl.report.published import PAPER_GAME
from wn_rl.report.reproduction_tables import blocks, configurations_with_runs, figure_name, references_of
from wn_rl.report.run_data import RunResult
from wn_rl.report.statistics import Curve, meaning
from wn_rl.runs.directory import write_file

_BEGIN = re.compile(r"^<!-- generated: ([\w-]+) -->$")
_END = "<!-- end -->"


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with the content of every generated part replaced.

    Args:
        page: Markdown.
        blocks: the content of each part by name, without the lines of the markers.

    Raises:
        WnRlError: a part has no end, occurs twice or not at all, or is not in ``blocks``.
    """
    lines: list[str] = []
    seen: list[str] = []
    inside = False
    for number, line in enumerate(page.split("\n"), 1):
        begin = _BEGIN.match(line)
        if begin is not None:
            name = begin[1]
            if inside or name in seen:
                raise WnRlError(f"line {number}: '{line}' is inside another part, or occurs a second time")
            if name not in blocks:
                raise WnRlError(f"line {number}: there is no part '{name}'; there are: {', '.join(blocks)}")
            seen.append(name)
            inside = True
            lines += [line, "", *blocks[name].strip("\n").split("\n"), ""]
        elif line == _END:
            if not inside:
                raise WnRlError(f"line {number}: '{line}' without a generated part before it")
            inside = False
        if not inside:
            lines.append(line)
    if inside:
        raise WnRlError(f"part '{seen[-1]}' has no end: add a line '{_END}'")
    if missing := [name for name in blocks if name not in seen]:
        raise WnRlError(f"the page has no part '{missing[0]}': add a line '<!-- generated: {missing[0]} -->'")
    return "\n".join(lines)


def differing(old: str, new: str) -> list[str]:
    """Return the names of the parts in which two pages with the same markers differ."""
    return [name for name, text in _parts(new).items() if _parts(old).get(name) != text]


def _parts(page: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    name: str | None = None
    for line in page.split("\n"):
        begin = _BEGIN.match(line)
        if begin is not None:
            name = begin[1]
            parts[name] = ""
        elif line == _END:
            name = None
        elif name is not None:
            parts[name] += line + "\n"
    return parts


PAGE = "reproduction.md"
WIDTH, HEIGHT = 6.4, 4.0
"""Of a figure, inches."""


def draw(grid: ExperimentGrid) -> dict[str, bytes]:
    """Return the figures as PNG files by name, one per game that has a run.

    Raises:
        WnRlError: matplotlib is missing.
    """
    files = {}
    for game in GAMES:
        configurations = configurations_with_runs(grid, game)
        if not configurations:
            continue
        series = tuple(
            Series(configuration.group, tuple(Curve(run.frames, run.scores) for run in runs))
            for configuration, runs in configurations.items()
        )
        random_score = find_game(game).random_score
        level = None if random_score is None else ("random play", random_score)
        # Dopamine's are training returns with sticky actions: in the table, but not in a figure of evaluation returns.
        shown = tuple(curve for curve in references_of(game) if not curve.source.startswith("dopamine"))
        panel = Panel(find_game(game).title, "evaluation return (raw points)", series, level, shown)
        styles = figures.styles_of([one.group for one in series])
        drawing = figures.draw([panel], styles, _caption(configurations), width=WIDTH, height=HEIGHT)
        files[figure_name(game)] = drawing.render("png")
    return files


def _caption(configurations: Mapping[Configuration, Sequence[RunResult]]) -> str:
    bands = "; ".join(f"{configuration.group}: {meaning(len(runs))}" for configuration, runs in configurations.items())
    game = next(iter(configurations)).game
    theirs = " The paper's curve is one run, digitized (±10 points)." if game == PAPER_GAME else ""
    return (
        "Mean return of the episodes completed in 125,000 agent steps at ε 0.05, after every epoch of 1M frames. "
        f"{bands}. Gray: nnabla-rl, mean and range of three seeds.{theirs}"
    )


# --- the command -------------------------------------------------------------------------------------------------


def rebuilt(page: Path, grid: ExperimentGrid) -> tuple[str, str]:
    """Return a page as it is and as it should be.

    Raises:
        WnRlError: it cannot be read, or its markers are wrong.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise WnRlError(f"cannot read {page}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WnRlError(f"{page} is no text in UTF-8") from None
    try:
        return old, fill(old, blocks(grid))
    except WnRlError as error:
        raise WnRlError(f"{page}: {error}") from None


def check(results: Path, out: Path) -> None:
    """Check that the page says what the runs' files say, and that its figures are there.

    Raises:
        WnRlError: it does not, and in which parts.
    """
    grid = read_grid(results)
    page = out / PAGE
    old, new = rebuilt(page, grid)
    again = f"python -m wn_rl.report.reproduction {results} --out {out}"
    if old != new:
        parts = ", ".join(differing(old, new)) or "the markers' lines"
        raise WnRlError(f"{page} does not say what the files in {results} say ({parts}): run {again}")
    for game in GAMES:
        if configurations_with_runs(grid, game) and not (out / figure_name(game)).is_file():
            raise WnRlError(f"{out / figure_name(game)} is missing: run {again}")


def rebuild(results: Path, out: Path) -> list[Path]:
    """Rebuild the page's tables and its figures; returns the files that were written.

    Raises:
        WnRlError: a run's files or the page cannot be read or written, or matplotlib is missing.
    """
    grid = read_grid(results)
    page = out / PAGE
    _, text = rebuilt(page, grid)
    files: dict[Path, str | bytes] = {out / name: data for name, data in draw(grid).items()}
    files[page] = text
    for path, content in files.items():
        write_file(path, content)
    return list(files)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wn_rl.report.reproduction", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", type=Path, help="directory of run directories, searched as a whole")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"directory of {PAGE} and its figures")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    wanted = parser.parse_args(arguments)
    try:
        if wanted.check:
            check(wanted.results, wanted.out)
            print(f"{wanted.out / PAGE} says what the files in {wanted.results} say")
        else:
            for path in rebuild(wanted.results, wanted.out):
                print(f"wrote {path}")
    except WnRlError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
