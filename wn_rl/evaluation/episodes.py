"""Evaluation: raw returns of whole episodes, with the same code during training and in evaluate.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.atari.env import AtariVector, emulator_seeds
from wn_rl.config import TrainConfig
from wn_rl.diagnostics import overestimation
from wn_rl.errors import UsageError
from wn_rl.evaluation.protocols import EvaluationProtocol

__all__ = [
    "Episode",
    "EpisodeLedger",
    "EvaluationInterrupted",
    "EvaluationProtocol",
    "EvaluationResult",
    "Policy",
    "ValueRecorder",
    "environment_options",
    "evaluate",
]

EVALUATION_STREAM = 1
"""Label of the random stream of the evaluation; that of the training is 0."""


class EvaluationInterrupted(Exception):  # noqa: N818 - nothing went wrong
    """The evaluation was stopped; it has no result."""


class Policy(Protocol):
    """Greedy actions: uint8 observations (B, 4, 84, 84) → int64 actions (B,)."""

    def __call__(self, observations: Tensor, /) -> Tensor:
        """Return the greedy actions."""


@dataclass(frozen=True)
class Episode:
    """One episode: its raw score (return) in points, its length in agent steps, and whether it was completed."""

    score: float
    length: int
    completed: bool = True


@dataclass(frozen=True)
class EvaluationResult:
    """The episodes that count, in the order of their index, and the wall time in seconds."""

    episodes: tuple[Episode, ...]
    seconds: float

    @property
    def scores(self) -> NDArray[np.float64]:
        """Raw scores, shape (episodes,)."""
        return np.array([episode.score for episode in self.episodes])

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the scores, with n − 1; 0 for one episode."""
        return float(self.scores.std(ddof=1)) if len(self.episodes) > 1 else 0.0

    @property
    def mean_length(self) -> float:
        """Mean length in agent steps."""
        return float(np.mean([episode.length for episode in self.episodes]))


class EpisodeLedger:
    """Decides which episodes count, so that parallel emulators do not favour short ones.

    Taking the first n episodes to *end* would favour short ones. Here every episode gets an index when it *starts*,
    when nothing is known of its length, and the episodes that count are a prefix of that order: with a quota the
    first n; with a budget of agent steps those that one emulator would complete, playing them one after the other,
    before the budget is spent. Later episodes that happen to be done are dropped, earlier ones are waited for.
    """

    def __init__(self, *, steps: int, episodes: int) -> None:
        """Count by ``steps`` (agent steps), or by ``episodes`` where that is 0."""
        self._steps = steps
        self._quota = episodes
        self._episodes: list[Episode] = []
        self._prefix = 0  # so many first episodes are complete and within the budget …
        self._spent = 0  # … and took so many agent steps

    def start(self) -> int:
        """Return the index of an episode that starts now."""
        self._episodes.append(Episode(0.0, 0, completed=False))
        return len(self._episodes) - 1

    def record(self, index: int, score: float, length: int, *, completed: bool) -> None:
        """Record an episode's score and length so far."""
        self._episodes[index] = Episode(score, length, completed)

    def result(self) -> tuple[Episode, ...] | None:
        """Return the episodes that count, or None while one of them is still being played."""
        if self._steps == 0:
            counted = self._episodes[: self._quota]
            return tuple(counted) if len(counted) == self._quota and all(e.completed for e in counted) else None
        while self._prefix < len(self._episodes):
            episode = self._episodes[self._prefix]
            spent = self._spent + episode.length
            if spent > self._steps or (spent == self._steps and not episode.completed):
                # This one is unfinished when the budget ends: dropped, unless it is all there is.
                unfinished = Episode(episode.score, episode.length, completed=False)
                return tuple(self._episodes[: self._prefix]) or (unfinished,)
            if not episode.completed:
                return None
            self._spent = spent
            self._prefix += 1
            if spent == self._steps:
                return tuple(self._episodes[: self._prefix])
        return None


