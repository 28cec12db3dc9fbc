"""Learning curves as panels over emulator frames: evaluation return, and diagnostics of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wn_rl.atari.games import find_game
from wn_rl.errors import UsageError
from wn_rl.report import figures
from wn_rl.report.figures import Format, Panel, Series
from wn_rl.report.published import PAPER_GAME, PAPER_SOURCE, paper_curves
from wn_rl.report.run_data import RunResult, games_of, groups_of
from wn_rl.report.statistics import WINDOW, Curve, binned, meaning
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
    panels = [evaluation_panel(game, runs, by, window) for game in games_of(runs)]
    width = 4.4 if len(panels) == 1 else 3.5  # a row of three is as wide as a page
    styles = figures.styles_of(groups_of(runs, by))
    drawing = figures.draw(panels, styles, caption(runs, panels, window), width=width, height=0.7 * width + 0.3)
    write_file(out, drawing.render(kind))


def score_curve(run: RunResult) -> Curve:
    """Return a run's mean evaluation return over emulator frames."""
    return Curve(run.frames, run.scores)


def evaluation_panel(game: str, runs: Sequence[RunResult], by: str, window: int) -> Panel:
    """Return the panel of one game with random play and, where the paper shows it, the paper's curve."""
    of_game = [run for run in runs if run.config.game == game]
    series = []
    for group in groups_of(of_game, by):
        raw = tuple(score_curve(run) for run in of_game if run.group(by) == group)
        dots = raw if len(raw) == 1 and raw[0].window(window) > 1 else ()
        series.append(Series(group, tuple(curve.smoothed(window) for curve in raw), dots))
    random_score = find_game(game).random_score
    level = None if random_score is None else ("random play", random_score)
    return Panel(game, "evaluation return (points)", tuple(series), level, paper_curves() if game == PAPER_GAME else ())


def caption(runs: Sequence[RunResult], panels: Sequence[Panel], window: int) -> str:
    """Return the caption: numbers of seeds, what line and band are, the evaluation protocol."""
    counts = sorted({len(series.curves) for panel in panels for series in panel.series})
    several = counts[-1] > 1
    sentences = [f"Evaluation return over training. {_seeds(counts)}."]
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
    protocols = list(dict.fromkeys(run.evaluation_protocol for run in runs))
    presets = sorted({run.config.preset for run in runs})
    sentences.append(f"Each evaluation: {protocols[0]}." if len(protocols) == 1 else "Evaluations differ between runs.")
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


BINS = 40
"""Bins of frames over which the returns of training episodes are averaged."""
FINE_BINS = 300
"""Curves with more points are downsampled to this number of bins, so that a page of long runs stays small."""


@dataclass(frozen=True)
class Quantity:
    """A diagnostic: its key in files, and its name, unit and meaning for a reader."""

    key: str
    title: str
    unit: str
    meaning: str


FROM_FILES = (
    Quantity(
        "training_return",
        "Training return",
        "points",
        f"mean raw return of the training episodes that ended in each {BINS}th of the longest run (episodes.csv)",
    ),
    Quantity(
        "evaluation_length",
        "Length of evaluation episodes",
        "agent steps",
        "mean length of an evaluation's episodes (evaluations.csv)",
    ),
)
"""From the CSV files, which every run directory holds."""
FROM_EVENTS = (
    Quantity(
        "train/max_q_held_out",
        "Max-Q on held-out states",
        "clipped reward",
        "mean over a fixed set of states of the largest Q-value",
    ),
    Quantity("train/loss", "Loss", "Huber loss", "mean Huber loss per transition since the point before"),
    Quantity("train/gradient_norm", "Gradient norm", "2-norm", "2-norm of the last update's gradient"),
    Quantity(
        "diagnostics/overestimation",
        "Overestimation",
        "clipped reward",
        "max-Q minus the discounted clipped return that followed, mean over the states of an evaluation",
    ),
    Quantity(
        "layers/hidden/effective_learning_rate",
        "Effective learning rate, hidden layer",
        "‖Δw‖ / ‖w‖",
        "relative change of the dense hidden layer's weight w in one update",
    ),
    Quantity("layers/hidden/g_mean", "Scale g, hidden layer", "mean |g|", "mean of |g| over the dense layer's units"),
    Quantity(
        "layers/hidden/v_norm",
        "Norm of v, hidden layer",
        "‖v‖",
        "2-norm of the v behind w, all units together",
    ),
    Quantity(
        "diagnostics/dormant_fraction",
        "Dormant units",
        "fraction",
        "hidden units whose mean activation is at most 0.025 of their layer's (Sokar et al. 2023)",
    ),
    Quantity("diagnostics/srank", "Effective rank of the features", "singular values", "δ 0.01 (Kumar et al. 2021)"),
    Quantity(
        "diagnostics/q_noise_across_minibatches",
        "Noise of a Q-value across minibatches",
        "clipped reward",
        "standard deviation of a state's Q-value over minibatches that it may be in",
    ),
)
"""From TensorBoard events, if the run wrote them; docs/monitoring.md has the definitions."""


def curve_of(quantity: Quantity, run: RunResult, events: Mapping[str, Curve], longest: float) -> Curve | None:
    """Return one diagnostic of one run, or None where its files do not hold it.

    Args:
        quantity: which one.
        run: its files.
        events: its scalars by tag.
        longest: emulator frames of the longest run that it stands beside, so that seeds share their bins.
    """
    if quantity.key == "evaluation_length":
        return Curve(run.frames, run.evaluations["mean_length"])
    if quantity.key == "training_return":
        return binned(run.episodes["frames"], run.episodes["return"], longest, BINS)
    return events.get(quantity.key)


def _downsampled(curve: Curve, longest: float) -> Curve:
    if len(curve.frames) <= FINE_BINS:
        return curve
    return binned(curve.frames, curve.values, longest, FINE_BINS) or curve


def diagnostic_panels(
    game: str, runs: Sequence[RunResult], by: str, events: Sequence[Mapping[str, Curve]]
) -> list[tuple[Quantity, Panel]]:
    """Return a panel for each diagnostic that at least one run of the game has.

    Args:
        game: its name.
        runs: of all games.
        by: configuration key whose values are the groups.
        events: of each run its scalars by tag.
    """
    of_game = [(run, scalars) for run, scalars in zip(runs, events, strict=True) if run.config.game == game]
    longest = max(1.0, *(run.trained_frames for run, _ in of_game))
    panels = []
    for quantity in (*FROM_FILES, *FROM_EVENTS):
        series = []
        for group in groups_of([run for run, _ in of_game], by):
            curves = [curve_of(quantity, run, scalars, longest) for run, scalars in of_game if run.group(by) == group]
            if known := tuple(_downsampled(curve, longest) for curve in curves if curve is not None):
                series.append(Series(group, known))
        if series:
            panels.append((quantity, Panel(quantity.title, quantity.unit, tuple(series))))
    return panels
