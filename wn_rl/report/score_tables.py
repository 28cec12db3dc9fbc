"""Scores of trained networks as tables on the terminal, as JSON and as CSV, written while they are measured."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wn_rl import cli
from wn_rl.atari.games import find_game
from wn_rl.errors import Failure, WnRlError
from wn_rl.evaluation.comparison import Comparison, Summary, compare
from wn_rl.evaluation.scoring import How, Score, score_many
from wn_rl.evaluation.statistics import Estimate
from wn_rl.report.published import PUBLISHED, SOURCES
from wn_rl.runs.directory import versions, write_file

PIPED_WIDTH = 160
"""Characters per line if the output is not a terminal."""

CSV_COLUMNS = (
    "checkpoint",
    "kind",
    "game",
    "param",
    "preset",
    "training_seed",
    "training_frames",
    "training_num_envs",
    "protocol",
    "protocol_changed",
    "epsilon",
    "steps",
    "episodes_wanted",
    "max_frames_per_episode",
    "noop_max",
    "fire_reset",
    "sticky_actions",
    "action_set",
    "seed",
    "num_envs",
    "episodes",
    "mean",
    "low",
    "high",
    "std",
    "min",
    "max",
    "mean_length",
    "human_normalized",
    "seconds",
)
"""Columns of ``--csv``, one row per checkpoint; docs/evaluation.md explains them. An empty cell: not known, or none."""


def as_json(score: Score) -> dict[str, Any]:
    """Return the score with all episodes and everything that a comparison needs, as JSON values."""
    result, trained, protocol = score.result, score.trained, score.protocol
    interval, published = score.interval, PUBLISHED.get(trained.game)
    game = find_game(trained.game)
    return {
        "checkpoint": str(trained.path),
        "kind": trained.kind,
        "game": trained.game,
        "param": trained.param,
        "preset": trained.preset,
        "training_seed": trained.seed,
        "training_frames": trained.frames,
        "training_num_envs": trained.config.num_envs if trained.config else None,
        "protocol": {
            "name": protocol.name,
            "changed": list(protocol.changed),
            "epsilon": protocol.epsilon,
            "steps": protocol.steps,
            "episodes": protocol.episodes if protocol.steps == 0 else None,
            "max_frames_per_episode": protocol.max_frames_per_episode,
            "noop_max": protocol.noop_max,
            "fire_reset": protocol.fire_reset,
            "sticky_actions": protocol.sticky_actions,
            "action_set": protocol.action_set,
            "full_action_set": trained.full_action_set,
            "seed": score.seed,
            "num_envs": score.num_envs,
        },
        "episodes": len(result.episodes),
        "mean": result.mean,
        "interval": [interval.low, interval.high],
        "std": result.std,
        "min": float(result.scores.min()),
        "max": float(result.scores.max()),
        "mean_length": result.mean_length,
        "human_normalized": score.human_normalized,
        "references": {"random": game.random_score, "human": game.human_score}
        | (asdict(published) if published else {}),
        "seconds": result.seconds,
        "scores": [episode.score for episode in result.episodes],
        "lengths": [episode.length for episode in result.episodes],
        "completed": [episode.completed for episode in result.episodes],
        "versions": versions(),
    }


def comparison_as_json(
    scores: Sequence[Score], failures: Sequence[Failure], comparison: Comparison, by: str
) -> dict[str, Any]:
    """Return many scores with their statistics and the failures, as JSON values."""
    return {
        "scores": [as_json(score) for score in scores],
        "by": by,
        "statistics": [
            {
                "group": summary.group,
                "game": summary.game,
                "games": list(summary.games),
                "unit": "points" if summary.game else "human-normalized",
                "runs": summary.runs,
                **{name: _estimate_as_json(estimate) for name, estimate in summary.estimates.items()},
            }
            for summary in comparison.summaries
        ],
        "probability_of_improvement": [
            {
                "better": improvement.better,
                "than": improvement.than,
                "games": list(improvement.games),
                **_estimate_as_json(improvement.estimate),
            }
            for improvement in comparison.improvements
        ],
        "problems": comparison.problems,
        "notes": comparison.notes,
        "failed": [{"path": str(failure.path), "message": failure.message} for failure in failures],
    }


def _estimate_as_json(estimate: Estimate) -> dict[str, float | list[int] | None]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": list(estimate.n)}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON value to a file.

    Raises:
        WnRlError: it cannot be written.
    """
    write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, scores: Sequence[Score]) -> None:
    """Write one row per score, see :data:`CSV_COLUMNS`.

    Raises:
        WnRlError: it cannot be written.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for score in scores:
        row = as_json(score)
        protocol = row.pop("protocol")
        row |= {key: value for key, value in protocol.items() if key in CSV_COLUMNS and key != "episodes"}
        row |= {
            "protocol": protocol["name"],
            "protocol_changed": " ".join(protocol["changed"]),
            "episodes_wanted": protocol["episodes"],
            "low": row["interval"][0],
            "high": row["interval"][1],
        }
        writer.writerow({key: f"{value:.10g}" if isinstance(value, float) else value for key, value in row.items()})
    write_file(path, stream.getvalue())


def print_scores(scores: Sequence[Score]) -> None:
    """Print the scores as a table on standard output, with the protocol and with published scores beside them."""
    from rich.table import Table

    known = [score for score in scores if score.trained.game in PUBLISHED]
    alike = len({score.trained.path for score in scores}) == 1
    first = scores[0]
    protocols = dict.fromkeys(score.protocol for score in scores)
    table = Table(title=_title(first) if alike else None, caption=_caption(scores), caption_justify="left")
    columns = [
        "game",
        "param",
        "seed",
        "frames",
        "episodes",
        "score [95%]",
        "std",
        "min",
        "max",
        "length",
        "human-normalized",
    ]
    columns += list(SOURCES) if known else []
    columns += ["protocol"] if len(protocols) > 1 else []
    columns += [] if alike else ["checkpoint"]
    for name in columns:
        words = name in ("game", "param", "protocol", "checkpoint")
        whole = name != "checkpoint" and name != "protocol"
        # Two lines, so that long names leave room for the checkpoint's path.
        head = (
            name.replace("-", "-\n")
            if name == "human-normalized"
            else name.replace(" ", "\n")
            if name in SOURCES
            else name
        )
        table.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=whole)
    for score in scores:
        trained, result, human = score.trained, score.result, score.human_normalized
        published = PUBLISHED.get(trained.game)
        cells = {
            "game": trained.game,
            "param": trained.param if trained.kind == "wn_rl" else f"{trained.param} (sb3)",
            "seed": _or_dash(trained.seed),
            "frames": _or_dash(trained.frames),
            "episodes": f"{len(result.episodes):,}",
            "score [95%]": _with_interval(score.interval),
            "std": f"{result.std:.1f}",
            "min": f"{result.scores.min():g}",
            "max": f"{result.scores.max():g}",
            "length": f"{result.mean_length:,.0f}",
            "human-normalized": "unknown" if human is None else f"{100 * human:.1f}%",
            "paper normal": f"{published.paper_normal:g}" if published else "–",
            "paper wn": f"{published.paper_wn:g}" if published else "–",
            "Mnih 2015": f"{published.mnih:g}" if published else "–",
            "protocol": score.protocol.label,
            "checkpoint": str(trained.path).removesuffix("/checkpoints/latest"),
        }
        table.add_row(*(cells[name] for name in columns))
    _print(table)
    if known:
        for name, source in SOURCES.items():
            print(f"{name}: {source}")
    if any(not episode.completed for score in scores for episode in score.result.episodes):
        print(
            "An unfinished episode counts with its score so far if it is the only one within the budget of agent steps."
        )


def _title(score: Score) -> str:
    trained = score.trained
    return f"{trained.game}, {trained.param}: {trained.path}"


def _caption(scores: Sequence[Score]) -> str:
    lines = list(dict.fromkeys(score.protocol.describe() for score in scores))
    emulators = ", ".join(map(str, sorted({score.num_envs for score in scores})))
    trained = sorted({score.trained.config.num_envs for score in scores if score.trained.config})
    lines.append(
        f"N = {emulators} emulators, seed {scores[0].seed}"
        + (f"; trained with N = {', '.join(map(str, trained))}" if trained else "")
    )
    lines.append(
        "Raw points of whole episodes; 95% bootstrap interval over episodes, none below 4 or if all are equal; "
        "human-normalized: 0% is random play, 100% a human."
    )
    return "\n".join(lines)


def _or_dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _with_interval(estimate: Estimate, *, percent: bool = False) -> str:
    def shown(value: float) -> str:
        return f"{100 * value:.1f}%" if percent else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"

    if estimate.low is None or estimate.high is None:
        return shown(estimate.value)
    return f"{shown(estimate.value)} [{shown(estimate.low)}, {shown(estimate.high)}]"


def print_comparison(comparison: Comparison, by: str) -> None:
    """Print statistics over seeds and games, and notes, on standard output; problems are not printed."""
    from rich.table import Table

    if comparison.summaries:
        table = Table(
            title="Over seeds",
            caption="95% stratified bootstrap intervals over seeds (n = runs; Agarwal et al. 2021); none for fewer "
            "than 4 runs of one game\n(a bootstrap would give their minimum and maximum), or if all are equal.\n"
            "IQM: mean of the middle half of the runs. Rows of several games are human-normalized.",
            caption_justify="left",
        )
        for name in ("game", by, "runs", "mean", "median", "IQM"):
            table.add_column(name, justify="left" if name in ("game", by) else "right")
        for summary in comparison.summaries:
            table.add_row(*_summary_cells(summary))
        _print(table)
    for improvement in comparison.improvements:
        games = f"{len(improvement.games)} games" if len(improvement.games) > 1 else improvement.games[0]
        print(
            f"Probability that a run of {improvement.better} beats one of {improvement.than} on {games}: "
            f"{_with_interval(improvement.estimate, percent=True)} ({improvement.estimate.sample_size})"
        )
    for note in comparison.notes:
        print(f"note: {note}")


def _summary_cells(summary: Summary) -> list[str]:
    percent = summary.game is None
    game = summary.game or f"{len(summary.games)} games"
    cells = [_with_interval(estimate, percent=percent) for estimate in summary.estimates.values()]
    return [game, summary.group, str(summary.runs), *cells]


def _print(table: Any) -> None:  # noqa: ANN401 - rich is imported where it is needed
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def score_and_report(
    paths: Sequence[Path], how: How, *, json_file: Path | None = None, csv_file: Path | None = None, by: str = "param"
) -> int:
    """Score every path, print tables, write files; return the exit code.

    Files are written after each score, so that an interruption loses none; if nothing could be scored, the JSON file
    says why, in the form for several paths. A failure is one line on standard error; the other paths are still
    scored, and the exit code is that of the failure, or 1 if several paths were given. A file that cannot be written
    is tried again after each score.

    Args:
        paths: see :func:`wn_rl.evaluation.scoring.expand`.
        how: to score them.
        json_file: file for all episodes of all scores.
        csv_file: file for one row per score.
        by: configuration key whose values are the groups that are compared.
    """
    scores: list[Score] = []
    failures: list[Failure] = []
    unwritten: dict[Path, str] = {}
    comparison = Comparison()

    def write() -> None:
        if json_file is not None and scores:
            value = as_json(scores[0]) if len(paths) == 1 else comparison_as_json(scores, failures, comparison, by)
            _attempt(json_file, lambda file: write_json(file, value), unwritten)
        if csv_file is not None and scores:
            _attempt(csv_file, lambda file: write_csv(file, scores), unwritten)

    try:
        for outcome in score_many(paths, how):
            if isinstance(outcome, Failure):
                failures.append(outcome)
                cli.complain(outcome.message)
            else:
                scores.append(outcome)
                comparison = compare(scores, by)
                if len(paths) > 1:
                    print(
                        f"{outcome.trained.path}: {outcome.interval} ({len(outcome.result.episodes)} episodes)",
                        flush=True,
                    )
            write()
        if json_file is not None and not scores:  # for scripts: the file says why there is no score
            nothing = comparison_as_json([], failures, comparison, by)
            _attempt(json_file, lambda file: write_json(file, nothing), unwritten)
    finally:  # after Ctrl-C too: what was played is printed
        if scores:
            print_scores(scores)
            print_comparison(comparison, by)
    for problem in (*comparison.problems, *unwritten.values()):
        cli.complain(problem)
    if failures:
        return failures[0].exit_code if len(paths) == 1 else 1
    return 1 if comparison.problems or unwritten else 0


def _attempt(file: Path, write: Callable[[Path], None], unwritten: dict[Path, str]) -> None:
    try:
        write(file)
        unwritten.pop(file, None)
    except WnRlError as error:
        unwritten[file] = str(error)
