"""The equations of the algorithms, one function each: symbols, shapes and source, no state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def td_targets(rewards: Tensor, terminals: Tensor, next_q_values: Tensor, gamma: float) -> Tensor:
    """Return y = r + γ · max_a' Q̂(s', a'), or r where s' is terminal (Mnih et al. 2015, algorithm 1).

    Args:
        rewards: r, shape (B,), already clipped.
        terminals: bool, shape (B,).
        next_q_values: Q̂(s', ·), of the target network, shape (B, actions).
        gamma: γ, discount per agent step.

    Returns:
        Shape (B,), dtype of ``next_q_values``.
    """
    return rewards + gamma * next_q_values.amax(1) * (~terminals)


def huber(td_error: Tensor, delta: float = 1.0) -> Tensor:
    """Return the Huber loss: ½x² within ±δ and δ(|x| − ½δ) beyond, the clipped TD error of Mnih et al. 2015.

    Args:
        td_error: x, any shape.
        delta: δ; the gradient is clipped to ±δ.
    """
    return nn.functional.huber_loss(td_error, torch.zeros_like(td_error), reduction="none", delta=delta)
