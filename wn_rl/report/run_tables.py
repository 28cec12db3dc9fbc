"""The tables of a report: scores per game and group, one row per run, keys in which runs differ; and its CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig
from wn_rl.evaluation.comparison import apart, differing_keys
from wn_rl.report.figures import Panel, plain
from wn_rl.report.learning_curves import FROM_EVENTS, FROM_FILES, curve_of
from wn_rl.report.published import PUBLISHED, Published
from wn_rl.report.run_data import RunResult, games_of, groups_of, names_of
from wn_rl.report.statistics import Curve, Interval, interval, meaning
from wn_rl.runs.directory import EVALUATION_COLUMNS

EXPECTED_TO_DIFFER = ("seed", "run_dir", "game")
"""Configuration keys that are expected to differ."""
LAST = 5
"""Evaluations at the end of a run whose mean is shown too: it is less noisy than the final evaluation."""


@dataclass(frozen=True)
class GroupRow:
    """One group on one game.

    Attributes:
        game: its name.
        group: label of the group.
        runs: of it.
        best: highest mean score of one evaluation of each run, over the runs; points.
        final: mean score of the last evaluation, likewise.
        last: mean of the last :data:`LAST` evaluations, likewise.
        human_normalized: ``final`` on the scale random play = 0, human = 1; None if these scores are not known.
        published: scores of the paper and of Mnih et al. 2015, where there are any.
        random_score: of random play, points, where known.
        human_score: of a human, points, where known.
    """

    game: str
    group: str
    runs: tuple[RunResult, ...]
    best: Interval
    final: Interval
    last: Interval
    human_normalized: float | None
    published: Published | None
    random_score: float | None
    human_score: float | None

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in order."""
        return sorted(run.config.seed for run in self.runs)


def last_mean(run: RunResult) -> float:
    """Return the mean of a run's last :data:`LAST` evaluations, or of all where there are fewer."""
    return float(run.scores[-LAST:].mean())


def group_rows(runs: Sequence[RunResult], by: str) -> list[GroupRow]:
    """Return a row for each group on each game, games in alphabetical order and the baseline first."""
    rows = []
    for name in games_of(runs):
        game = find_game(name)
        of_game = [run for run in runs if run.config.game == name]
        for group in groups_of(of_game, by):
            members = tuple(run for run in of_game if run.group(by) == group)
            final = interval([run.final for run in members])
            rows.append(
                GroupRow(
                    name,
                    group,
                    members,
                    interval([run.best for run in members]),
                    final,
                    interval([last_mean(run) for run in members]),
                    game.human_normalized(final.mean),
                    PUBLISHED.get(name),
                    game.random_score,
                    game.human_score,
                )
            )
    return rows


def differences(runs: Sequence[RunResult], by: str) -> list[tuple[str, dict[str, list[str]]]]:
    """Return the configuration keys, beside seed and game, whose values are not the same in all runs.

    Returns:
        (key, values by group as text, each once and in order of appearance), keys in the configuration's order.
    """
    found = []
    for key in (entry.name for entry in fields(TrainConfig)):
        if key in EXPECTED_TO_DIFFER or len({str(getattr(run.config, key)) for run in runs}) < 2:
            continue
        values: dict[str, list[str]] = {group: [] for group in groups_of(runs, by)}
        for run in runs:
            value = str(getattr(run.config, key))
            if value not in values[run.group(by)]:
                values[run.group(by)].append(value)
        found.append((key, values))
    return found


def warnings(rows: Sequence[GroupRow]) -> list[str]:
    """Return warnings about comparing the rows, one sentence each."""
    found = []
    for row in rows:
        where = f"{row.game}, {row.group}"
        if keys := differing_keys([run.config for run in row.runs]):
            found.append(f"{where}: the runs differ in more than the seed: {', '.join(keys)}.")
        if apart({int(run.trained_frames) for run in row.runs}) and "frames" not in keys:
            found.append(f"{where}: the runs were trained for different numbers of frames.")
        if len(set(row.seeds)) < len(row.seeds):
            found.append(f"{where}: a seed occurs more than once, so not all of these runs are independent.")
        if unfinished := sum(not run.finished for run in row.runs):
            found.append(f"{where}: {unfinished} of {len(row.runs)} runs not finished.")
    for game in dict.fromkeys(row.game for row in rows):
        of_game = [row for row in rows if row.game == game]
        if len({len(row.runs) for row in of_game}) > 1:
            counts = ", ".join(f"{row.group} {len(row.runs)}" for row in of_game)
            found.append(f"{game}: the groups have different numbers of seeds ({counts}).")
        frames = [max(run.trained_frames for run in row.runs) for row in of_game]
        if apart({int(one) for one in frames}):
            found.append(f"{game}: the groups were trained for different numbers of frames.")
        if len({run.evaluation_protocol for row in of_game for run in row.runs}) > 1:
            found.append(f"{game}: the runs were evaluated under different protocols.")
    single = [row for row in rows if len(row.runs) == 1]
    if single:
        everything = "every group" if len(single) == len(rows) else "some groups"
        found.append(f"One seed in {everything}: a difference between single runs is no evidence about a method.")
    compared = [run for row in rows if row.published for run in row.runs]
    if compared and not any(run.evaluated_as_the_paper for run in compared):
        found.append(
            "No run here was evaluated under the paper's protocol (125,000 agent steps at ε 0.05, no frame cap): the "
            "published scores give the scale only; they cannot be compared directly."
        )
    return found


