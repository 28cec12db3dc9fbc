"""A report's directory: the page, the figures as PNG and SVG, and the CSV files that they were made from."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wn_rl import cli
from wn_rl.errors import Failure, UsageError, WnRlError
from wn_rl.report import figures, learning_curves, page, run_data, run_tables
from wn_rl.report.figures import Drawing, Panel, Style
from wn_rl.report.run_data import RunResult, find_runs, games_of, groups_of, names_of, read_runs, read_scalars
from wn_rl.report.statistics import WINDOW, Curve
from wn_rl.runs.directory import write_file

INDEX = "index.html"
MANIFEST = "files.json"
"""Lists the files of a report, so that the next report in the same directory can delete those it no longer writes."""
LARGE = (4.0, 2.9)
SMALL = (3.7, 2.6)
"""Sizes of the page's figures, width and height in inches: narrow, so that the text is readable on a phone."""


def report_command(
    names: Sequence[str],
    *,
    report: Path | None = None,
    curves_file: Path | None = None,
    by: str = "param",
    window: int = WINDOW,
) -> int:
    """Write the report or the figure of learning curves, or both, and say so; return the exit code.

    A run that cannot be read is one line on standard error; the others are shown all the same, and the exit code is 1.

    Args:
        names: runs, directories of runs, patterns.
        report: directory of the report.
        curves_file: file of the figure.
        by: configuration key whose values are the groups.
        window: evaluations in the running mean.

    Raises:
        UsageError: the directory holds something else, or the file has another ending.
        WnRlError: matplotlib is missing, no run can be read, or something cannot be written.
    """
    if curves_file is not None:
        learning_curves.file_format(curves_file)
    if report is not None:
        check_directory(report)
    figures.check_installed()
    found = find_runs(names)
    if told := found.describe("run"):
        print(told)
    runs, failures = read_runs(found.paths)
    for failure in failures:
        cli.complain(failure.message)
    if not runs:
        return failures[0].exit_code if len(failures) == 1 else 1
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    if curves_file is not None:
        learning_curves.write_curves(runs, curves_file, by, window)
        print(f"wrote {curves_file}: {count}")
    problems: list[str] = []
    if report is not None:
        problems = write_report(runs, failures, report, by=by, window=window)
        for problem in problems:
            cli.complain(problem)
        print(f"wrote {report / INDEX}: {count}")
    return 1 if failures or problems else 0


