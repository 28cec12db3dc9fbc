"""The target network. Between two copies it is fixed, so it can be computed with folded, plain weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wn_rl.networks import Network
from wn_rl.parameterizations import fold


class TargetNetwork:
    """Q̂ of Mnih et al. 2015: the Q-network at the last target copy.

    If its parameterization can be folded into the weights, a plain network computes it: the same values up to rounding,
    at the cost of a plain network.

    Attributes:
        network: with its parameterization, as in a checkpoint.
        folds: whether a plain network computes it.
        copies: number of calls of :meth:`load_state_dict`; if it has changed, anything computed from the weights
            is out of date.
    """

    def __init__(self, network: Network, *, folds: bool, precision: torch.dtype) -> None:
        """Wrap ``network``, which is not trained.

        Args:
            network: the target network.
            folds: its parameterization can be folded, and its statistics are fixed.
            precision: of the hidden layers.
        """
        self.network = network.requires_grad_(False)
        self.folds = folds
        self._precision = precision
        self._folded: Network | None = None
        self._keeps_addresses = False
        self.copies = 0

    def __call__(self, observations: Tensor) -> Tensor:
        """Return Q-values, shape (B, actions), of uint8 observations, (B, 4, 84, 84)."""
        q_values: Tensor
        if not self.folds:
            q_values = self.network(observations)
            return q_values
        if self._folded is None:
            self._folded = self._fold()
        q_values = self._folded(observations)
        return q_values

    def keep_addresses(self) -> None:
        """From now on keep the tensors at their addresses, on which a captured CUDA graph depends."""
        self._keeps_addresses = True
        if self.folds and self._folded is None:
            self._folded = self._fold()

    def load_state_dict(self, weights: Mapping[str, Any]) -> None:
        """Copy weights and buffers of a Q-network."""
        self.network.load_state_dict(weights)
        self.copies += 1
        if self._keeps_addresses and self._folded is not None:
            self._folded.load_state_dict(self._fold().state_dict())
        else:
            self._folded = None

    def _fold(self) -> Network:
        plain = fold(copy.deepcopy(self.network))
        if self._precision is torch.bfloat16:
            plain.round_weights(torch.bfloat16)
        return plain
