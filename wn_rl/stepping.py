"""What a vector step asks of the agent: actions, and the updates that it owes. One way for a CPU, one for a GPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.replay import Minibatch, Replay


class Stepper(Protocol):
    """Acts and updates for one agent and one replay."""

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observations, shape (N,), with ε of each; waits for them.

        Raises:
            NonFiniteLossError: an update before this one had a loss that is not finite, and it can only be told now.
        """

    def update(self) -> None:
        """Make one update on a minibatch from the replay."""


class Learner(Protocol):
    """The part of an agent that :class:`PlainStepper` needs."""

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return ε-greedy actions on the device."""

    def update(self, batch: Minibatch) -> None:
        """Make one update."""


class PlainStepper:
    """Calls the agent's own methods; on a CPU there is nothing to gain by more."""

    def __init__(self, agent: Learner, replay: Replay, batch_size: int) -> None:
        """Join the two; ``batch_size`` transitions per update."""
        self.agent = agent
        self.replay = replay
        self.batch_size = batch_size

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions, shape (N,)."""
        actions: NDArray[np.int64] = self.agent.act(self.replay.observations(), epsilon).cpu().numpy()
        return actions

    def update(self) -> None:
        """Make one update."""
        self.agent.update(self.replay.sample(self.batch_size))
