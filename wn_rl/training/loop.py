"""The training loop: emulators, an agent's backend and replay, one vector step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wn_rl.atari.action_log import AUTO_RESET, RESEEDED, ActionLog, History
from wn_rl.atari.env import FRAME_SKIP, AtariVector
from wn_rl.atari.restore import ReplayedStep, replay_actions
from wn_rl.config import TrainConfig
from wn_rl.replay import Replay
from wn_rl.training.interfaces import Agent, Backend
from wn_rl.training.schedule import TrainEvent, epsilon_at, scheduled_events, training_seeds


@dataclass(frozen=True)
class FinishedEpisode:
    """A training episode: the frame count at which it ended, its raw return, its length in agent steps."""

    frames: int
    episode_return: float
    length: int


class TrainingLoop:
    """Emulators, an agent's backend and replay, one vector step at a time.

    Agent steps are numbered 1, 2, 3, … across the emulators in slot order; a step that was an auto-reset has no
    number. In each vector step all emulators act on the same network; while they run, the updates scheduled at the
    agent steps of this vector step are made from what the replay held before it. Logging, evaluation and checkpoints
    are outside the loop and draw nothing from these generators.
    """

    def __init__(
        self,
        config: TrainConfig,
        env: AtariVector,
        backend: Backend,
        replay: Replay,
        action_log: ActionLog | None = None,
    ) -> None:
        """Join the parts; call :meth:`start` or :meth:`restore` next. Without an action log a run cannot be resumed."""
        self.config = config
        self.env = env
        self.backend = backend
        self.replay = replay
        self.action_log = action_log
        self.agent_steps = 0
        self.vector_steps = 0
        self._ended = np.zeros(env.num_envs, bool)
        self._seed_labels = np.zeros(env.num_envs, np.int64)

    @property
    def agent(self) -> Agent:
        """The agent that learns."""
        return self.backend.agent

    @property
    def frames(self) -> int:
        """Emulator frames so far: 4 per agent step (an episode's last step may have had fewer)."""
        return self.agent_steps * FRAME_SKIP

    @property
    def epsilon(self) -> float:
        """ε of the next agent step."""
        return float(epsilon_at(self.config, np.array([self.agent_steps + 1]))[0])

    @property
    def oldest_vector_step(self) -> int:
        """Number of the oldest vector step whose frames the replay holds."""
        return max(self.vector_steps - self.replay.num_rows + 1, 0)

    def start(self) -> None:
        """Reset the emulators for a new run."""
        observations, _ = self.env.reset(seed=self._seeds(0))
        self.replay.start(observations[:, -1])

    def restore(self, history: History, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Restore emulators, replay and counters as they were at the end of ``history``, by replaying its actions.

        Args:
            history: the actions of the run.
            on_progress: called with (vector steps replayed, of how many); may raise to stop.

        Raises:
            CheckpointError: the emulators do not do what they did in the run.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more threads would copy frames no faster and take cores from the emulators
        try:
            self._restore(history, on_progress)
        finally:
            torch.set_num_threads(threads)

    def _restore(self, history: History, on_progress: Callable[[int, int], None]) -> None:
        self.vector_steps = history.end_row
        first_row = self.oldest_vector_step
        before = history.state(first_row)
        for step in replay_actions(
            self.env,
            history,
            first_row,
            self._seeds,
            sticky=self.config.sticky_actions > 0,
            on_progress=on_progress,
        ):
            if isinstance(step, ReplayedStep):
                terminals = self._terminals(step.terminated, step.info)
                self.replay.add(step.actions, step.rewards, terminals, step.frames, step.info["is_reset"])
                self._ended = step.terminated | step.truncated
            else:
                self.replay.restore_at(first_row, before.steps, first_row - before.started, step)
        now = history.state(history.end_row)
        self.agent_steps = now.steps
        self._seed_labels = now.seed_label.copy()

    def vector_step(self) -> list[FinishedEpisode]:
        """Step every emulator once, make the scheduled updates, and return the episodes that ended."""
        plays = ~self._ended  # the others are reset by this step
        agent_steps = self.agent_steps + np.cumsum(plays)  # number of each emulator's agent step
        actions = np.where(plays, self.backend.act(epsilon_at(self.config, agent_steps)), 0)
        self.env.send(actions)
        reseeded = self._reseed_due()
        if self.action_log is not None:
            logged = np.where(plays, actions, np.where(reseeded, RESEEDED, AUTO_RESET))
            self.action_log.append(logged.astype(np.uint8))
        first, last = self.agent_steps + 1, int(agent_steps[-1])
        for event, same in groupby(event for _, event in scheduled_events(self.config, first, last)):
            if event is TrainEvent.UPDATE:
                self.backend.update(len(list(same)))
            elif event is TrainEvent.TARGET_COPY:
                for _ in same:
                    self.backend.copy_target()
            else:
                self.backend.initialize(self.replay.sample(self.config.init_samples).observations)
        observations, rewards, terminated, truncated, info = self.env.recv()
        frames = observations[:, -1]
        if reseeded.any():
            self._seed_labels[reseeded] = label = self.agent_steps // self.config.reseed_period
            renewed = self.env.restart(reseeded, self._seeds(label)[reseeded])[:, -1]
            frames = np.where(reseeded[:, None, None], renewed, frames)
        self.replay.add(actions, rewards, self._terminals(terminated, info), frames, info["is_reset"])
        self.vector_steps += 1
        self.agent_steps = last
        self._ended = terminated | truncated
        return [
            FinishedEpisode(
                int(agent_steps[slot]) * FRAME_SKIP,
                float(info["episode_return"][slot]),
                int(info["episode_length"][slot]),
            )
            for slot in np.flatnonzero(self._ended)
        ]

    def _seeds(self, label: int) -> NDArray[np.int32]:
        return training_seeds(self.config, label)

    def _reseed_due(self) -> NDArray[np.bool_]:
        """Return which emulators this step re-seeds: with sticky actions, one period after their last seeding.

        Otherwise a resumed run would have to replay every action of the run to restore the emulators.
        """
        if self.config.sticky_actions == 0:
            return np.zeros_like(self._ended)
        return self._ended & (self.agent_steps // self.config.reseed_period > self._seed_labels)

    def _terminals(self, terminated: NDArray[np.bool_], info: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        return terminated | info["life_loss"] if self.config.life_loss_terminal else terminated

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the position in the action log, if any, which is synced to the disk first."""
        if self.action_log is None:
            return {"agent_steps": self.agent_steps}
        mark = self.action_log.mark()
        return {"agent_steps": self.agent_steps, "vector_steps": mark.rows, "action_log": mark.digest}
