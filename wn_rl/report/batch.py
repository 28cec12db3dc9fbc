"""Score many networks and report on them: tables, files, and one line for everything that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from wn_rl import cli
from wn_rl.errors import Failure, WnRlError
from wn_rl.evaluation.scoring import How, Score, score_many
from wn_rl.report import table
from wn_rl.report.comparison import Comparison, compare


def score_and_report(
    paths: Sequence[Path], how: How, *, json: Path | None = None, csv: Path | None = None, by: str = "param"
) -> int:
    """Score every path, print tables, write files; return the exit code.

    Files are written after each score, so that an interruption loses none; where nothing could be scored, the JSON file
    says why, in the form of several paths. What fails is one line on standard error;
    the others are still scored, and the exit code is that of the failure, or 1 where several paths were given. A file
    that cannot be written is tried again after each score.

    Args:
        paths: see :func:`wn_rl.evaluation.scoring.expand`.
        how: to score them.
        json: file for every episode of every score.
        csv: file for one row a score.
        by: configuration key whose values are the groups that are compared.
    """
    scores: list[Score] = []
    failures: list[Failure] = []
    unwritten: dict[Path, str] = {}
    comparison = Comparison()

    def write() -> None:
        if json is not None and scores:
            value = (
                table.as_json(scores[0])
                if len(paths) == 1
                else table.comparison_as_json(scores, failures, comparison, by)
            )
            _attempt(json, lambda file: table.write_json(file, value), unwritten)
        if csv is not None and scores:
            _attempt(csv, lambda file: table.write_csv(file, scores), unwritten)

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
                        f"{outcome.trained.path}: {outcome.interval} ({len(outcome.result.episodes)} games)", flush=True
                    )
            write()
        if json is not None and not scores:  # a script that waits for the file reads why it holds no score
            nothing = table.comparison_as_json([], failures, comparison, by)
            _attempt(json, lambda file: table.write_json(file, nothing), unwritten)
    finally:  # Ctrl-C too: what was played is shown
        if scores:
            table.print_scores(scores)
            table.print_comparison(comparison, by)
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
