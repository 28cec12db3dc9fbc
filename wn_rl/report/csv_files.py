"""The numbers of a report as CSV files: those of its tables, and those that its figures were drawn from."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wn_rl.report.bands import Curve, meaning
from wn_rl.report.diagnostics_panels import FROM_EVENTS, FROM_FILES, curve_of
from wn_rl.report.figures import Panel, plain
from wn_rl.report.results import RunResult, names_of
from wn_rl.report.summary import GroupRow, differences, group_rows, last_mean
from wn_rl.runs.directory import EVALUATION_COLUMNS

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


def tables(
    runs: Sequence[RunResult],
    by: str,
    panels: Sequence[tuple[str, str, Panel]],
    events: Sequence[Mapping[str, Curve]],
) -> dict[str, str]:
    """Return the CSV files by name. An empty cell: not known, or none.

    Args:
        runs: at least one.
        by: configuration key whose values are the groups; a column of its name holds them.
        panels: (game, quantity, panel) of every figure.
        events: of each run its TensorBoard scalars by tag.
    """
    names = names_of(runs)
    whose = [(name, run.config.game, run.group(by), run.config.seed) for name, run in zip(names, runs, strict=True)]
    of_run = ("run", "game", by, "seed")
    evaluations = [
        (*one, *(run.evaluations[column][index] for column in EVALUATION_COLUMNS))
        for one, run in zip(whose, runs, strict=True)
        for index in range(len(run.frames))
    ]
    keys = [(key, group, value) for key, found in differences(runs, by) for group in found for value in found[group]]
    return {
        "data/scores.csv": _csv(("game", by, *_SCORE_COLUMNS), map(_score_row, group_rows(runs, by))),
        "data/runs.csv": _csv(
            (*of_run, *_RUN_COLUMNS), [(*one, *_run_row(run)) for one, run in zip(whose, runs, strict=True)]
        ),
        "data/evaluations.csv": _csv((*of_run, *EVALUATION_COLUMNS), evaluations),
        "data/curves.csv": _csv(
            ("game", "quantity", by, "seeds", "band", "frames", "mean", "low", "high"), _band_rows(panels)
        ),
        "data/diagnostics.csv": _csv((*of_run, "quantity", "frames", "value"), _diagnostic_rows(whose, runs, events)),
        "data/differences.csv": _csv(("key", by, "value"), keys),
    }


def _score_row(row: GroupRow) -> tuple[Any, ...]:
    scores = [value for one in (row.best, row.final, row.last) for value in (one.mean, one.low, one.high)]
    known = row.published
    published = (known.paper_normal, known.paper_wn, known.mnih) if known else (None, None, None)
    frames = max(run.trained_frames for run in row.runs)
    count = len(row.runs)
    return (
        row.game, row.group, count, meaning(count), frames, *scores, row.human, *published, row.random_score,
        row.human_score,
    )  # fmt: skip


def _run_row(run: RunResult) -> tuple[Any, ...]:
    return (
        run.trained_frames, run.best, run.best_frames, run.final, last_mean(run), len(run.scores), run.config.num_envs,
        run.number("wall_seconds"), run.number("frames_per_second"), run.text("device"), run.text("precision"),
        run.finished, run.test,
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
    whose: Sequence[tuple[Any, ...]], runs: Sequence[RunResult], events: Sequence[Mapping[str, Curve]]
) -> Iterable[tuple[Any, ...]]:
    for one, run, scalars in zip(whose, runs, events, strict=True):
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
