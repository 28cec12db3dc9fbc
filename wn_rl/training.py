"""The training loop: what happens at which agent step."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.atari.env import FRAME_SKIP, AtariVector, emulator_seeds
from wn_rl.config import TrainConfig
from wn_rl.networks import QNetwork
from wn_rl.replay import Minibatch, Replay

TRAINING_STREAM = 0
"""Label that keeps training's random numbers apart from evaluation's (stream 1)."""


@dataclass(frozen=True)
class Statistics:
    """Means over the transitions of the updates since the last reading; ``updates`` is how many these were."""

    updates: int
    loss: float
    td_error: float
    q_value: float


class Agent(Protocol):
    """What the loop needs of an agent; :class:`agents.dqn.DQN` is one."""

    updates: int

    @property
    def q_network(self) -> QNetwork:
        """The network that acts and that a checkpoint carries."""

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return ε-greedy actions on the device."""

    def greedy(self, observations: Tensor) -> Tensor:
        """Return greedy actions."""

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values."""

    def initialize(self, observations: Tensor) -> None:
        """Prepare for the first update, with observations from replay."""

    def update(self, batch: Minibatch) -> None:
        """Make one update."""

    def copy_target(self) -> None:
        """Copy the network to the target network."""

    def is_finite(self) -> bool:
        """Return whether every weight is finite."""

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient."""

    def watch_next_update(self) -> None:
        """Measure how far the next update moves each layer's weight."""

    def watched_update(self) -> dict[str, float]:
        """Return what the watched update did, by tag."""

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the network's weights."""

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore weights and state."""


class Event(enum.Enum):
    """What an agent step can owe."""

    INITIALIZE = "initialize"
    UPDATE = "update"
    TARGET_COPY = "target copy"


def owed(config: TrainConfig, first: int, last: int) -> Iterator[tuple[int, Event]]:
    """Yield (agent step, event) for what the agent steps ``first`` … ``last`` owe, in order.

    An update when the step's number is a multiple of ``update_period``, then a target copy when it is one of
    ``target_period``; nothing before ``learning_starts``, whose first event is the initialization.
    """
    for step in range(max(first, config.learning_starts), last + 1):
        if step == config.learning_starts:
            yield step, Event.INITIALIZE
        if step % config.update_period == 0:
            yield step, Event.UPDATE
        if step % config.target_period == 0:
            yield step, Event.TARGET_COPY


def epsilon_at(config: TrainConfig, steps: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return ε of each agent step: ``epsilon_start`` until ``learning_starts``, then linear to ``epsilon_end``."""
    fraction = np.clip((steps - config.learning_starts) / max(config.epsilon_decay_steps, 1), 0.0, 1.0)
    return (config.epsilon_start + (config.epsilon_end - config.epsilon_start) * fraction).astype(np.float32)


@dataclass(frozen=True)
class FinishedEpisode:
    """A training episode: the frame count at which it ended, its raw return, its length in agent steps."""

    frames: int
    episode_return: float
    length: int


class TrainingLoop:
    """Emulators, agent and replay, one vector step at a time.

    Agent steps are numbered 1, 2, 3, … across the emulators in slot order; a step that was an auto-reset has no
    number. In each vector step all emulators act on the same network; while they run, the updates owed by the
    numbers of this vector step are made from what the replay held before it. Logging, evaluation and checkpoints
    stay outside and draw nothing from these generators.
    """

    def __init__(self, config: TrainConfig, env: AtariVector, agent: Agent, replay: Replay) -> None:
        """Join the parts; :meth:`start` begins."""
        self.config = config
        self.env = env
        self.agent = agent
        self.replay = replay
        self.agent_steps = 0
        self.first_owing_step = 0
        self._ended = np.zeros(env.num_envs, bool)

    @property
    def frames(self) -> int:
        """Emulator frames so far: 4 per agent step (an episode's last step may have had fewer)."""
        return self.agent_steps * FRAME_SKIP

    @property
    def epsilon(self) -> float:
        """ε of the next agent step."""
        return float(epsilon_at(self.config, np.array([self.agent_steps + 1]))[0])

    def start(self) -> None:
        """Reset the emulators; after a resume at ``agent_steps`` > 0 with seeds of their own."""
        stream = (TRAINING_STREAM,) if self.agent_steps == 0 else (TRAINING_STREAM, self.agent_steps)
        observations, _ = self.env.reset(seed=emulator_seeds(self.config.seed, self.env.num_envs, *stream))
        self.replay.start(observations[:, -1])
        self._ended[:] = False
        if self.agent_steps > 0:
            # Frames are not part of a checkpoint: let the replay fill as it did before the first update.
            refill = min(self.config.learning_starts, self.config.replay_capacity - self.env.num_envs)
            self.first_owing_step = self.agent_steps + max(refill, self.env.num_envs + 1)

    def vector_step(self) -> list[FinishedEpisode]:
        """Step every emulator once, make the updates owed, and return the episodes that ended."""
        plays = ~self._ended  # the others are reset by this step
        numbers = self.agent_steps + np.cumsum(plays)
        actions = self.agent.act(self.replay.observations(), epsilon_at(self.config, numbers)).cpu().numpy()
        self.env.send(actions)
        first, last = self.agent_steps + 1, int(numbers[-1])
        for _, event in owed(self.config, max(first, self.first_owing_step), last):
            if event is Event.UPDATE:
                self.agent.update(self.replay.sample(self.config.batch_size))
            elif event is Event.TARGET_COPY:
                self.agent.copy_target()
            else:
                self.agent.initialize(self.replay.sample(self.config.init_samples).observations)
        observations, rewards, terminated, truncated, info = self.env.recv()
        terminals = terminated | info["life_loss"] if self.config.life_loss_terminal else terminated
        self.replay.add(actions, rewards, terminals, observations[:, -1], info["is_reset"])
        self.agent_steps = last
        self._ended = terminated | truncated
        return [
            FinishedEpisode(
                int(numbers[slot]) * FRAME_SKIP,
                float(info["episode_return"][slot]),
                int(info["episode_length"][slot]),
            )
            for slot in np.flatnonzero(self._ended)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {"agent_steps": self.agent_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self.agent_steps = int(state["agent_steps"])
