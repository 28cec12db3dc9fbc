"""The interface of a backend, between the training loop and the code that computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl import diagnostics
from wn_rl.config import BackendName
from wn_rl.networks import Network
from wn_rl.parameterizations.registry import Registry
from wn_rl.replay import Replay
from wn_rl.training import Agent, Statistics


class Backend(ABC):
    """Does the computations of one agent on one replay: acting, updates, target copies.

    An agent defines the algorithm; how it is computed belongs here. Every backend computes what ``eager`` computes on
    the same minibatches, up to rounding, and says what it does not support (:meth:`unsupported`). A backend may give
    the agent another optimizer, with the same state dict.

    Attributes:
        name: its value of ``--backend``.
        agent: the agent.
        replay: from which it samples.
        detail: a few words on how it computes, for the line that reports the choice; may be empty.
        reason: why it was chosen.
    """

    name: ClassVar[BackendName]

    def __init__(self, agent: Agent, replay: Replay) -> None:
        """Join agent and replay, which :meth:`unsupported` must have accepted."""
        self.agent = agent
        self.replay = replay
        self.detail = ""
        self.reason = ""
        self._measuring = False
        self._measured: dict[str, float] = {}

    @classmethod
    @abstractmethod
    def unsupported(cls, agent: Agent, replay: Replay) -> str:
        """Return why this backend does not support ``agent``; an empty text if it does."""

    @abstractmethod
    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observation of each emulator, shape (N,), with ε of each.

        The only synchronization with the device in a vector step.

        Raises:
            NonFiniteLossError: the loss of an earlier update was not finite, which is only known now.
        """

    @abstractmethod
    def make_updates(self, count: int) -> None:
        """Make ``count`` ≥ 1 updates in sequence, each on its own minibatch, and count them.

        Raises:
            NonFiniteLossError: the loss of one is not finite, if that is known at once.
        """

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations, (B, 4, 84, 84)."""
        return self.agent.q_values(observations)

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates; the first is measured if :meth:`measure_next_update` asked for it."""
        if count and self._measuring:
            before = diagnostics.weights(self.agent.q_network)
            self.measured_update()
            self._measured = diagnostics.effective_learning_rate_tags(before, self.agent.q_network)
            self._measuring = False
            count -= 1
        if count:
            self.make_updates(count)

    def measured_update(self) -> None:
        """Make the update that is measured."""
        self.make_updates(1)

    def initialize(self, observations: Tensor) -> None:
        """Prepare the agent for the first update, with observations from replay, uint8 (B, 4, 84, 84)."""
        self.agent.initialize(observations)

    def copy_target(self) -> None:
        """Copy the Q-network to the target network."""
        self.agent.copy_target()

    # --- reports -------------------------------------------------------------------------------------------------

    def is_finite(self) -> bool:
        """Return whether every weight is a finite number; waits for the device."""
        return self.agent.is_finite()

    @property
    def q_network(self) -> Network:
        """The network that acts and that a checkpoint holds."""
        return self.agent.q_network

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.agent.updates

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading and reset them; waits for the device."""
        return self.agent.read_statistics()

    def gradient_norm(self) -> float:
        """Return the 2-norm of the last update's gradient, NaN before the first; waits for the device."""
        self.write_gradients()
        return self.agent.gradient_norm()

    def write_gradients(self) -> None:  # noqa: B027 - most backends have nothing to do
        """Set the parameters' ``.grad`` to the gradients of the last update."""

    def measure_next_update(self) -> None:
        """Measure the effective learning rates of the next update, which then waits for the device."""
        self._measuring = True

    def effective_learning_rates(self) -> dict[str, float]:
        """Return the effective learning rates of the measured update, by TensorBoard tag; empty before there is one."""
        return self._measured

    def measurement_state(self) -> dict[str, Any]:
        """Return whether the next update is to be measured, and the last measurement, for a checkpoint."""
        values = [self._measured[tag] for tag in sorted(self._measured)]
        return {"measuring": int(self._measuring), "measured": torch.tensor(values, dtype=torch.float64)}

    def load_measurement_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`measurement_state` returned."""
        weights = diagnostics.weights(self.agent.q_network)
        tags = sorted(diagnostics.effective_learning_rate_tags(weights, self.agent.q_network))
        values = state["measured"].tolist()
        self._measuring = bool(state["measuring"])
        self._measured = dict(zip(tags, values, strict=True)) if values else {}

    def offending_transitions(self) -> Tensor | None:
        """Return the replay indices of the first minibatch whose loss was not finite, int64 (B,); None if all were."""
        return self.agent.offending_transitions()

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the agent's state without the Q-network's weights."""
        self.write_gradients()
        return self.agent.state_dict()

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore the Q-network's weights and the state."""
        self.agent.load_state_dict(weights, state)


REGISTRY: Registry[Backend] = Registry("backend", Backend)  # type: ignore[type-abstract]
register = REGISTRY.register
"""Enter a :class:`Backend` subclass under the name that ``--backend`` takes (a class decorator)."""


def overridden(agent: object, base: type, names: Iterable[str]) -> list[str]:
    """Return which of the methods ``names`` of ``base`` the agent overrides, in that order."""
    return [
        name for name in names if getattr(type(agent), name, None) is not getattr(base, name) or name in vars(agent)
    ]


def subclass_problem(agent: object, base: type, names: Iterable[str]) -> str:
    """Return a text that names the methods of ``names`` that ``agent`` overrides; empty if there are none."""
    if not isinstance(agent, base):
        return f"{type(agent).__name__} is not a subclass of {base.__name__}"
    own = overridden(agent, base, names)
    if not own:
        return ""
    return f"{type(agent).__name__} overrides {', '.join(own)}"
