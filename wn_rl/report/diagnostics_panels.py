"""What went on inside the runs, as panels: from TensorBoard's events where there are any, and from the CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wn_rl.report.bands import Array, Curve
from wn_rl.report.curves import groups_of
from wn_rl.report.figures import Panel, Series
from wn_rl.report.results import RunResult

BINS = 40
"""Stretches of frames over which training games are averaged."""
FINE_BINS = 300
"""Stretches over which curves with more points than that are averaged, so that a page of long runs stays small."""


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
        f"mean raw return of the training games that ended in each {BINS}th of the longest run (episodes.csv)",
    ),
    Quantity(
        "test_length",
        "Length of test games",
        "agent steps",
        "mean length of an evaluation's games (evaluations.csv)",
    ),
)
"""What every run directory holds."""
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
"""What TensorBoard's events hold where the run wrote them; docs/monitoring.md has the definitions."""


def curve_of(quantity: Quantity, run: RunResult, events: Mapping[str, Curve], longest: float) -> Curve | None:
    """Return one diagnostic of one run, or None where its files do not hold it.

    Args:
        quantity: which one.
        run: its files.
        events: its scalars by tag.
        longest: emulator frames of the longest run that it stands beside, so that seeds share their bins.
    """
    if quantity.key == "test_length":
        return Curve(run.frames, run.evaluations["mean_length"])
    if quantity.key == "training_return":
        return binned(run.episodes["frames"], run.episodes["return"], longest, BINS)
    return events.get(quantity.key)


def _thinned(curve: Curve, longest: float) -> Curve:
    if len(curve.frames) <= FINE_BINS:
        return curve
    return binned(curve.frames, curve.values, longest, FINE_BINS) or curve


def binned(frames: Array, values: Array, longest: float, count: int) -> Curve | None:
    """Return the mean of ``values`` in each of ``count`` stretches of (0, longest] that has any, at its middle.

    None where there are no values. A value at the very end belongs to the last stretch, one at 0 to the first.
    """
    if not len(frames):
        return None
    bins = np.clip(np.ceil(frames * (count / longest)).astype(np.int64) - 1, 0, count - 1)
    found, place = np.unique(bins, return_inverse=True)
    means: Array = np.bincount(place, values) / np.bincount(place)
    return Curve((found.astype(np.float64) + 0.5) * (longest / count), means)


def panels_of(
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
            if known := tuple(_thinned(curve, longest) for curve in curves if curve is not None):
                series.append(Series(group, known))
        if series:
            panels.append((quantity, Panel(quantity.title, quantity.unit, tuple(series))))
    return panels
