"""A game of an evaluation that can be seen again: recorded while it is scored, by its seed and its actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.atari.env import AtariVector, emulator_seeds, make_atari
from wn_rl.atari.render import RESET, RenderedFrame, render
from wn_rl.evaluation.episodes import EVALUATION_STREAM, EvaluationProtocol, EvaluationResult, evaluate

Options = Mapping[str, Any]
"""Of :func:`wn_rl.atari.env.make_atari`, but for the game, the seed and the number of emulators."""


@dataclass
class PlayedGame:
    """A game of an evaluation; T agent steps.

    Attributes:
        index: its place in the order in which the games were started, from 0.
        seed: of its emulator.
        resets: of that emulator since it was seeded.
        history: what the emulator played since then: actions, and ``RESET`` for each of these resets.
        actions: that were played, shape (T,).
        random: whether each was drawn at random (ε), shape (T,); the draw may be the greedy action.
        q_values: of the state that each was chosen in, as the network gave them, float32 (T, A).
        rewards: that each led to, raw points, shape (T,).
        truncated: the frame cap ended it.
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
        """Play the game once more and yield every emulator frame in colour, beginning with the one before step 0.

        Args:
            game: its name.
            options: of then.
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
        """Play the game once more and yield the observation of each agent step, uint8 (4, 84, 84).

        Args:
            game: its name.
            options: of then.
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


class Recorder:
    """Writes down what an evaluation plays: its policy and its two callbacks."""

    def __init__(self, q_values: Callable[[Tensor], Tensor], seeds: NDArray[np.int32]) -> None:
        """Record N emulators that begin with ``seeds``, shape (N,).

        Args:
            q_values: uint8 observations (N, 4, 84, 84) → Q-values (N, A).
            seeds: see above.
        """
        self._network = q_values
        self._seeds = seeds
        self._history = [bytearray() for _ in seeds]
        self._resets = [0] * len(seeds)
        self.games: list[PlayedGame] = []
        self._open = [self._start(slot) for slot in range(len(seeds))]
        self._q: NDArray[np.float32] = np.zeros((len(seeds), 0), np.float32)
        self._actions: NDArray[np.int64] = np.zeros(0, np.int64)
        self._random: NDArray[np.bool_] = np.zeros(0, bool)

    def _start(self, slot: int) -> PlayedGame:
        game = PlayedGame(len(self.games), int(self._seeds[slot]), self._resets[slot], bytes(self._history[slot]))
        self.games.append(game)
        return game

    @torch.no_grad()
    def policy(self, observations: Tensor) -> Tensor:
        """Return the greedy actions, int64 (N,)."""
        q_values = self._network(observations)
        self._q = q_values.float().cpu().numpy()
        return q_values.argmax(1)

    def before_step(self, actions: NDArray[np.int64], random: NDArray[np.bool_]) -> None:
        """Note what is about to be played, shapes (N,)."""
        self._actions, self._random = actions, random

    def after_step(
        self, rewards: NDArray[Any], terminated: NDArray[Any], truncated: NDArray[Any], info: dict[str, NDArray[Any]]
    ) -> None:
        """Note what came of it, shapes (N,)."""
        for slot in range(len(self._seeds)):
            if info["is_reset"][slot]:
                self._history[slot].append(RESET)
                self._resets[slot] += 1
                self._open[slot] = self._start(slot)
                continue
            game, action = self._open[slot], int(self._actions[slot])
            self._history[slot].append(action)
            game.actions.append(action)
            game.random.append(bool(self._random[slot]))
            game.q_values.append(self._q[slot])
            game.rewards.append(float(rewards[slot]))
            game.truncated = bool(truncated[slot]) and not terminated[slot]


def play(
    q_values: Callable[[Tensor], Tensor],
    env: AtariVector,
    protocol: EvaluationProtocol,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[EvaluationResult, list[PlayedGame]]:
    """Evaluate as :func:`wn_rl.evaluation.episodes.evaluate` does; return the score and the games that count.

    Args:
        q_values: uint8 observations (N, 4, 84, 84) → Q-values (N, A).
        env: emulators used for nothing else.
        protocol: how long, and with which ε.
        seed: of the emulators and of the random actions.
        device: of the network.
    """
    recorder = Recorder(q_values, emulator_seeds(seed, env.num_envs, EVALUATION_STREAM))
    result = evaluate(
        recorder.policy,
        env,
        protocol,
        seed=seed,
        device=device,
        on_actions=recorder.before_step,
        on_step=recorder.after_step,
    )
    return result, recorder.games[: len(result.episodes)]
