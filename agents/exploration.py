"""How an agent chooses actions from Q-values."""

from __future__ import annotations

import torch
from torch import Tensor


def epsilon_greedy(q_values: Tensor, epsilon: Tensor, generator: torch.Generator) -> Tensor:
    """Return actions, int64 (B,): random with probability ε, else the one of the highest Q-value.

    The same random numbers are drawn whatever ε is.

    Args:
        q_values: shape (B, actions).
        epsilon: shape (B,), on the device of ``q_values``.
        generator: on the device of ``q_values``.
    """
    batch, actions = q_values.shape
    explore = torch.rand(batch, device=q_values.device, generator=generator) < epsilon
    random = torch.randint(actions, (batch,), device=q_values.device, generator=generator)
    return torch.where(explore, random, q_values.argmax(1))