def check_directory(directory: Path) -> None:
    """Check that a report may be written into a directory: there is none, it is empty, or it holds a report.

    Raises:
        UsageError: it holds something else, is no directory, or cannot be written.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"--report {directory}: a file is in the way; name a directory")
        if directory.is_dir():
            if any(directory.iterdir()) and not _is_ours(directory):
                raise UsageError(f"--report {directory}: it is not empty and holds no report; name another directory")
            tempfile.TemporaryFile(dir=directory).close()
            return
        parent = next(one for one in directory.absolute().parents if one.exists())
        if not parent.is_dir():
            raise UsageError(f"--report {directory}: {parent} is a file; name another directory")
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UsageError(f"--report {directory}: cannot write there: {error.strerror}") from None


def write_report(
    runs: Sequence[RunResult], failures: Sequence[Failure], directory: Path, *, by: str, window: int
) -> list[str]:
    """Write a report about runs; return a line for each thing that could not be read.

    Each file is replaced at once, the page last, so that an earlier report's page stays whole until the new one is.

    Args:
        runs: at least one.
        failures: runs that the page names as left out.
        directory: see :func:`check_directory`.
        by: configuration key whose values are the groups.
        window: evaluations in the running mean.

    Raises:
        WnRlError: matplotlib is missing, or a file cannot be written.
    """
    events, problems = _events(runs)
    content = page.Content(runs, by, failures, problems=problems)
    content.videos, content.videos_left_out = run_data.find_videos(runs)
    names = names_of(runs)
    content.without_events = [name for name, scalars in zip(names, events, strict=True) if not scalars]
    styles = figures.styles_of(groups_of(runs, by))
    files: dict[str, str | bytes] = {}
    bands: list[tuple[str, str, Panel]] = []
    for game in games_of(runs):
        panel = learning_curves.evaluation_panel(game, runs, by, window)
        of_game = [run for run in runs if run.config.game == game]
        caption = learning_curves.caption(of_game, [panel], window)
        content.curves.append(_figure(game, f"scores-{game}", panel, caption, styles, files, len(files), LARGE))
        bands.append((game, "evaluation_return", panel))
        for quantity, inner in learning_curves.diagnostic_panels(game, runs, by, events):
            name = f"{game}-{quantity.key.replace('/', '-')}"
            caption = f"{quantity.title}: {quantity.meaning}."
            figure = _figure(game, name, inner, caption, styles, files, len(files), SMALL)
            content.diagnostics.append(figure)
            bands.append((game, quantity.key, inner))
    files |= run_tables.csv_files(runs, by, bands, events)
    content.files = [*files, MANIFEST]
    _write(directory, files, page.render(content))
    return problems


def _events(runs: Sequence[RunResult]) -> tuple[list[dict[str, Curve]], list[str]]:
    events: list[dict[str, Curve]] = []
    problems: list[str] = []
    for run in runs:
        try:
            events.append(read_scalars(run.path))
        except WnRlError as error:  # noqa: PERF203 - one run's damaged file costs no other its figures
            events.append({})
            problems.append(str(error))
    return events, problems


def _figure(
    game: str,
    name: str,
    panel: Panel,
    caption: str,
    styles: Mapping[str, Style],
    files: dict[str, str | bytes],
    number: int,
    size: tuple[float, float],
) -> page.PageFigure:
    """Draw a figure into ``files`` and return what the page shows of it."""
    drawing: Drawing = figures.draw([panel], styles, caption, width=size[0], height=size[1])
    svg = drawing.render("svg")
    files[f"figures/{name}.svg"] = svg
    files[f"figures/{name}.png"] = drawing.render("png")
    title = f"{panel.title} over emulator frames, {game}"
    return page.PageFigure(game, name, figures.inline_svg(svg, number, title, below=drawing.caption_height), caption)


def _is_ours(directory: Path) -> bool:
    """Return whether the directory holds a report, or the beginning of one that was interrupted."""
    try:
        with open(directory / INDEX, "rb") as stream:
            return f'name="generator" content="{page.GENERATOR}"'.encode() in stream.read(1000)
    except FileNotFoundError:
        return _stored_manifest(directory).get("generator") == page.GENERATOR
    except OSError:
        return False


def _write(directory: Path, files: Mapping[str, str | bytes], index: str) -> None:
    """Write the files, then the page, and delete files of an earlier report that this one does not write.

    If the directory held no report and this one is interrupted, or the disk is full, nothing is left.
    """
    before = _manifest(directory)
    first = not (directory / INDEX).exists()
    folders = [directory / "data", directory / "figures", directory, *directory.absolute().parents]
    made = [folder for folder in folders if not folder.exists()]
    try:
        for folder in ("figures", "data"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        # First: if this process is killed, the next report recognizes the directory and knows what to delete.
        _write_manifest(directory, [*files, *sorted(before - files.keys())])
        for name, value in files.items():
            write_file(directory / name, value, sync=False)
        write_file(directory / INDEX, index)
        for name in before - files.keys():
            (directory / name).unlink(missing_ok=True)
        _write_manifest(directory, list(files))
    except BaseException as error:
        if first:
            _delete([directory / name for name in (*files, MANIFEST, INDEX)], made)
        if isinstance(error, OSError):
            raise WnRlError(f"cannot write to {directory}: {error.strerror}") from None
        raise


def _write_manifest(directory: Path, names: list[str]) -> None:
    content = json.dumps({"generator": page.GENERATOR, "files": names}, indent=1) + "\n"
    write_file(directory / MANIFEST, content, sync=False)


def _delete(files: Sequence[Path], folders: Sequence[Path]) -> None:
    """Remove files, then folders as far as they are empty."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _manifest(directory: Path) -> set[str]:
    """Return the names of the files in ``figures/`` and ``data/`` that an earlier report wrote."""
    try:
        return {
            name
            for name in _stored_manifest(directory)["files"]
            if Path(name).parts[:-1] in (("figures",), ("data",)) and (directory / name).is_file()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _stored_manifest(directory: Path) -> dict[str, Any]:
    try:
        value = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
