"""The target network between two copies: fixed, so that it need not be computed through its parameterization."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wn_rl.networks import Network
from wn_rl.parameterizations import fold


class TargetNetwork:
    """Q̂ of Mnih et al. 2015: the Q-network of the last copy.

    Where its parameterization can be folded into the weights it is computed by a plain network: the same values but for
    rounding, at the price of a plain network.

    Attributes:
        network: with its parameterization, as a checkpoint holds it.
        folds: whether it is computed by a plain network.
        copies: how many times :meth:`load_state_dict` was called: whoever keeps what it computed of the weights, say
            another copy of them, compares.
    """

    def __init__(self, network: Network, *, folds: bool, precision: torch.dtype) -> None:
        """Wrap ``network``, which nobody trains.

        Args:
            network: the target network.
            folds: its parameterization can be folded, and its statistics stay as they are.
            precision: in which the hidden layers are computed.
        """
        self.network = network.requires_grad_(False)
        self.folds = folds
        self._precision = precision
        self._folded: Network | None = None
        self._keeps_place = False
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

    def keep_place(self) -> None:
        """Never move the tensors that are computed with, from now on: what was recorded finds them where they were."""
        self._keeps_place = True
        if self.folds and self._folded is None:
            self._folded = self._fold()

    def load_state_dict(self, weights: Mapping[str, Any]) -> None:
        """Copy weights and buffers of a Q-network."""
        self.network.load_state_dict(weights)
        self.copies += 1
        if self._keeps_place and self._folded is not None:
            self._folded.load_state_dict(self._fold().state_dict())
        else:
            self._folded = None

    def _fold(self) -> Network:
        plain = fold(copy.deepcopy(self.network))
        if self._precision is torch.bfloat16:
            plain.round_weights(torch.bfloat16)
        return plain
