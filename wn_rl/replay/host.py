"""A replay for a GPU that has no room for it: frames stay in host memory, minibatches go to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from wn_rl.replay import Minibatch, Replay
from wn_rl.replay.pinned_transfer import Staging


class HostReplay(Replay):
    """A :class:`Replay` in host memory that makes its minibatches there, in pinned memory, and sends them off.

    The ring itself is ordinary memory: only the processor reads it. What is drawn is what a replay on a CPU draws.
    """

    resident = False

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        *,
        device: torch.device | str,
        seed: int = 0,
        frame_shape: tuple[int, int] = (84, 84),
        stack_size: int = 4,
    ) -> None:
        """Allocate the ring; arguments as :class:`Replay`, with ``device`` where minibatches go."""
        super().__init__(
            capacity, num_envs, device="cpu", seed=seed, frame_shape=frame_shape, stack_size=stack_size, staged=False
        )
        self.destination = torch.device(device)
        self._frame_shape = frame_shape
        self._stagings: dict[int, Staging] = {}
        self._newest_stacks = Staging(
            {"observations": (torch.uint8, (num_envs, stack_size, *frame_shape))}, self.destination
        )

    def stage_minibatch(self, batch_size: int) -> Minibatch:
        """Draw a minibatch into tensors of the device that are always the same for a ``batch_size``.

        They hold it until the next call; the copy is under way when this returns.
        """
        batch = self._gather(self.draw(batch_size))
        if batch_size not in self._stagings:
            stacks = (torch.uint8, (batch_size, self.stack_size + 1, *self._frame_shape))
            numbers, rewards, truths = ((kind, (batch_size,)) for kind in (torch.int64, torch.float32, torch.bool))
            self._stagings[batch_size] = Staging(
                {"frames": stacks, "actions": numbers, "rewards": rewards, "terminals": truths, "numbers": numbers},
                self.destination,
            )
        staging = self._stagings[batch_size]
        staging.begin()
        filled = staging.host
        filled["frames"][:, :-1].copy_(batch.observations)
        filled["frames"][:, -1].copy_(batch.next_observations[:, -1])
        assert batch.numbers is not None
        for name in ("actions", "rewards", "terminals", "numbers"):
            filled[name].copy_(getattr(batch, name))
        staging.send()
        sent = staging.device
        return Minibatch(
            observations=sent["frames"][:, :-1],
            actions=sent["actions"],
            rewards=sent["rewards"],
            next_observations=sent["frames"][:, 1:],
            terminals=sent["terminals"],
            numbers=sent["numbers"],
        )

    def stage_observations(self) -> Tensor:
        """Return the newest observations in a tensor of the device that is always the same; else as the other."""
        self._newest_stacks.begin()
        self._newest_stacks.host["observations"].copy_(super().observations())
        self._newest_stacks.send()
        return self._newest_stacks.device["observations"]

    def observations(self) -> Tensor:
        """Return the newest observation of every emulator on the device: uint8, shape (N, 4, 84, 84)."""
        return super().observations().to(self.destination)

    def transitions(self, numbers: Tensor) -> Minibatch:
        """Return the transitions with these numbers in tensors of their own on the device."""
        batch = self._gather(numbers.cpu()).looked_up()
        return Minibatch(**{name: value.to(self.destination) for name, value in vars(batch).items()})
