"""Experience replay on the learner's device: each frame is stored once, stacks are rebuilt when sampled."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.errors import UsageError
from wn_rl.replay.pinned_transfer import Staging

Array = NDArray[Any]


@dataclass(frozen=True)
class Minibatch:
    """B transitions on the learner's device.

    Attributes:
        observations: uint8, shape (B, 4, 84, 84), oldest frame first.
        actions: int64, shape (B,).
        rewards: float32, shape (B,), raw points.
        next_observations: like ``observations``.
        terminals: bool, shape (B,): no bootstrap from ``next_observations``.
        indices: int64, shape (B,): which transitions of the replay these are; None where they are not from one.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    indices: Tensor | None = None


@dataclass(frozen=True)
class ReplayStorage:
    """The arrays of a replay buffer, one entry for each emulator in each vector step.

    Attributes:
        frames: uint8, shape (entries + 1, 84, 84): the newest frame of each entry; the last frame stays zero and stands
            for frames from before an episode.
        age: uint8, shape (entries,): how many earlier frames of its episode the stack may show.
        actions: uint8, shape (entries,).
        rewards: float32, shape (entries,), raw points.
        terminals: bool, shape (entries,).
        entry_of: int64, shape (entries,): the entry of the transition with each index, modulo their number.
        offsets: int64, shape (stack + 1,): rows from an entry to each frame of its two observations, oldest first.
        num_envs: entries of a row.
    """

    frames: Tensor
    age: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: Tensor
    entry_of: Tensor
    offsets: Tensor
    num_envs: int

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that have a value for every entry."""
        tensors = (self.frames, self.age, self.actions, self.rewards, self.terminals, self.entry_of)
        return sum(tensor.nbytes for tensor in tensors)

    def frame_indices(self, entries: Tensor, count: int) -> Tensor:
        """Return the indices of the first ``count`` frames at ``offsets`` from each entry, int64, shape (B, count)."""
        zero_frame = len(self.age)
        offsets = self.offsets[:count]
        indices = (entries[:, None] + offsets * self.num_envs) % zero_frame
        return indices.masked_fill_(self.age[entries][:, None] < -offsets, zero_frame)

    def gather_frames(self, frame_indices: Tensor) -> Tensor:
        """Return copies of the frames with these indices, uint8, shape (*frame_indices.shape, 84, 84)."""
        return self.frames.index_select(0, frame_indices.flatten()).view(*frame_indices.shape, *self.frames.shape[1:])

    def minibatch(self, indices: Tensor) -> Minibatch:
        """Return the transitions with these indices, int64, shape (B,), copied now; torch.compile can compile it."""
        entries = self.entry_of[indices % len(self.entry_of)]
        frames = self.gather_frames(self.frame_indices(entries, len(self.offsets)))
        return Minibatch(
            observations=frames[:, :-1],
            actions=self.actions[entries].long(),
            rewards=self.rewards[entries],
            next_observations=frames[:, 1:],
            terminals=self.terminals[entries],
            indices=indices,
        )


class LazyMinibatch(Minibatch):
    """A minibatch whose fields are copied out of the replay when they are first read.

    What the replay holds changes with the next vector step, so read the fields before, or call :meth:`materialize`.

    Attributes:
        storage: the arrays of the replay.
    """

    storage: ReplayStorage
    indices: Tensor

    def __init__(self, storage: ReplayStorage, indices: Tensor) -> None:
        """Make the minibatch of the transitions with these indices, int64, shape (B,)."""
        object.__setattr__(self, "storage", storage)
        object.__setattr__(self, "indices", indices)

    @property
    def is_lazy(self) -> bool:
        """Whether no field has been read yet, so that storage and indices say everything about it."""
        return len(vars(self)) == 2

    def materialize(self) -> Minibatch:
        """Return a minibatch of tensors of its own, with what somebody wrote into the fields of this one."""
        return Minibatch(**{field.name: getattr(self, field.name) for field in fields(Minibatch)})

    @cached_property
    def _entries(self) -> Tensor:
        return self.storage.entry_of[self.indices % len(self.storage.entry_of)]

    @cached_property
    def frame_indices(self) -> Tensor:
        """int64, shape (B, 5): the frames of each transition, both observations together, oldest first."""
        return self.storage.frame_indices(self._entries, len(self.storage.offsets))

    @cached_property
    def actions(self) -> Tensor:
        """int64, shape (B,)."""
        return self.storage.actions[self._entries].long()

    @cached_property
    def rewards(self) -> Tensor:
        """float32, shape (B,), raw points."""
        return self.storage.rewards[self._entries]

    @cached_property
    def terminals(self) -> Tensor:
        """bool, shape (B,)."""
        return self.storage.terminals[self._entries]

    @cached_property
    def _stacks(self) -> Tensor:
        return self.storage.gather_frames(self.frame_indices)

    @property
    def observations(self) -> Tensor:
        """uint8, shape (B, 4, 84, 84), oldest frame first."""
        return self._stacks[:, :-1]

    @property
    def next_observations(self) -> Tensor:
        """The same one agent step later."""
        return self._stacks[:, 1:]


class Replay:
    """The last transitions of N emulators that step together: a ring buffer.

    Storage is a ring of rows, one row for each vector step, one entry for each emulator in a row. An entry holds the
    newest frame o_t of that emulator, its age (how many earlier frames of its episode the stack may show), and what
    followed: action, raw reward, terminal. The row after it holds the frame that completes the next observation,
    also at an episode's end, since auto-reset takes a step of its own. An entry whose step was such an auto-reset is
    no transition and is never sampled; it uses one entry of the capacity.

    Which transitions can be sampled is decided in one place: transitions get the indices 0, 1, 2, … in the order in
    which they are stored, ``entry_of`` maps an index to its entry, and those of the last ``capacity // N`` rows are one
    range of indices, :attr:`index_range`. Four more rows are kept for the three older frames of the oldest stack and
    for the newest frame, so every transition in the range is complete, each is sampled with the same probability, and
    no sample is ever rejected.

    On a GPU what a vector step adds is sent in one asynchronous copy. What changes from step to step, the index range
    and the position of the newest row, is read on the device, so sampling never waits for the host and a CUDA graph can
    capture it.
    """

    resident = True
    """Whether the frames are on the device where minibatches are made, so that sampling is device work alone."""

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        frame_shape: tuple[int, int] = (84, 84),
        stack_size: int = 4,
        staged: bool | None = None,
    ) -> None:
        """Allocate the ring.

        Args:
            capacity: agent steps; the ring holds the last ``capacity // num_envs`` vector steps.
            num_envs: N.
            device: where frames are stored and minibatches are made.
            seed: of the generator that samples minibatches.
            frame_shape: height and width of a frame.
            stack_size: frames per observation.
            staged: send what a step adds in one copy and keep its position on the device; None: on a GPU.

        Raises:
            UsageError: the capacity is smaller than one vector step.
        """
        if capacity < num_envs:
            raise UsageError(f"replay_capacity {capacity} is smaller than one step of {num_envs} emulators")
        self.num_envs = num_envs
        self.stack_size = stack_size
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._rows = capacity // num_envs
        self._ring = self._rows + stack_size
        entries = self._ring * num_envs
        self.storage = ReplayStorage(
            frames=torch.zeros((entries + 1, *frame_shape), dtype=torch.uint8, device=self.device),
            age=torch.zeros(entries, dtype=torch.uint8, device=self.device),
            actions=torch.zeros(entries, dtype=torch.uint8, device=self.device),
            rewards=torch.zeros(entries, dtype=torch.float32, device=self.device),
            terminals=torch.zeros(entries, dtype=torch.bool, device=self.device),
            entry_of=torch.zeros(entries, dtype=torch.int64, device=self.device),
            offsets=torch.arange(1 - stack_size, 2, device=self.device),
            num_envs=num_envs,
        )
        self._staging = self._make_staging(frame_shape) if staged or (staged is None and self._on_gpu) else None
        self._newest = -1  # number of the newest row since the start; its position in the ring is this modulo _ring
        self._first_of_row = np.zeros(self._ring, np.int64)
        self._stored = 0
        self._newest_age = np.zeros(num_envs, np.uint8)
        self._row_sums = np.zeros(self._ring, np.uint32)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _make_staging(self, frame_shape: tuple[int, int]) -> Staging:
        n = self.num_envs
        # First and one past the last index that can be sampled, and the entry of the newest row's first emulator.
        self._position = torch.zeros(3, dtype=torch.int64, device=self.device)
        self._slots = torch.arange(n, device=self.device)
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "frames": (torch.uint8, (n, *frame_shape)),
            "age": (torch.uint8, (n,)),
            "actions": (torch.uint8, (n,)),
            "rewards": (torch.float32, (n,)),
            "terminals": (torch.bool, (n,)),
            "indices": (torch.int64, (n,)),
            "entries": (torch.int64, (n,)),
            "position": (torch.int64, (3,)),
        }
        return Staging(fields, self.device)

    def __len__(self) -> int:
        """The number of transitions that can be sampled."""
        low, high = self.index_range
        return high - low

    @property
    def index_range(self) -> tuple[int, int]:
        """The indices (first, one past the last) of the transitions that can be sampled."""
        oldest = self._newest - self._rows
        return (int(self._first_of_row[oldest % self._ring]) if oldest > 0 else 0), self._stored

    @staticmethod
    def expected_bytes(capacity: int, num_envs: int, frame_pixels: int = 84 * 84, stack_size: int = 4) -> int:
        """Return the bytes that a replay will need, before it is allocated."""
        entries = (capacity // num_envs + stack_size) * num_envs
        bookkeeping = 1 + 1 + 4 + 1 + 8  # age, action, reward, terminal, index → entry
        return entries * (frame_pixels + bookkeeping) + frame_pixels

    @property
    def nbytes(self) -> int:
        """Bytes of the ring on the device."""
        return self.storage.nbytes

    def start(self, frames: Array) -> None:
        """Store the first frame of every emulator's episode: uint8, shape (N, 84, 84)."""
        self._observe(frames, np.ones(self.num_envs, bool))

    @property
    def num_rows(self) -> int:
        """Rows of the ring: vector steps whose frames it holds."""
        return self._ring

    def restore_at(self, vector_step: int, stored: int, ages: Array, frames: Array) -> None:
        """Begin an empty replay in the middle of a run; :meth:`add` then fills it again.

        Args:
            vector_step: whose frames come first, from 0.
            stored: transitions that were stored before it.
            ages: of each emulator, how many frames its episode had before this one, shape (N,).
            frames: as in :meth:`start`.
        """
        self._newest = vector_step - 1
        self._stored = stored
        ages = np.asarray(ages)
        self._newest_age = np.clip(ages - 1, 0, self.stack_size - 1).astype(np.uint8)
        self._observe(frames, ages == 0)

    def checksum(self) -> str:
        """Return the SHA-256 of the content of the ring and of its position in the run.

        It is computed from the CRC-32 checksums of the rows, which are taken when a row is stored: nothing is read back
        from the device.
        """
        oldest = max(self._newest - self._ring + 1, 0)
        positions = np.arange(oldest, self._newest + 1) % self._ring
        counters = np.array([self._newest, self._stored, self._rows], "<i8")
        rows = (self._row_sums[positions].astype("<u4"), self._first_of_row[positions].astype("<i8"))
        digest = hashlib.sha256(counters.tobytes())
        for part in rows:
            digest.update(part.tobytes())
        return digest.hexdigest()

    def add(self, actions: Array, rewards: Array, terminals: Array, next_frames: Array, is_reset: Array) -> None:
        """Store what followed the newest row, and the next frames.

        Args:
            actions: int, shape (N,).
            rewards: raw points, shape (N,).
            terminals: bool, shape (N,): the learner must not bootstrap (game over or a lost life, not truncation).
            next_frames: the newest frame of each emulator after the step, uint8, shape (N, 84, 84).
            is_reset: bool, shape (N,): the step was an auto-reset, so it is not a transition and its frame is the first
                of an episode.
        """
        position = self._newest % self._ring
        row = slice(position * self.num_envs, (position + 1) * self.num_envs)
        actions, rewards = np.asarray(actions, np.uint8), np.asarray(rewards, np.float32)
        terminals = np.asarray(terminals, bool)
        for part in (actions, rewards, terminals):
            self._row_sums[position] = zlib.crc32(np.ascontiguousarray(part).data, int(self._row_sums[position]))
        if self._staging is not None:
            self._stage(self._staging, row, actions, rewards, terminals, next_frames, np.asarray(is_reset, bool))
            return
        self.storage.actions[row] = torch.as_tensor(actions, device=self.device)
        self.storage.rewards[row] = torch.as_tensor(rewards, device=self.device)
        self.storage.terminals[row] = torch.as_tensor(terminals, device=self.device)
        (slots,) = np.nonzero(~np.asarray(is_reset, bool))
        indices = (self._stored + np.arange(len(slots))) % len(self.storage.entry_of)
        self.storage.entry_of[torch.as_tensor(indices, device=self.device)] = torch.as_tensor(
            row.start + slots, device=self.device
        )
        self._stored += len(slots)
        self._observe(next_frames, is_reset)

    def _observe(self, frames: Array, is_reset: Array) -> None:
        row, frames = self._next_row(frames, is_reset)
        self.storage.frames[row] = torch.as_tensor(frames, device=self.device)
        self.storage.age[row] = torch.as_tensor(self._newest_age, device=self.device)
        if self._staging is not None:
            self._position.copy_(torch.tensor([*self.index_range, row.start]))

    def _next_row(self, frames: Array, is_reset: Array) -> tuple[slice, Array]:
        """Advance to the next row; returns (its entries, its frames as one block of memory)."""
        self._newest += 1
        position = self._newest % self._ring
        row = slice(position * self.num_envs, (position + 1) * self.num_envs)
        self._first_of_row[position] = self._stored
        self._newest_age = np.where(is_reset, 0, np.minimum(self._newest_age + 1, self.stack_size - 1)).astype(np.uint8)
        frames = np.ascontiguousarray(frames)
        self._row_sums[position] = zlib.crc32(self._newest_age.data, zlib.crc32(frames.data))
        return row, frames

    def _stage(
        self,
        staging: Staging,
        row: slice,
        actions: Array,
        rewards: Array,
        terminals: Array,
        frames: Array,
        is_reset: Array,
    ) -> None:
        """Finish :meth:`add` with one asynchronous copy, without waiting for the device."""
        fields = staging.begin()
        fields["actions"][:], fields["rewards"][:], fields["terminals"][:] = actions, rewards, terminals
        # Always N indices, so that shapes stay the same: those after the real transitions are given again to the next
        # ones, before they can be sampled.
        order = np.argsort(is_reset, kind="stable")
        fields["indices"][:] = (self._stored + np.arange(self.num_envs)) % len(self.storage.entry_of)
        fields["entries"][:] = row.start + order
        self._stored += int((~is_reset).sum())
        next_row, frames = self._next_row(frames, is_reset)
        fields["frames"][:], fields["age"][:] = frames, self._newest_age
        fields["position"][:] = (*self.index_range, next_row.start)
        staging.send()
        sent = staging.device
        self.storage.actions[row] = sent["actions"]
        self.storage.rewards[row] = sent["rewards"]
        self.storage.terminals[row] = sent["terminals"]
        self.storage.entry_of.index_copy_(0, sent["indices"], sent["entries"])
        self.storage.frames[next_row] = sent["frames"]
        self.storage.age[next_row] = sent["age"]
        self._position.copy_(sent["position"])

    def observations(self) -> Tensor:
        """Return the newest observation of every emulator: uint8, shape (N, 4, 84, 84)."""
        if self._staging is not None:
            entries = self._position[2] + self._slots
        else:
            position = self._newest % self._ring
            entries = torch.arange(position * self.num_envs, (position + 1) * self.num_envs, device=self.device)
        return self.storage.gather_frames(self.storage.frame_indices(entries, self.stack_size))

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Minibatch:
        """Sample ``batch_size`` transitions uniformly, with replacement.

        The result is lazy: its fields must be read before the next vector step (:class:`LazyMinibatch`).

        Args:
            batch_size: B.
            generator: used in place of the replay's own.

        Raises:
            UsageError: the replay holds no transition yet.
        """
        return self.transitions(self.sample_indices(batch_size, generator))

    def sample_indices(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the indices of the transitions that :meth:`sample` returns, int64, shape (B,)."""
        low: int | Tensor
        high: int | Tensor
        low, high = self.index_range
        if high == low:
            raise UsageError("the replay is empty: learning_starts must be larger than num_envs")
        if self._staging is not None:
            low, high = self._position[0], self._position[1]
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=generator or self.generator)
        return low + (uniform * (high - low)).long()

    def transitions(self, indices: Tensor) -> Minibatch:
        """Return the transitions with these indices, int64, shape (B,), each within :attr:`index_range`.

        Lazy, as those of :meth:`sample`.
        """
        return self._lazy(indices)

    def _lazy(self, indices: Tensor) -> LazyMinibatch:
        return LazyMinibatch(self.storage, indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator and :meth:`checksum`: the frames are restored from the action log."""
        return {"generator": self.generator.get_state(), "checksum": self.checksum()}

    def load_state_dict(self, state: dict[str, Any], *, same_device: bool = True) -> None:
        """Restore the generator, and check that the content is that of the checkpoint.

        Args:
            state: what :meth:`state_dict` returned.
            same_device: False where the generator belongs to another type of device and cannot be restored.

        Raises:
            ValueError: the content differs.
        """
        if state["checksum"] != self.checksum():
            raise ValueError("the restored replay differs from that of the run")
        if same_device:
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(self.generator.initial_seed() + self._stored)
