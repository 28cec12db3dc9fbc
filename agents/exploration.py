"""Exploration: actions from Q-values."""

from __future__ import annotations

import torch
from torch import Tensor


def epsilon_greedy(q_values: Tensor, epsilon: Tensor, generator: torch.Generator) -> Tensor:
    """Return ε-greedy actions, int64 (B,): random with probability ε, otherwise the one with the highest Q-value.

    The number of random numbers drawn does not depend on ε.

    Args:
        q_values: shape (B, actions).
        epsilon: shape (B,), on the device of ``q_values``.
        generator: on the device of ``q_values``.
    """
    batch, actions = q_values.shape
    explore = torch.rand(batch, device=q_values.device, generator=generator) < epsilon
    random = torch.randint(actions, (batch,), device=q_values.device, generator=generator)
    return torch.where(explore, random, q_values.argmax(1))
