"""Episodes that can be rendered again: one of an evaluation, recorded while it is scored, or one of the training.

An episode is stored as a seed and a list of actions. An evaluation is recorded by :class:`EpisodeRecorder`; the
training keeps an action log, from which :func:`training_episode` finds an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.atari.action_log import Mark, PlayedEpisode, read_history
from wn_rl.atari.env import FRAME_SKIP, AtariVector, emulator_seeds, make_atari
from wn_rl.atari.render import RESET, RenderedFrame, render
from wn_rl.errors import CheckpointError, UsageError, WnRlError
from wn_rl.evaluation.episodes import (
    EVALUATION_STREAM,
    EvaluationProtocol,
    EvaluationResult,
    environment_options,
    evaluate,
)
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, read_rows
from wn_rl.training import training_seeds

Options = Mapping[str, Any]
"""Options of :func:`wn_rl.atari.env.make_atari`, without the game, the seed and the number of emulators."""


@dataclass
class RecordedEpisode:
    """An episode of an evaluation; T agent steps.

    Attributes:
        index: its place in the order in which the episodes were started, from 0.
        seed: of its emulator.
        resets: number of resets of that emulator since it was seeded.
        history: what the emulator played between its seeding and this episode: actions, and ``RESET`` for each reset.
        actions: of the agent, length T.
        random: whether each was drawn at random (ε), length T; the draw may be the greedy action.
        q_values: of the state in which each was chosen, T arrays, float32 (A,).
        rewards: of each action, raw points, length T.
        truncated: whether the frame cap ended it.
    """

    index: int
    seed: int
    resets: int
    history: bytes
    actions: list[int] = field(default_factory=list)
    random: list[bool] = field(default_factory=list)
    q_values: list[NDArray[np.float32]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    truncated: bool = False

    @property
    def score(self) -> float:
        """Raw points."""
        return float(sum(self.rewards))

    @property
    def length(self) -> int:
        """Agent steps."""
        return len(self.actions)

    def frames(self, game: str, options: Options) -> Iterator[RenderedFrame]:
        """Play the episode again and yield every emulator frame in colour, starting with the one before step 0.

        Args:
            game: name of the game.
            options: as in the evaluation.
        """
        sticky = options["sticky_actions"] > 0
        return render(
            game,
            bytes(self.actions),
            seed=self.seed,
            resets=0 if sticky else self.resets,
            history=self.history if sticky else b"",
            **options,
        )

    def observations(self, game: str, options: Options) -> Iterator[NDArray[np.uint8]]:
        """Play the episode again and yield the observation of each agent step, uint8 (4, 84, 84).

        Args:
            game: name of the game.
            options: as in the evaluation.
        """
        env = make_atari(game, 1, num_threads=1, **options)
        try:
            seen, _ = env.reset(seed=np.array([self.seed]))
            if options["sticky_actions"] > 0:
                for value in self.history:
                    seen = env.step(np.array([0 if value == RESET else value]))[0]
            else:
                for _ in range(self.resets):
                    seen = env.restart(np.ones(1, bool))
            for action in self.actions:
                yield seen[0].copy()
                seen = env.step(np.array([action]))[0]
        finally:
            env.close()


class EpisodeRecorder:
    """Records what an evaluation plays: its methods are the policy and the two callbacks of the evaluation."""

    def __init__(self, q_values: Callable[[Tensor], Tensor], seeds: NDArray[np.int32]) -> None:
        """Record N emulators.

        Args:
            q_values: uint8 observations (N, 4, 84, 84) → Q-values (N, A).
            seeds: of the emulators, shape (N,).
        """
        self._network = q_values
        self._seeds = seeds
        self._history = [bytearray() for _ in seeds]
        self._resets = [0] * len(seeds)
        self.episodes: list[RecordedEpisode] = []
        self._current = [self._start(slot) for slot in range(len(seeds))]
        self._q: NDArray[np.float32] = np.zeros((len(seeds), 0), np.float32)
        self._actions: NDArray[np.int64] = np.zeros(0, np.int64)
        self._random: NDArray[np.bool_] = np.zeros(0, bool)

    def _start(self, slot: int) -> RecordedEpisode:
        episode = RecordedEpisode(
            len(self.episodes), int(self._seeds[slot]), self._resets[slot], bytes(self._history[slot])
        )
        self.episodes.append(episode)
        return episode

    @torch.no_grad()
    def policy(self, observations: Tensor) -> Tensor:
        """Return the greedy actions, int64 (N,)."""
        q_values = self._network(observations)
        self._q = q_values.float().cpu().numpy()
        return q_values.argmax(1)

    def before_step(self, actions: NDArray[np.int64], random: NDArray[np.bool_]) -> None:
        """Record the actions of a vector step, shapes (N,)."""
        self._actions, self._random = actions, random

    def after_step(
        self, rewards: NDArray[Any], terminated: NDArray[Any], truncated: NDArray[Any], info: dict[str, NDArray[Any]]
    ) -> None:
        """Record the result of a vector step, shapes (N,)."""
        for slot in range(len(self._seeds)):
            if info["is_reset"][slot]:
                self._history[slot].append(RESET)
                self._resets[slot] += 1
                self._current[slot] = self._start(slot)
                continue
            episode, action = self._current[slot], int(self._actions[slot])
            self._history[slot].append(action)
            episode.actions.append(action)
            episode.random.append(bool(self._random[slot]))
            episode.q_values.append(self._q[slot])
            episode.rewards.append(float(rewards[slot]))
            episode.truncated = bool(truncated[slot]) and not terminated[slot]


def record_evaluation(
    q_values: Callable[[Tensor], Tensor],
    env: AtariVector,
    protocol: EvaluationProtocol,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[EvaluationResult, list[RecordedEpisode]]:
    """Evaluate as :func:`wn_rl.evaluation.episodes.evaluate` does; return the result and the episodes that count.

    Args:
        q_values: uint8 observations (N, 4, 84, 84) → Q-values (N, A).
        env: emulators used for nothing else.
        protocol: how long, and with which ε.
        seed: of the emulators and of the random actions.
        device: of the network.
    """
    recorder = EpisodeRecorder(q_values, emulator_seeds(seed, env.num_envs, EVALUATION_STREAM))
    result = evaluate(
        recorder.policy,
        env,
        protocol,
        seed=seed,
        device=device,
        on_actions=recorder.before_step,
        on_step=recorder.after_step,
    )
    return result, recorder.episodes[: len(result.episodes)]


@dataclass(frozen=True)
class TrainingEpisode:
    """An episode of a run's training.

    Attributes:
        number: its row in ``episodes.csv``, from 1.
        training_frames: emulator frames of training at its end.
        episode_return: raw points.
        length: agent steps.
        frames: its emulator frames; an iterator.
    """

    number: int
    training_frames: int
    episode_return: float
    length: int
    frames: Iterator[RenderedFrame]


def training_episode(directory: Path, which: str) -> TrainingEpisode:
    """Find a training episode of a run, up to its last checkpoint, and prepare to render it.

    Args:
        directory: of the run.
        which: ``best`` (highest raw return), ``longest``, or its number in ``episodes.csv``, from 1; of equal
            episodes the first.

    Raises:
        UsageError: ``which`` is none of these, or there is no such episode.
        CheckpointError: checkpoint or action log is missing or damaged, or they do not fit each other.
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
        raise WnRlError(f"the action log of {directory} was trimmed: it no longer holds what led to episode {number}")
    frames = render(
        config.game,
        history.rows[begin:end, episode.slot].tolist(),
        seed=int(training_seeds(config, episode.seed_label)[episode.slot]),
        resets=0 if sticky else episode.resets,
        history=history.rows[seeded:begin, episode.slot].tolist() if sticky else b"",
        **{key: value for key, value in environment_options(config).items() if key != "seed"},
    )
    return TrainingEpisode(number, episode.last_step * FRAME_SKIP, episode_return, episode.length, frames)


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
