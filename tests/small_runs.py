"""Small runs on real emulators that tests stop and go on with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from agents.dqn import DQN
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.training.session import train


def tiny(**changes: object) -> TrainConfig:
    values: dict[str, Any] = {
        "game": "breakout",
        "frames": 2400,
        "num_envs": 3,
        "num_threads": 1,
        "hidden_units": 16,
        "batch_size": 4,
        "learning_starts": 100,
        "target_period": 60,
        "replay_capacity": 250,
        "epsilon_decay_steps": 200,
        "init_samples": 16,
        "evaluation_period": 170,
        "evaluation_episodes": 1,
        "evaluation_envs": 1,
        "max_frames_per_episode": 300,
        "log_period": 100,
        "precision": "float32",
        "reseed_period": 90,
    }
    return resolve(replace(load("quick"), **(values | changes)))


class Interrupted(DQN):
    """Sends this process a signal when it acts after so many updates: a method that every backend calls."""

    after: list[int]
    number = signal.SIGTERM

    def epsilon_greedy(self, q_values: Tensor, epsilon: Tensor) -> Tensor:
        if self.after and self.updates >= self.after[0]:
            self.after.pop(0)
            os.kill(os.getpid(), self.number)
        return super().epsilon_greedy(q_values, epsilon)


class EventFileClock:
    """The seconds in the names of TensorBoard's event files, by whose order it reads them, without waiting for them."""

    def __init__(self) -> None:
        self.ahead = 0

    def time(self) -> float:
        return time.time() + self.ahead


@contextmanager
def event_file_clock() -> Iterator[EventFileClock]:
    """A clock for the names of event files: put it a second ahead before a run that was just stopped goes on."""
    from tensorboard.summary.writer import event_file_writer

    clock = EventFileClock()
    with mock.patch.object(event_file_writer, "time", clock):
        yield clock


def stopped_run(directory: Path, config: TrainConfig, after: int = 60) -> None:
    Interrupted.after = [after]
    assert train(config, Interrupted, directory, quiet=True) == 143


def small_flags(frames: int) -> list[str]:
    config = tiny(frames=frames)
    keys = (
        "game frames num_envs num_threads hidden_units batch_size learning_starts target_period replay_capacity "
        "epsilon_decay_steps init_samples evaluation_period evaluation_episodes evaluation_envs "
        "max_frames_per_episode log_period precision"
    )
    flags = [word for key in keys.split() for word in (f"--{key.replace('_', '-')}", str(getattr(config, key)))]
    return ["--preset", "quick", "--param", "wn", *flags]
