"""What the training loop asks of an agent and of the backend that carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.config import BackendName, TrainConfig
from wn_rl.networks import Network
from wn_rl.replay import Minibatch


@dataclass(frozen=True)
class Statistics:
    """Means over the transitions of the updates since the last reading; ``updates`` is how many these were."""

    updates: int
    loss: float
    td_error: float
    q_value: float


class Agent(Protocol):
    """An algorithm; :class:`agents.dqn.DQN` is one. A :class:`Backend` carries it out."""

    config: TrainConfig
    device: torch.device
    updates: int

    @property
    def q_network(self) -> Network:
        """The network that acts and that a checkpoint carries."""

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations, (B, 4, 84, 84)."""

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return ε-greedy actions, int64 (B,), on the device; ``epsilon`` has shape (B,)."""

    def initialize(self, observations: Tensor) -> None:
        """Prepare for the first update, with observations from replay."""

    def update(self, batch: Minibatch) -> None:
        """Make one update, and count it."""

    def copy_target(self) -> None:
        """Copy the network to the target network."""

    def is_finite(self) -> bool:
        """Return whether every weight is finite."""

    def offending_transitions(self) -> Tensor | None:
        """Return the numbers in replay of the first minibatch whose loss was not finite."""

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient."""

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the network's weights."""

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore weights and state."""


class Backend(Protocol):
    """What the loop needs of whoever carries an agent out on a replay; ``agents.backends`` has them."""

    name: ClassVar[BackendName]
    detail: str
    reason: str

    @property
    def agent(self) -> Agent:
        """The agent that is carried out."""

    @property
    def q_network(self) -> Network:
        """The network that acts and that a checkpoint carries."""

    @property
    def updates(self) -> int:
        """Updates made so far."""

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observations, shape (N,), with ε of each; waits for them.

        Raises:
            NonFiniteLossError: an update before this one had a loss that is not finite, and it can only be told now.
        """

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations."""

    def initialize(self, observations: Tensor) -> None:
        """Prepare for the first update, with observations from replay."""

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates one after the other, each on a minibatch of its own from the replay."""

    def copy_target(self) -> None:
        """Copy the network to the target network."""

    def is_finite(self) -> bool:
        """Return whether every weight is finite."""

    def offending_transitions(self) -> Tensor | None:
        """Return the numbers in replay of the first minibatch whose loss was not finite."""

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient."""

    def watch_next_update(self) -> None:
        """Measure how far the next update moves each layer's weight."""

    def effective_learning_rates(self) -> dict[str, float]:
        """Return what the watched update did, by tag."""

    def watch_state(self) -> dict[str, Any]:
        """Return whether the next update is watched, and what the last watched one did."""

    def load_watch_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`watch_state` returned."""

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the network's weights."""

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore weights and state."""
