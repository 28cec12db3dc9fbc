"""What a run directory says about its run: configuration, test scores, training games, summary. Nothing is played."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig, recorded
from wn_rl.errors import Failure, UsageError, WnRlError, one_line
from wn_rl.runs.directory import EPISODE_COLUMNS, EVALUATION_COLUMNS, Found, RunDirectory, expand, read_rows

Columns = Mapping[str, NDArray[np.float64]]
LARGEST = 1e15
"""No score and no count is larger: a file with such a number is damaged, and no figure could show it."""
PAPER_TEST_STEPS = 125_000
"""Agent steps of the paper's test after each epoch."""


@dataclass(frozen=True)
class RunResult:
    """One run as its files tell it.

    Attributes:
        path: its directory.
        config: with the game's name made canonical.
        evaluations: by column of ``evaluations.csv``, each of shape (n,), n ≥ 1; frames increase.
        episodes: by column of ``episodes.csv``, each of shape (m,); empty arrays where the file is missing.
        summary: of ``summary.json``; empty where there is none yet.
    """

    path: Path
    config: TrainConfig
    evaluations: Columns
    episodes: Columns
    summary: Mapping[str, Any]

    @property
    def frames(self) -> NDArray[np.float64]:
        """Emulator frames of each evaluation, shape (n,)."""
        return self.evaluations["frames"]

    @property
    def scores(self) -> NDArray[np.float64]:
        """Mean raw score of each evaluation in points, shape (n,)."""
        return self.evaluations["mean"]

    @property
    def best(self) -> float:
        """The highest mean score of a single evaluation: what the paper reports of its runs."""
        return float(self.scores.max())

    @property
    def best_frames(self) -> float:
        """Emulator frames of the first evaluation that had the highest mean."""
        return float(self.frames[int(self.scores.argmax())])

    @property
    def final(self) -> float:
        """Mean score of the last evaluation."""
        return float(self.scores[-1])

    @property
    def trained_frames(self) -> float:
        """Emulator frames trained: of the summary, or at least those of the last evaluation."""
        return max(self.number("frames") or 0.0, float(self.frames[-1]))

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self.summary.get("finished") is True

    def number(self, key: str) -> float | None:
        """Return a number of the summary, from 0 to :data:`LARGEST`, or None."""
        value = self.summary.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            return None
        return float(value)

    def text(self, key: str) -> str | None:
        """Return a text of the summary, or None."""
        value = self.summary.get(key)
        return value if isinstance(value, str) else None

    def group(self, by: str) -> str:
        """Return the value of configuration key ``by`` as text."""
        return str(getattr(self.config, by))

    @property
    def test(self) -> str:
        """How the evaluations were played, in words."""
        config = self.config
        length = f"{config.evaluation_steps:,} agent steps" if config.evaluation_steps else None
        cap = f"cap {config.max_frames_per_episode:,} frames" if config.max_frames_per_episode else "no cap"
        parts = [length or f"{config.evaluation_episodes} games", f"ε {config.evaluation_epsilon:g}", cap]
        parts += [f"sticky actions {config.sticky_actions:g}"] if config.sticky_actions else []
        parts += ["all 18 actions"] if config.full_action_set else []
        return ", ".join(parts)

    @property
    def tested_as_the_paper(self) -> bool:
        """Whether the evaluations follow the paper's protocol."""
        config = self.config
        return (config.evaluation_steps, config.evaluation_epsilon) == (PAPER_TEST_STEPS, 0.05) and not (
            config.max_frames_per_episode or config.sticky_actions or config.full_action_set
        )


def find_runs(names: Sequence[str]) -> Found:
    """Return the run directories that ``names`` stand for: runs, directories of runs, patterns.

    Raises:
        WnRlError: a pattern that matches no run.
    """
    return expand(names, lambda path: (path / "config.yaml").exists(), "run")


def read_run(directory: Path) -> RunResult:
    """Return what the files of a run directory say; checkpoints are neither needed nor read.

    Raises:
        WnRlError: it is no run, has no evaluation yet, or a file is damaged.
    """
    run = RunDirectory(directory)
    try:
        config = recorded(run.config)
        config = replace(config, game=find_game(config.game).name)
    except UsageError as error:
        raise WnRlError(f"{directory} is not a run: {error}") from None
    evaluations = _columns(run.evaluations, EVALUATION_COLUMNS)
    if not len(evaluations["frames"]):
        raise WnRlError(f"{directory} has no evaluation yet")
    if (np.diff(evaluations["frames"], prepend=-1.0) <= 0).any():
        raise WnRlError(f"{run.evaluations} is damaged: its frames do not increase from 0 on")
    there = run.episodes.exists()
    episodes = _columns(run.episodes, EPISODE_COLUMNS) if there else {name: np.empty(0) for name in EPISODE_COLUMNS}
    return RunResult(directory, config, evaluations, episodes, _summary(run.summary))


def read_runs(paths: Sequence[Path]) -> tuple[list[RunResult], list[Failure]]:
    """Return the runs that can be read, and why the others cannot.

    A run whose configuration and evaluations are those of an earlier one is that run again, which is no second seed:
    it is among the others.
    """
    runs: list[RunResult] = []
    failures: list[Failure] = []
    for path in paths:
        try:
            run = read_run(path)
        except (WnRlError, OSError) as error:
            message = one_line(error)
            message = message if str(path) in message else f"{path}: {message}"
            failures.append(Failure(path, message, getattr(error, "exit_code", 1)))
            continue
        if (other := next((one for one in runs if _same(one, run)), None)) is not None:
            failures.append(Failure(path, f"{path} is the same run as {other.path}: left out", 1))
        else:
            runs.append(run)
    return runs, failures


def names_of(runs: Sequence[RunResult]) -> list[str]:
    """Return a name for each run: its directory's, or the whole path where two directories share it."""
    short = [run.path.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.path) for name, run in zip(short, runs, strict=True)]


def _same(one: RunResult, other: RunResult) -> bool:
    ours, theirs = (replace(run.config, run_dir=None, chosen=()) for run in (one, other))
    return ours == theirs and all(
        np.array_equal(one.evaluations[name], other.evaluations[name]) for name in EVALUATION_COLUMNS
    )


def _columns(file: Path, names: Sequence[str]) -> Columns:
    rows = read_rows(file)
    try:
        columns = {name: np.array([float(row[name]) for row in rows], np.float64) for name in names}
    except KeyError as error:
        raise WnRlError(f"{file} is damaged: it has no column {error}") from None
    for name, column in columns.items():
        if name != "std" and not (np.abs(column) <= LARGEST).all():  # of a single game there is no std
            raise WnRlError(f"{file} is damaged: {name} is not finite or not plausible")
    return columns


def _summary(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise WnRlError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise WnRlError(f"{file} is damaged: it is no JSON; without it the rest of the run can be read") from None
    if not isinstance(value, dict):
        raise WnRlError(f"{file} is damaged: it holds no object; without it the rest of the run can be read")
    return value
