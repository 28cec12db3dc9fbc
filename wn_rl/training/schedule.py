"""What happens at which agent step, as functions of the configuration alone.

- Initialization, updates and target copies: :func:`scheduled_events`; the loop (``loop.py``) makes them.
- Evaluations, points of the log and checkpoints: :func:`period_ended`; ``session.py`` makes them between vector steps.
- ε: :func:`epsilon_at`. Seeds of the emulators: :func:`training_seeds`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from wn_rl.atari.env import emulator_seeds
from wn_rl.config import TrainConfig

TRAINING_STREAM = 0
"""Label that separates training's random numbers from evaluation's (stream 1)."""


class TrainEvent(enum.Enum):
    """What can be scheduled at an agent step."""

    INITIALIZE = "initialize"
    UPDATE = "update"
    TARGET_COPY = "target copy"


def scheduled_events(config: TrainConfig, first: int, last: int) -> Iterator[tuple[int, TrainEvent]]:
    """Yield (agent step, event) for everything scheduled at the agent steps ``first`` … ``last``, in order.

    An update at each step whose number is a multiple of ``update_period``, then a target copy if it is a multiple of
    ``target_period``. Nothing happens before ``learning_starts``; the first event there is the initialization.
    """
    for step in range(max(first, config.learning_starts), last + 1):
        if step == config.learning_starts:
            yield step, TrainEvent.INITIALIZE
        if step % config.update_period == 0:
            yield step, TrainEvent.UPDATE
        if step % config.target_period == 0:
            yield step, TrainEvent.TARGET_COPY


def period_ended(period: int, before: int, now: int) -> bool:
    """Return whether a multiple of ``period`` agent steps lies behind ``before`` and not behind ``now``.

    Evaluations, points of the log and checkpoints are made when this is so: between two vector steps, and thus up to
    N − 1 agent steps late with N emulators. They change no weight.
    """
    return now // period > before // period


def updates_owed(config: TrainConfig, first: int, last: int) -> int:
    """Return how many updates :func:`scheduled_events` yields for the agent steps ``first`` … ``last``."""
    before = max(first, config.learning_starts) - 1
    return max(last // config.update_period - before // config.update_period, 0)


def epsilon_at(config: TrainConfig, steps: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return ε of each agent step: ``epsilon_start`` until ``learning_starts``, then linear to ``epsilon_end``."""
    fraction = np.clip((steps - config.learning_starts) / max(config.epsilon_decay_steps, 1), 0.0, 1.0)
    return (config.epsilon_start + (config.epsilon_end - config.epsilon_start) * fraction).astype(np.float32)


def training_seeds(config: TrainConfig, label: int) -> NDArray[np.int32]:
    """Return the seeds of all N emulators for the seeding with this ``label``; 0 is the start of the run."""
    return emulator_seeds(config.seed, config.num_envs, TRAINING_STREAM, label)
