"""A loss of your own, the squared TD error instead of Huber's: ``python -m docs.examples.own_loss`` trains it."""

from __future__ import annotations

from torch import Tensor

import wn_rl
from agents.dqn import DQN
from wn_rl.replay import Minibatch


class SquaredLossDQN(DQN):
    """Learns by ½ · δ², so that large TD errors have large gradients."""

    def td_loss_of(self, batch: Minibatch, q_values: Tensor, next_q_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss per transition, TD error, Q-value of the action taken), each of shape (B,)."""
        _, td_error, q_value = super().td_loss_of(batch, q_values, next_q_values)
        return 0.5 * td_error.square(), td_error, q_value


if __name__ == "__main__":
    wn_rl.train(agent=SquaredLossDQN, game="Breakout", param="wn", preset="quick", frames=40_000)
