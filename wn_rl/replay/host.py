"""A replay that does not fit in GPU memory: frames stay in host memory, minibatches go to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from wn_rl.replay import Minibatch, Replay
from wn_rl.replay.pinned_transfer import Staging


class HostReplay(Replay):
    """A :class:`Replay` in host memory: it makes minibatches there, in pinned memory, and copies them to the device.

    The ring itself is ordinary memory: only the CPU reads it. It samples what a replay on a CPU samples.
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
        """Allocate the ring; arguments as of :class:`Replay`; ``device`` is where minibatches go."""
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
        """Sample a minibatch into tensors on the device, which are always the same ones for a ``batch_size``.

        They hold it until the next call. The copy is asynchronous: it may not be finished when this returns.
        """
        batch = self._lazy(self.sample_indices(batch_size))
        if batch_size not in self._stagings:
            stacks = (torch.uint8, (batch_size, self.stack_size + 1, *self._frame_shape))
            integers, floats, bools = ((dtype, (batch_size,)) for dtype in (torch.int64, torch.float32, torch.bool))
            self._stagings[batch_size] = Staging(
                {"frames": stacks, "actions": integers, "rewards": floats, "terminals": bools, "indices": integers},
                self.destination,
            )
        staging = self._stagings[batch_size]
        staging.begin()
        filled = staging.host
        filled["frames"][:, :-1].copy_(batch.observations)
        filled["frames"][:, -1].copy_(batch.next_observations[:, -1])
        assert batch.indices is not None
        for name in ("actions", "rewards", "terminals", "indices"):
            filled[name].copy_(getattr(batch, name))
        staging.send()
        sent = staging.device
        return Minibatch(
            observations=sent["frames"][:, :-1],
            actions=sent["actions"],
            rewards=sent["rewards"],
            next_observations=sent["frames"][:, 1:],
            terminals=sent["terminals"],
            indices=sent["indices"],
        )

    def stage_observations(self) -> Tensor:
        """Return :meth:`observations` in a tensor on the device that is always the same one."""
        self._newest_stacks.begin()
        self._newest_stacks.host["observations"].copy_(super().observations())
        self._newest_stacks.send()
        return self._newest_stacks.device["observations"]

    def observations(self) -> Tensor:
        """Return the newest observation of every emulator on the device: uint8, shape (N, 4, 84, 84)."""
        return super().observations().to(self.destination)

    def transitions(self, indices: Tensor) -> Minibatch:
        """Return the transitions with these indices in tensors of their own on the device."""
        batch = self._lazy(indices.cpu()).materialize()
        return Minibatch(**{name: value.to(self.destination) for name, value in vars(batch).items()})
