"""Learning curves of runs: test score over emulator frames, a mean and a band per group, one panel per game."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wn_rl.atari.games import find_game
from wn_rl.errors import UsageError
from wn_rl.report import figures
from wn_rl.report.bands import WINDOW, Curve, meaning
from wn_rl.report.figures import Format, Panel, Series
from wn_rl.report.references import PAPER_GAME, PAPER_SOURCE, paper_curves
from wn_rl.report.results import RunResult
from wn_rl.runs.directory import write_file

FORMATS: dict[str, Format] = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def file_format(path: Path) -> Format:
    """Return the format that a file's ending names.

    Raises:
        UsageError: it is none of .png, .svg and .pdf.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: name a .png, .svg or .pdf file")
    return FORMATS[path.suffix.lower()]


def write_curves(runs: Sequence[RunResult], out: Path, by: str = "param", window: int = WINDOW) -> None:
    """Draw the learning curves of runs into a PNG, SVG or PDF file.

    Args:
        runs: at least one.
        out: the file; one that is there is replaced.
        by: configuration key whose values are the groups.
        window: evaluations in the running mean; 1 for none.

    Raises:
        UsageError: the file's ending is none of the three.
        WnRlError: matplotlib is missing, or the file cannot be written.
    """
    kind = file_format(out)
    panels = [panel_of(game, runs, by, window) for game in games_of(runs)]
    width = 4.4 if len(panels) == 1 else 3.5  # a row of three is as wide as a page
    styles = figures.styles_of(groups_of(runs, by))
    drawing = figures.draw(panels, styles, caption(runs, panels, window), width=width, height=0.7 * width + 0.3)
    write_file(out, drawing.render(kind))


def games_of(runs: Sequence[RunResult]) -> list[str]:
    """Return the games of runs in alphabetical order."""
    return sorted({run.config.game for run in runs})


def groups_of(runs: Sequence[RunResult], by: str) -> list[str]:
    """Return the groups of runs, the baseline first."""
    return figures.in_order({run.group(by) for run in runs})


def score_curve(run: RunResult) -> Curve:
    """Return a run's mean test score over emulator frames."""
    return Curve(run.frames, run.scores)


def panel_of(game: str, runs: Sequence[RunResult], by: str, window: int) -> Panel:
    """Return the panel of one game with random play and, where the paper shows it, the paper's curve."""
    of_game = [run for run in runs if run.config.game == game]
    series = []
    for group in groups_of(of_game, by):
        raw = tuple(score_curve(run) for run in of_game if run.group(by) == group)
        dots = raw if len(raw) == 1 and raw[0].window(window) > 1 else ()
        series.append(Series(group, tuple(curve.smoothed(window) for curve in raw), dots))
    random_score = find_game(game).random_score
    level = None if random_score is None else ("random play", random_score)
    return Panel(game, "test score (points)", tuple(series), level, paper_curves() if game == PAPER_GAME else ())


def caption(runs: Sequence[RunResult], panels: Sequence[Panel], window: int) -> str:
    """Return what a reader must know to read the panels: seeds, what line and band are, how was tested."""
    counts = sorted({len(series.curves) for panel in panels for series in panel.series})
    several = counts[-1] > 1
    sentences = [f"Test score over training. {_seeds(counts)}."]
    sentences.append(_line([score_curve(run).window(window) for run in runs], several=several))
    for count in dict.fromkeys(min(count, 3) for count in counts if count > 1):
        number = "n ≥ 3" if count == 3 and counts[-1] > 3 else f"n = {count}"
        sentences.append(f"Band ({number}): {meaning(count)}.")
    if several:
        sentences.append("Thin: single seeds.")
    if any(series.dots for panel in panels for series in panel.series):
        sentences.append("Dots: single evaluations.")
    if any(panel.references for panel in panels):
        sentences.append(f"Gray: {PAPER_SOURCE}.")
    tests = list(dict.fromkeys(run.test for run in runs))
    presets = sorted({run.config.preset for run in runs})
    sentences.append(f"Each evaluation: {tests[0]}." if len(tests) == 1 else "Evaluations differ between runs.")
    sentences.append(f"Preset {', '.join(presets)}.")
    return " ".join(sentences)


def _line(windows: Sequence[int], *, several: bool) -> str:
    """Return what a line is, and what its last point is, where running means are over so many evaluations."""
    least, most = min(windows), max(windows)
    over = f"{least} evaluations" if least == most else f"{least} to {most} evaluations"
    if most == 1:
        line, end = "each evaluation", "the last evaluation"
    else:
        line, end = f"running mean over {over}, a tenth of a curve at most", f"the mean of the last {over}"
    if several:
        return f"Line: mean over seeds of each seed's {line}; its last point: that of {end}."
    return f"Line: {line}; its last point: {end}."


def _seeds(counts: Sequence[int]) -> str:
    if len(counts) == 1:
        return f"n = {counts[0]} seed{'s' if counts[0] > 1 else ''} per curve"
    return f"n = {counts[0]} to {counts[-1]} seeds per curve"
