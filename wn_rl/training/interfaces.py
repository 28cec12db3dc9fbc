"""What the training loop asks of an agent, and of the backend that does its computations."""

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
    """Means over the transitions of the updates since the last reading; ``updates`` is the number of these updates."""

    updates: int
    loss: float
    td_error: float
    q_value: float


class Agent(Protocol):
    """An algorithm; :class:`agents.dqn.DQN` is one. A :class:`Backend` does its computations."""

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
        """Return the replay indices of the first minibatch whose loss was not finite; None if all were."""

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient."""

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading, and reset them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the network's weights."""

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore weights and state."""


class Backend(Protocol):
    """What the loop asks of a backend, which does an agent's computations on a replay; see ``agents.backends``."""

    name: ClassVar[BackendName]
    detail: str
    reason: str

    @property
    def agent(self) -> Agent:
        """The agent whose work it does."""

    @property
    def q_network(self) -> Network:
        """The network that acts and that a checkpoint carries."""

    @property
    def updates(self) -> int:
        """Updates made so far."""

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observations, shape (N,), with ε of each; waits for them.

        Raises:
            NonFiniteLossError: the loss of an earlier update was not finite, which is only known now.
        """

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations."""

    def initialize(self, observations: Tensor) -> None:
        """Prepare for the first update, with observations from replay."""

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates in sequence, each on its own minibatch from the replay."""

    def copy_target(self) -> None:
        """Copy the network to the target network."""

    def is_finite(self) -> bool:
        """Return whether every weight is finite."""

    def offending_transitions(self) -> Tensor | None:
        """Return the replay indices of the first minibatch whose loss was not finite; None if all were."""

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient."""

    def measure_next_update(self) -> None:
        """Measure the effective learning rates of the next update."""

    def effective_learning_rates(self) -> dict[str, float]:
        """Return the effective learning rates of the measured update, by TensorBoard tag."""

    def measurement_state(self) -> dict[str, Any]:
        """Return whether the next update is to be measured, and the last measurement, for a checkpoint."""

    def load_measurement_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`measurement_state` returned."""

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading, and reset them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the network's weights."""

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore weights and state."""
