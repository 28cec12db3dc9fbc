"""A backend of your own: ``python train.py --game Breakout --backend docs.examples.own_backend:InParts``."""

from __future__ import annotations

from typing import ClassVar

import torch

from agents.backends import register
from agents.backends.eager import Eager
from agents.dqn import DQN
from wn_rl.replay import Minibatch, Replay
from wn_rl.training import Agent


@register("in_parts")
class InParts(Eager):
    """Computes a minibatch's gradient in parts, one after the other: only one part's activations are in memory.

    The result is that of ``eager`` up to rounding, since a sum over transitions is taken in another order.
    """

    agent: DQN
    parts: ClassVar[int] = 2

    @classmethod
    def unsupported(cls, agent: Agent, replay: Replay) -> str:
        """Return why this backend cannot compute the updates of ``agent``; an empty text if it can."""
        del replay
        if type(agent) is not DQN:
            return f"{type(agent).__name__} may have an update of its own"
        if not agent.parameterization.batch_independent:
            return "its parameterization needs the statistics of the whole minibatch"
        return ""

    def make_updates(self, count: int) -> None:
        """Make ``count`` updates."""
        for _ in range(count):
            self._update(self.replay.sample(self.agent.config.batch_size))

    def _update(self, batch: Minibatch) -> None:
        agent, size = self.agent, len(batch.actions)
        divisor = 1 if agent.config.loss_reduction == "sum" else size
        with agent.training_mode():
            agent.optimizer.zero_grad(set_to_none=True)
            found = []
            for indices in torch.arange(size, device=agent.device).chunk(self.parts):
                part = Minibatch(
                    batch.observations[indices],
                    batch.actions[indices],
                    batch.rewards[indices],
                    batch.next_observations[indices],
                    batch.terminals[indices],
                )
                losses, td_error, q_value = agent.td_loss(part)
                (losses.sum() / divisor).backward()  # type: ignore[no-untyped-call]
                found.append((losses.detach(), td_error.detach(), q_value.detach()))
            agent.reduce(batch, *(torch.cat(tensors) for tensors in zip(*found, strict=True)))  # for the log
            agent.optimizer.step()
        agent.count_updates(1)
