"""What a vector step asks of the agent: actions, and the updates that it owes. One way for a CPU, one for a GPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.replay import DrawnMinibatch, Minibatch, Replay


class Stepper(Protocol):
    """Acts and updates for one agent and one replay."""

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observations, shape (N,), with ε of each; waits for them.

        Raises:
            NonFiniteLossError: an update before this one had a loss that is not finite, and it can only be told now.
        """

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates one after the other, each on a minibatch of its own from the replay."""


class Learner(Protocol):
    """The part of an agent that :class:`PlainStepper` needs."""

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return ε-greedy actions on the device."""

    def update(self, batch: Minibatch) -> None:
        """Make one update."""


class PlainStepper:
    """Calls the agent's own methods."""

    def __init__(self, agent: Learner, replay: Replay, batch_size: int) -> None:
        """Join the two; ``batch_size`` transitions per update."""
        self.agent = agent
        self.replay = replay
        self.batch_size = batch_size

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions, shape (N,)."""
        actions: NDArray[np.int64] = self.agent.act(self.replay.observations(), epsilon).cpu().numpy()
        return actions

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates."""
        for _ in range(count):
            self.agent.update(self.replay.sample(self.batch_size))


class SeveralLearner(Learner, Protocol):
    """The part of an agent that :class:`TogetherStepper` needs."""

    def update_several(self, batch: DrawnMinibatch, count: int) -> None:
        """Make ``count`` updates, on the transitions of ``batch`` one after the other."""


class TogetherStepper(PlainStepper):
    """Makes the updates that a vector step owes in one call, on the same draws as one by one.

    An update leaves nothing of the interpreter in the processor's caches, so between two of them little Python costs
    much.
    """

    def __init__(self, agent: SeveralLearner, replay: Replay, batch_size: int) -> None:
        """Join the two; ``batch_size`` transitions per update."""
        super().__init__(agent, replay, batch_size)
        self._several = agent

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates."""
        if not count:
            return
        batch = DrawnMinibatch(self.replay.kept, self.replay.draw(count * self.batch_size))
        self._several.update_several(batch, count)
