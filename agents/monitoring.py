"""What an agent tells of its updates: the means of the loss, and the first minibatch whose loss was not finite."""

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
        """Start with none."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.updates = 0

    @torch.no_grad()
    def add(self, losses: Tensor, td_error: Tensor, q_value: Tensor) -> None:
        """Add one update's values, each of shape (B,); whoever makes the update counts it."""
        self.sums += torch.stack([losses.mean(), td_error.abs().mean(), q_value.mean()])

    def read(self) -> Statistics:
        """Return the means since the last reading and start anew; waits for the device."""
        count = self.updates
        loss, td_error, q_value = (self.sums / count).tolist() if count else [math.nan] * 3
        self.sums.zero_()
        self.updates = 0
        return Statistics(count, loss, td_error, q_value)


class FiniteCheck:
    """Watches that losses are finite.

    On a CPU the first loss that is not stops the update before it spoils the weights. On a GPU nothing may be read back
    then: the transitions are noted on the device, and :meth:`on_device` comes back with the next actions.

    Attributes:
        offending: int64, shape (B,): the transitions of the first minibatch whose loss was not finite, from the left;
            −1 where there are none.
    """

    def __init__(self, batch_size: int, device: torch.device, next_update: Callable[[], int]) -> None:
        """Make room for the numbers of ``batch_size`` transitions; ``next_update`` returns an update's number."""
        self._next_update = next_update
        self.offending = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
        self.reads_back = device.type == "cpu"

    def check(self, loss: Tensor, numbers: Tensor | None) -> None:
        """Look at the loss of the next update, a scalar; ``numbers`` None: not from a replay, unchecked.

        Raises:
            NonFiniteLossError: on a CPU, it is not finite.
        """
        if numbers is None:
            return
        if self.reads_back:
            self.refuse(loss.item(), numbers)
            return
        numbers = numbers[: len(self.offending)]
        place = self.offending[: len(numbers)]
        known = loss.isfinite() | (self.offending[0] >= 0)
        place.copy_(torch.where(known, place, numbers))

    def refuse(self, loss: float, numbers: Tensor) -> None:
        """Stop at a loss that is not finite, of the transitions with these numbers.

        Raises:
            NonFiniteLossError: it is not.
        """
        if math.isfinite(loss):
            return
        if len(self.offending) != len(numbers):
            self.offending = torch.empty_like(numbers)
        self.offending.copy_(numbers)
        raise NonFiniteLossError(f"the loss of update {self._next_update():,} is {loss}")

    def on_device(self) -> Tensor:
        """Return whether a loss was not finite: bool, shape (1,), on the device, without waiting for it."""
        return self.offending[:1] >= 0

    def transitions(self) -> Tensor | None:
        """Return the numbers in replay of the first minibatch whose loss was not finite; None: all were."""
        found = self.offending[self.offending >= 0]
        return found if len(found) else None
