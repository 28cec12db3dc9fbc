"""An agent together with its backend, for tests that update on minibatches of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.backends import make_backend
from agents.backends.interface import Backend
from agents.dqn import DQN
from wn_rl.config import TrainConfig
from wn_rl.replay import Minibatch, Replay


class Given:
    """In place of a replay: draws the minibatch that a test put there."""

    num_envs = 1
    resident = True
    batch: Minibatch

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Minibatch:
        return self.batch


class Carried:
    """What a backend or, where it has no say, the agent has; :meth:`update` takes a minibatch."""

    def __init__(self, agent: DQN, replay: Replay | None = None) -> None:
        self.agent = agent
        self.given = Given()
        self.backend: Backend = make_backend(agent, self.given if replay is None else replay)  # type: ignore[arg-type]

    def update(self, batch: Minibatch) -> None:
        replay, self.backend.replay = self.backend.replay, self.given  # type: ignore[assignment]
        self.given.batch = batch
        try:
            self.backend.update()
        finally:
            self.backend.replay = replay

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.backend.load_state_dict(weights, state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend if hasattr(self.backend, name) else self.agent, name)


def carried(config: TrainConfig, num_actions: int = 4, kind: type[DQN] = DQN, replay: Replay | None = None) -> Carried:
    """On the CPU; ``compile: on`` stands for the fastest backend, ``off`` for eager."""
    if config.backend == "auto" and config.compile == "off":
        config = replace(config, backend="eager")
    return Carried(kind(config, num_actions, torch.device("cpu")), replay)
