"""What a run directory holds: configuration, evaluations, training episodes, summary, TensorBoard scalars, videos.

Nothing is played, and no checkpoint is needed.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig, recorded
from wn_rl.errors import Failure, UsageError, WnRlError, one_line
from wn_rl.report.statistics import Curve
from wn_rl.runs.directory import EPISODE_COLUMNS, EVALUATION_COLUMNS, Found, RunDirectory, expand, read_rows

Columns = Mapping[str, NDArray[np.float64]]
LARGEST = 1e15
"""Largest plausible score or count: a file with a larger number is damaged."""
PAPER_EVALUATION_STEPS = 125_000
"""Agent steps of the paper's evaluation after each epoch."""


@dataclass(frozen=True)
class RunResult:
    """One run, read from its files.

    Attributes:
        path: its directory.
        config: with the canonical name of the game.
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
    def evaluation_protocol(self) -> str:
        """How the evaluations were played, in words."""
        config = self.config
        length = f"{config.evaluation_steps:,} agent steps" if config.evaluation_steps else None
        cap = f"cap {config.max_frames_per_episode:,} frames" if config.max_frames_per_episode else "no cap"
        parts = [length or f"{config.evaluation_episodes} episodes", f"ε {config.evaluation_epsilon:g}", cap]
        parts += [f"sticky actions {config.sticky_actions:g}"] if config.sticky_actions else []
        parts += ["all 18 actions"] if config.full_action_set else []
        return ", ".join(parts)

    @property
    def evaluated_as_the_paper(self) -> bool:
        """Whether the evaluations follow the paper's protocol."""
        config = self.config
        return (config.evaluation_steps, config.evaluation_epsilon) == (PAPER_EVALUATION_STEPS, 0.05) and not (
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

    A run with the same configuration and evaluations as an earlier one is the same run; it counts once, and is listed
    among the failures.
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


def games_of(runs: Sequence[RunResult]) -> list[str]:
    """Return the games of runs in alphabetical order."""
    return sorted({run.config.game for run in runs})


def groups_of(runs: Sequence[RunResult], by: str) -> list[str]:
    """Return the groups of runs, the baseline first."""
    return in_order({run.group(by) for run in runs})


def in_order(groups: set[str]) -> list[str]:
    """Return group labels in the order of every table and legend: the baseline first, numbers by size, then words."""

    def key(group: str) -> tuple[bool, float, str]:
        try:
            number = float(group)
        except ValueError:
            number = math.inf
        return group != "standard", number if number == number else math.inf, group

    return sorted(groups, key=key)


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
        if name != "std" and not (np.abs(column) <= LARGEST).all():  # a single episode has no std
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


def has_events(directory: Path) -> bool:
    """Return whether a run directory holds TensorBoard events."""
    return any(directory.glob("*tfevents*"))


def read_scalars(directory: Path) -> dict[str, Curve]:
    """Return every scalar of a run directory's events by its tag; none where there are no events.

    Points that are not finite are left out; of two points at the same frame the later one counts.

    Raises:
        WnRlError: the events cannot be read.
    """
    if not has_events(directory):
        return {}
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a truncated last record is normal while a run goes on
    unwanted = dict.fromkeys(("histograms", "images", "audio", "compressedHistograms"), 1)
    try:
        events = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0, **unwanted})
        events.Reload()
        tags = events.Tags()["scalars"]
        found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes the reader raise
        raise WnRlError(f"{directory}: its TensorBoard events cannot be read: {one_line(error)}") from None
    return {tag: curve for tag, points in found.items() if len((curve := _curve(points)).frames)}


def _curve(points: list[tuple[int, float]]) -> Curve:
    last = {step: value for step, value in points if np.isfinite(value)}
    frames = sorted(last)
    return Curve(np.array(frames, np.float64), np.array([last[frame] for frame in frames], np.float64))


LARGEST_VIDEO = 6 * 2**20
"""Largest video in bytes that a page embeds."""
LARGEST_VIDEOS = 48 * 2**20
"""Largest sum of the videos of a page, in bytes."""


@dataclass(frozen=True)
class RunVideo:
    """A video in a run directory.

    Attributes:
        run: whose.
        path: its file.
        data: the file's bytes.
        poster: its first frame as a PNG file, or None if it cannot be decoded here.
    """

    run: RunResult
    path: Path
    data: bytes
    poster: bytes | None

    @property
    def url(self) -> str:
        """The video as a ``data:`` URL."""
        return "data:video/mp4;base64," + base64.b64encode(self.data).decode()

    @property
    def poster_url(self) -> str | None:
        """The first frame as a ``data:`` URL."""
        return None if self.poster is None else "data:image/png;base64," + base64.b64encode(self.poster).decode()


def find_videos(runs: Sequence[RunResult]) -> tuple[list[RunVideo], list[str]]:
    """Return the ``.mp4`` videos anywhere in the run directories, and a line with the reason for each one left out.

    Symbolic links are not followed: they could put any file of this machine into a page that is shared.
    """
    videos: list[RunVideo] = []
    left_out: list[str] = []
    total = 0
    for run in runs:
        for path in sorted(run.path.rglob("*.mp4")):
            if path.is_symlink() or not path.is_file():
                continue
            name = f"{run.path.resolve().name}/{path.relative_to(run.path)}"
            size = path.stat().st_size
            if size > LARGEST_VIDEO:
                left_out.append(
                    f"{name}: {_megabytes(size)}, more than the {_megabytes(LARGEST_VIDEO)} that a page takes"
                )
            elif total + size > LARGEST_VIDEOS:
                left_out.append(f"{name}: the videos together would be more than {_megabytes(LARGEST_VIDEOS)}")
            else:
                try:
                    data = path.read_bytes()
                except OSError as error:
                    left_out.append(f"{name}: {error.strerror}")
                    continue
                if data[4:8] != b"ftyp":
                    left_out.append(f"{name}: no MP4 file")
                    continue
                total += size
                videos.append(RunVideo(run, path, data, _first_frame(data)))
    return videos, left_out


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _first_frame(data: bytes) -> bytes | None:
    """Return the first frame as a PNG file if PyAV and Pillow are installed."""
    try:
        import av

        with av.open(io.BytesIO(data)) as container:
            image = next(container.decode(video=0)).to_image()
        stream = io.BytesIO()
        image.save(stream, format="PNG", optimize=True)
        return stream.getvalue()
    except Exception:  # noqa: BLE001 - without a poster the browser shows what it can decode
        return None
