"""The reference backend: the agent's own methods on minibatches from the replay, with gradients by autograd."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wn_rl.errors import NonFiniteLossError
from wn_rl.replay import Replay
from wn_rl.training import Agent

from ..dqn import DQN
from ..optimizers import CompiledAdamax
from .interface import Backend, register


@register("eager")
class Eager(Backend):
    """Calls the agent's methods; supports every agent.

    With ``compile: on``, on a CPU, adamax's step is compiled by torch.compile.
    """

    def __init__(self, agent: Agent, replay: Replay) -> None:
        """Join the two."""
        super().__init__(agent, replay)
        if isinstance(agent, DQN) and agent.config.compile == "on" and CompiledAdamax.replaces(agent.optimizer):
            agent.optimizer = CompiledAdamax.like(agent.optimizer)
            self.detail = "adamax compiled by torch.compile"

    @classmethod
    def unsupported(cls, agent: Agent, replay: Replay) -> str:
        """Return an empty text: everything is supported."""
        del agent, replay
        return ""

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions, shape (N,)."""
        actions: NDArray[np.int64] = self.agent.act(self.replay.observations(), epsilon).cpu().numpy()
        if self.agent.device.type != "cpu" and self.agent.offending_transitions() is not None:
            raise NonFiniteLossError(f"the loss of one of the first {self.updates:,} updates is not finite")
        return actions

    def make_updates(self, count: int) -> None:
        """Make ``count`` updates."""
        for _ in range(count):
            self.agent.update(self.replay.sample(self.agent.config.batch_size))
