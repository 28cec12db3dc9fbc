"""An agent of your own, Double DQN (van Hasselt et al. 2016): ``python -m docs.examples.own_agent`` trains it."""

from __future__ import annotations

import torch
from torch import Tensor

import wn_rl
from agents.dqn import DQN
from wn_rl.replay import Minibatch


class DoubleDQN(DQN):
    """The Q-network chooses the next action, the target network says what it is worth (equation 4 there)."""

    def td_loss(self, batch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss per transition, TD error, Q-value of the action taken), each of shape (B,)."""
        q_values, next_q_values = self.forward(batch)  # Q(s, ·) and Q̂(s', ·)
        with torch.no_grad(), self.autocast():
            chosen = self.q_network(batch.next_observations).argmax(1, keepdim=True)
        # One column is its own maximum, so the target of DQN becomes r + γ · Q̂(s', argmax_a Q(s', a)).
        return self.td_loss_of(batch, q_values, next_q_values.gather(1, chosen))


if __name__ == "__main__":
    wn_rl.train(agent=DoubleDQN, game="Breakout", param="wn", preset="quick", frames=40_000)
