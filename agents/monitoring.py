"""Monitoring of updates: the means of the loss, and the first minibatch whose loss was not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wn_rl.errors import NonFiniteLossError
from wn_rl.training import Statistics


class LossStatistics:
    """Sums over updates of the means of loss, |TD error| and Q-value.

    Attributes:
        sums: float64, shape (3,), on the agent's device.
        updates: how many updates are in them.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with no updates."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.updates = 0

    @torch.no_grad()
    def add(self, losses: Tensor, td_error: Tensor, q_value: Tensor) -> None:
        """Add one update's values, each of shape (B,); the caller counts the update in :attr:`updates`."""
        self.sums += torch.stack([losses.mean(), td_error.abs().mean(), q_value.mean()])

    def read(self) -> Statistics:
        """Return the means since the last reading and reset the sums; waits for the device."""
        count = self.updates
        loss, td_error, q_value = (self.sums / count).tolist() if count else [math.nan] * 3
        self.sums.zero_()
        self.updates = 0
        return Statistics(count, loss, td_error, q_value)


class FiniteCheck:
    """Checks that losses are finite.

    On a CPU the first loss that is not finite stops the update before it reaches the weights. On a GPU nothing may be
    read back at that point: the transitions are stored on the device, and :meth:`on_device` is read with the next
    actions.

    Attributes:
        offending: int64, shape (B,): the replay indices of the first minibatch whose loss was not finite, then −1; all
            −1 if there is none.
    """

    def __init__(self, batch_size: int, device: torch.device, next_update: Callable[[], int]) -> None:
        """Allocate for ``batch_size`` transitions; ``next_update`` returns the number of the next update."""
        self._next_update = next_update
        self.offending = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
        self.reads_back = device.type == "cpu"

    def check(self, loss: Tensor, indices: Tensor | None) -> None:
        """Check the loss of the next update, a scalar; nothing is checked with ``indices`` None: not from a replay.

        Raises:
            NonFiniteLossError: on a CPU, it is not finite.
        """
        if indices is None:
            return
        if self.reads_back:
            self.refuse(loss.item(), indices)
            return
        indices = indices[: len(self.offending)]
        target = self.offending[: len(indices)]
        known = loss.isfinite() | (self.offending[0] >= 0)
        target.copy_(torch.where(known, target, indices))

    def refuse(self, loss: float, indices: Tensor) -> None:
        """Raise if a loss, that of the transitions with these replay indices, is not finite.

        Raises:
            NonFiniteLossError: it is not.
        """
        if math.isfinite(loss):
            return
        if len(self.offending) != len(indices):
            self.offending = torch.empty_like(indices)
        self.offending.copy_(indices)
        raise NonFiniteLossError(f"the loss of update {self._next_update():,} is {loss}")

    def on_device(self) -> Tensor:
        """Return whether a loss was not finite: bool, shape (1,), on the device, without waiting for it."""
        return self.offending[:1] >= 0

    def transitions(self) -> Tensor | None:
        """Return the replay indices of the first minibatch whose loss was not finite; None if all were."""
        found = self.offending[self.offending >= 0]
        return found if len(found) else None