class ValueRecorder:
    """Plays greedily and records predicted Q-values and realized rewards, for the overestimation.

    Pass the object as the policy of :func:`evaluate`, and its :meth:`after_step` as ``on_step``.
    """

    def __init__(
        self, q_values: Callable[[Tensor], Tensor], *, gamma: float, reward_clip: float, life_loss_terminal: bool
    ) -> None:
        """Record values of ``q_values`` and rewards as the learner sees them, by three configuration keys."""
        self._q_values = q_values
        self._gamma = gamma
        self._clip = reward_clip if reward_clip > 0 else np.inf
        self._life_loss_terminal = life_loss_terminal
        self._max_q: NDArray[np.float32] = np.zeros(0, np.float32)
        self._open: list[list[tuple[float, float]]] = []
        self._closed: list[list[tuple[float, float]]] = []

    def __call__(self, observations: Tensor) -> Tensor:
        """Return greedy actions, int64 (N,)."""
        q_values = self._q_values(observations)
        self._max_q = q_values.amax(1).float().cpu().numpy()
        return q_values.argmax(1)

    def after_step(
        self, rewards: NDArray[Any], terminated: NDArray[Any], truncated: NDArray[Any], info: dict[str, NDArray[Any]]
    ) -> None:
        """Record the rewards and ends that followed the states of the last call."""
        self._open = self._open or [[] for _ in rewards]
        ended = terminated | info["life_loss"] if self._life_loss_terminal else terminated
        clipped = np.clip(rewards, -self._clip, self._clip)
        for slot in range(len(rewards)):
            if info["is_reset"][slot]:
                continue
            self._open[slot].append((float(self._max_q[slot]), float(clipped[slot])))
            if ended[slot]:
                self._closed.append(self._open[slot])
            if ended[slot] or truncated[slot]:  # what would have followed a truncation is not known
                self._open[slot] = []

    def overestimation(self) -> float:
        """Return the mean of max-Q minus realized discounted return; NaN if no episode ended."""
        steps = [step for episode in self._closed for step in episode]
        ends = [index == len(episode) - 1 for episode in self._closed for index in range(len(episode))]
        return overestimation([q for q, _ in steps], [reward for _, reward in steps], ends, self._gamma)


def evaluate(
    policy: Policy,
    env: AtariVector,
    protocol: EvaluationProtocol,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_episode: Callable[[Episode], None] | None = None,
    on_actions: Callable[[NDArray[np.int64], NDArray[np.bool_]], None] | None = None,
    on_step: Callable[[NDArray[Any], NDArray[Any], NDArray[Any], dict[str, NDArray[Any]]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult:
    """Play ``policy`` ε-greedily and return the scores of whole episodes.

    It uses random generators of its own.

    Args:
        policy: greedy actions.
        env: emulators used for nothing else; they are re-seeded.
        protocol: how long, and with which ε.
        seed: of the emulators and of the random actions.
        device: of the policy.
        on_episode: called with each episode that ends, whether it counts or not.
        on_actions: called before each vector step with the actions and with which of them were drawn at random.
        on_step: called with rewards, terminated, truncated and info of each vector step.
        should_stop: asked before every vector step.

    Raises:
        EvaluationInterrupted: ``should_stop`` returned True.
        UsageError: the protocol has neither steps nor episodes.
    """
    if protocol.steps <= 0 and protocol.episodes <= 0:
        raise UsageError("nothing to evaluate: ask for at least 1 episode or 1 agent step")
    started = time.perf_counter()
    rng = np.random.default_rng([seed, EVALUATION_STREAM])
    ledger = EpisodeLedger(steps=protocol.steps, episodes=protocol.episodes)
    observations, _ = env.reset(seed=emulator_seeds(seed, env.num_envs, EVALUATION_STREAM))
    index = [ledger.start() for _ in range(env.num_envs)]
    while (counted := ledger.result()) is None:
        if should_stop():
            raise EvaluationInterrupted
        greedy = policy(torch.from_numpy(observations).to(device)).cpu().numpy()
        explore = rng.random(env.num_envs) < protocol.epsilon
        random = rng.integers(env.num_actions, size=env.num_envs)
        actions = np.where(explore, random, greedy)
        if on_actions is not None:
            on_actions(actions, explore)
        observations, rewards, terminated, truncated, info = env.step(actions)
        if on_step is not None:
            on_step(rewards, terminated, truncated, info)
        for slot in range(env.num_envs):
            if info["is_reset"][slot]:
                index[slot] = ledger.start()
                continue
            ended = bool(terminated[slot] or truncated[slot])
            score, length = float(info["episode_return"][slot]), int(info["episode_length"][slot])
            ledger.record(index[slot], score, length, completed=ended)
            if ended and on_episode is not None:
                on_episode(Episode(score, length))
    return EvaluationResult(counted, time.perf_counter() - started)


def environment_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options of :func:`wn_rl.make_atari` that a configuration decides."""
    return {
        "seed": config.seed,
        "noop_max": config.noop_max,
        "fire_reset": config.fire_reset,
        "sticky_actions": config.sticky_actions,
        "full_action_set": config.full_action_set,
        "max_frames_per_episode": config.max_frames,
    }
