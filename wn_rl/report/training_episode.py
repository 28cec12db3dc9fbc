"""A training episode seen again: found in the action log, played once more in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wn_rl.atari.action_log import Mark, PlayedEpisode, read_history
from wn_rl.atari.env import FRAME_SKIP
from wn_rl.atari.render import RenderedFrame, render
from wn_rl.errors import CheckpointError, UsageError, WnRlError
from wn_rl.evaluation.episodes import environment_options
from wn_rl.report.video import Picture, write_video
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, read_rows
from wn_rl.training import training_seeds


@dataclass(frozen=True)
class TrainingEpisode:
    """An episode of a run's training.

    Attributes:
        number: its row in ``episodes.csv``, from 1.
        frames: emulator frames of training at its end.
        episode_return: raw points.
        length: agent steps.
        pictures: its frames, to be gone through once.
    """

    number: int
    frames: int
    episode_return: float
    length: int
    pictures: Iterator[RenderedFrame]


def training_episode(directory: Path, which: str) -> TrainingEpisode:
    """Find a training episode of a run and prepare to play it again, up to the run's last checkpoint.

    Args:
        directory: of the run.
        which: ``best`` (highest raw return), ``longest``, or its number in ``episodes.csv``, from 1; of several that
            are equal the first.

    Raises:
        UsageError: ``which`` is none of these, or there is no such episode.
        CheckpointError: checkpoint or action log are missing or damaged, or do not fit each other.
    """
    files = RunDirectory(directory)
    saved = checkpoint.load(directory)
    config = saved.config
    loop = saved.training.get("loop", {})
    if "vector_steps" not in loop:
        raise CheckpointError(f"{saved.path} was written by an earlier version, without an action log")
    sticky = config.sticky_actions > 0
    try:
        mark = Mark.of(loop, config.num_envs)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.path} is damaged: {error}") from None
    history = read_history(files.action_log, config.num_envs, config.reseed_period if sticky else 0, mark)
    rows = {int(float(row["frames"])): (number, row) for number, row in enumerate(read_rows(files.episodes), 1)}
    found: list[tuple[int, float, PlayedEpisode]] = []
    for episode in history.episodes():
        number, row = rows.get(episode.last_step * FRAME_SKIP, (0, {}))
        if number == 0 or int(float(row["length"])) != episode.length:
            raise CheckpointError(f"{files.episodes} does not fit {files.action_log}")
        found.append((number, float(row["return"]), episode))
    number, episode_return, episode = _choose(found, which, len(rows), directory)
    begin, end = episode.first_row - history.first_row, episode.last_row + 1 - history.first_row
    seeded = episode.seeded_row - history.first_row
    if sticky and seeded < 0:
        raise WnRlError(f"the action log of {directory} was trimmed: what led to episode {number} is no longer in it")
    pictures = render(
        config.game,
        history.rows[begin:end, episode.slot].tolist(),
        seed=int(training_seeds(config, episode.seed_label)[episode.slot]),
        resets=0 if sticky else episode.resets,
        history=history.rows[seeded:begin, episode.slot].tolist() if sticky else b"",
        **{key: value for key, value in environment_options(config).items() if key != "seed"},
    )
    return TrainingEpisode(number, episode.last_step * FRAME_SKIP, episode_return, episode.length, pictures)


def _choose(
    found: list[tuple[int, float, PlayedEpisode]], which: str, count: int, directory: Path
) -> tuple[int, float, PlayedEpisode]:
    if not found:
        raise UsageError(f"no training episode of {directory} had ended at its last checkpoint")
    if which == "best":
        return max(found, key=lambda entry: (entry[1], -entry[0]))
    if which == "longest":
        return max(found, key=lambda entry: (entry[2].length, -entry[0]))
    if not which.isdecimal() or len(which) > 12:
        raise UsageError(f"--replay-episode '{which}' is neither best nor longest nor a number from 1 to {count:,}")
    for entry in found:
        if entry[0] == int(which):
            return entry
    raise UsageError(
        f"--replay-episode {which}: the action log of {directory} holds episodes {found[0][0]:,} to {found[-1][0]:,}"
    )


def film_command(paths: Sequence[Path], which: str, video: Path) -> int:
    """Write the film of a training episode and say which one it is; returns the exit code.

    Raises:
        UsageError: not one run, or see :func:`training_episode`.
        WnRlError: the film cannot be written, or the game does something else than in the run.
    """
    if len(paths) != 1:
        raise UsageError(f"--replay-episode shows one run, not {len(paths)}")
    episode = training_episode(paths[0], which)
    seen = 0.0

    def pictures() -> Iterator[Picture]:
        nonlocal seen
        for frame in episode.pictures:
            seen += frame.reward
            yield frame.picture
        if seen != episode.episode_return:  # raised here, the film is not written
            raise WnRlError(
                f"episode {episode.number:,} gave {seen:g} points when it was played again and "
                f"{episode.episode_return:g} in training: another version of ale-py?"
            )

    count = write_video(pictures(), video)
    print(
        f"training episode {episode.number:,}, ended at frame {episode.frames:,}: {episode.episode_return:g} points in "
        f"{episode.length:,} agent steps; {count:,} pictures written to {video}"
    )
    return 0