_SCORES = ("best", "final", "last_5")
_SCORE_COLUMNS = (
    "seeds",
    "band",
    "frames",
    *(f"{score}{end}" for score in _SCORES for end in ("", "_low", "_high")),
    "human_normalized",
    "paper_normal",
    "paper_wn",
    "mnih",
    "random",
    "human",
)
_RUN_COLUMNS = (
    "frames",
    "best",
    "best_frames",
    "final",
    "last_5",
    "evaluations",
    "num_envs",
    "wall_seconds",
    "frames_per_second",
    "hardware",
    "precision",
    "finished",
    "evaluation",
)


def csv_files(
    runs: Sequence[RunResult],
    by: str,
    panels: Sequence[tuple[str, str, Panel]],
    events: Sequence[Mapping[str, Curve]],
) -> dict[str, str]:
    """Return the CSV files of a report by name; an empty cell means not known, or none.

    Args:
        runs: at least one.
        by: configuration key whose values are the groups; a column of its name holds them.
        panels: (game, quantity, panel) of every figure.
        events: of each run its TensorBoard scalars by tag.
    """
    names = names_of(runs)
    keys_of_runs = [
        (name, run.config.game, run.group(by), run.config.seed) for name, run in zip(names, runs, strict=True)
    ]
    of_run = ("run", "game", by, "seed")
    evaluations = [
        (*one, *(run.evaluations[column][index] for column in EVALUATION_COLUMNS))
        for one, run in zip(keys_of_runs, runs, strict=True)
        for index in range(len(run.frames))
    ]
    keys = [(key, group, value) for key, found in differences(runs, by) for group in found for value in found[group]]
    return {
        "data/scores.csv": _csv(("game", by, *_SCORE_COLUMNS), map(_score_row, group_rows(runs, by))),
        "data/runs.csv": _csv(
            (*of_run, *_RUN_COLUMNS), [(*one, *_run_row(run)) for one, run in zip(keys_of_runs, runs, strict=True)]
        ),
        "data/evaluations.csv": _csv((*of_run, *EVALUATION_COLUMNS), evaluations),
        "data/curves.csv": _csv(
            ("game", "quantity", by, "seeds", "band", "frames", "mean", "low", "high"), _band_rows(panels)
        ),
        "data/diagnostics.csv": _csv(
            (*of_run, "quantity", "frames", "value"), _diagnostic_rows(keys_of_runs, runs, events)
        ),
        "data/differences.csv": _csv(("key", by, "value"), keys),
    }


def _score_row(row: GroupRow) -> tuple[Any, ...]:
    scores = [value for one in (row.best, row.final, row.last) for value in (one.mean, one.low, one.high)]
    known = row.published
    published = (known.paper_normal, known.paper_wn, known.mnih) if known else (None, None, None)
    frames = max(run.trained_frames for run in row.runs)
    count = len(row.runs)
    return (
        row.game, row.group, count, meaning(count), frames, *scores, row.human_normalized, *published, row.random_score,
        row.human_score,
    )  # fmt: skip


def _run_row(run: RunResult) -> tuple[Any, ...]:
    return (
        run.trained_frames, run.best, run.best_frames, run.final, last_mean(run), len(run.scores), run.config.num_envs,
        run.number("wall_seconds"), run.number("frames_per_second"), run.text("device"), run.text("precision"),
        run.finished, run.evaluation_protocol,
    )  # fmt: skip


def _band_rows(panels: Sequence[tuple[str, str, Panel]]) -> Iterable[tuple[Any, ...]]:
    for game, quantity, panel in panels:
        for series in panel.series:
            band = series.band
            for index in range(len(band.frames)):
                low = None if band.low is None else band.low[index]
                high = None if band.high is None else band.high[index]
                where = (game, quantity, series.group, band.runs, meaning(band.runs))
                yield (*where, band.frames[index], band.mean[index], low, high)


def _diagnostic_rows(
    keys_of_runs: Sequence[tuple[Any, ...]], runs: Sequence[RunResult], events: Sequence[Mapping[str, Curve]]
) -> Iterable[tuple[Any, ...]]:
    for one, run, scalars in zip(keys_of_runs, runs, events, strict=True):
        longest = max(1.0, *(other.trained_frames for other in runs if other.config.game == run.config.game))
        for quantity in (*FROM_FILES, *FROM_EVENTS):
            if (curve := curve_of(quantity, run, scalars, longest)) is not None:
                for frames, value in zip(curve.frames, curve.values, strict=True):
                    yield (*one, quantity.key, frames, value)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(cell) for cell in row])
    return stream.getvalue()


def _cell(cell: object) -> object:
    if isinstance(cell, float):
        return f"{cell:.10g}"
    return plain(cell) if isinstance(cell, str) else cell
