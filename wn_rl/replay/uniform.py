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
        numbers: int64, shape (B,): which transitions of the replay these are; None where they are not from one.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    numbers: Tensor | None = None


@dataclass(frozen=True)
class Entries:
    """What a replay keeps of each of its entries.

    Attributes:
        frames: uint8, shape (entries + 1, 84, 84): the newest frame of each; the last stays black and stands for frames
            from before an episode.
        age: uint8, shape (entries,): how many earlier frames of its episode the stack may show.
        actions: uint8, shape (entries,).
        rewards: float32, shape (entries,), raw points.
        terminals: bool, shape (entries,).
        entry_of: int64, shape (entries,): of the transition with each number, modulo their count.
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
        """Bytes of what there is for every entry."""
        tensors = (self.frames, self.age, self.actions, self.rewards, self.terminals, self.entry_of)
        return sum(tensor.nbytes for tensor in tensors)

    def places(self, entries: Tensor, count: int) -> Tensor:
        """Return where the first ``count`` frames at ``offsets`` from each entry are, int64, shape (B, count)."""
        black = len(self.age)
        offsets = self.offsets[:count]
        places = (entries[:, None] + offsets * self.num_envs) % black
        return places.masked_fill_(self.age[entries][:, None] < -offsets, black)

    def frames_at(self, places: Tensor) -> Tensor:
        """Return copies of the frames at ``places``, uint8, shape (*places.shape, 84, 84)."""
        return self.frames.index_select(0, places.flatten()).view(*places.shape, *self.frames.shape[1:])

    def minibatch(self, numbers: Tensor) -> Minibatch:
        """Return the transitions with these numbers, int64, shape (B,), all looked up now; it can be compiled."""
        entries = self.entry_of[numbers % len(self.entry_of)]
        frames = self.frames_at(self.places(entries, len(self.offsets)))
        return Minibatch(
            observations=frames[:, :-1],
            actions=self.actions[entries].long(),
            rewards=self.rewards[entries],
            next_observations=frames[:, 1:],
            terminals=self.terminals[entries],
            numbers=numbers,
        )


class DrawnMinibatch(Minibatch):
    """A minibatch that is still in the replay: each field is looked up when somebody looks at it.

    What the replay holds changes with the next vector step, so whoever keeps a minibatch looks at it before.

    Attributes:
        kept: what the replay keeps.
    """

    kept: Entries
    numbers: Tensor

    def __init__(self, kept: Entries, numbers: Tensor) -> None:
        """Make the minibatch of the transitions with these numbers, int64, shape (B,)."""
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "numbers", numbers)

    @property
    def untouched(self) -> bool:
        """Whether nobody has looked at a field yet, so that what the replay keeps is all there is to it."""
        return len(vars(self)) == 2

    def looked_up(self) -> Minibatch:
        """Return the fields as they are now, with what somebody wrote into them, in a minibatch that stays."""
        return Minibatch(**{entry.name: getattr(self, entry.name) for entry in fields(Minibatch)})

    @cached_property
    def _entries(self) -> Tensor:
        return self.kept.entry_of[self.numbers % len(self.kept.entry_of)]

    @cached_property
    def places(self) -> Tensor:
        """int64, shape (B, 5): the frames of each transition, both observations together, oldest first."""
        return self.kept.places(self._entries, len(self.kept.offsets))

    @cached_property
    def actions(self) -> Tensor:
        """int64, shape (B,)."""
        return self.kept.actions[self._entries].long()

    @cached_property
    def rewards(self) -> Tensor:
        """float32, shape (B,), raw points."""
        return self.kept.rewards[self._entries]

    @cached_property
    def terminals(self) -> Tensor:
        """bool, shape (B,)."""
        return self.kept.terminals[self._entries]

    @cached_property
    def _stacks(self) -> Tensor:
        return self.kept.frames_at(self.places)

    @property
    def observations(self) -> Tensor:
        """uint8, shape (B, 4, 84, 84), oldest frame first."""
        return self._stacks[:, :-1]

    @property
    def next_observations(self) -> Tensor:
        """The same one agent step later."""
        return self._stacks[:, 1:]


class Replay:
    """The last transitions of N emulators that step together.

    Storage is a ring of rows, one row a vector step, one entry per emulator in a row. An entry holds the newest
    frame o_t of that emulator, its age (how many earlier frames of its episode the stack may show), and what
    followed: action, raw reward, terminal. The row after it holds the frame that completes the next observation,
    also at an episode's end, since auto-reset takes a step of its own. An entry whose step was such an auto-reset is
    no transition and is never drawn; it occupies one place of the capacity.

    Which entries can be drawn is said in one place: transitions are numbered in the order in which they were stored,
    ``entry_of`` maps number → entry, and those of the last ``capacity // N`` rows form one range of numbers. Four
    rows more than that are kept for the three older frames of the oldest stack and for the newest frame, so every
    transition in the range is whole, each is drawn with the same probability, and no draw is ever rejected.

    On a GPU what a vector step adds comes in one asynchronous copy, and what changes from step to step, the range that
    can be drawn and the place of the newest row, is read there: sampling asks the host for nothing and can be recorded.
    """

    resident = True
    """Whether the frames are where minibatches are made, so that sampling is device work alone."""

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
            device: where frames live and minibatches are made.
            seed: of the generator that draws minibatches.
            frame_shape: height and width of a frame.
            stack_size: frames per observation.
            staged: send what a step adds in one copy and keep its place on the device; None: on a GPU.

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
        self.kept = Entries(
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
        self._newest = -1  # number of the newest row since the start; its place in the ring is this modulo _ring
        self._first_of_row = np.zeros(self._ring, np.int64)
        self._stored = 0
        self._newest_age = np.zeros(num_envs, np.uint8)
        self._row_sums = np.zeros(self._ring, np.uint32)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _make_staging(self, frame_shape: tuple[int, int]) -> Staging:
        n = self.num_envs
        # First and one past the last number that can be drawn, and the entry of the newest row's first emulator.
        self._place = torch.zeros(3, dtype=torch.int64, device=self.device)
        self._slots = torch.arange(n, device=self.device)
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "frames": (torch.uint8, (n, *frame_shape)),
            "age": (torch.uint8, (n,)),
            "actions": (torch.uint8, (n,)),
            "rewards": (torch.float32, (n,)),
            "terminals": (torch.bool, (n,)),
            "numbers": (torch.int64, (n,)),
            "entries": (torch.int64, (n,)),
            "place": (torch.int64, (3,)),
        }
        return Staging(fields, self.device)

    def __len__(self) -> int:
        """The number of transitions that can be drawn."""
        low, high = self.drawable
        return high - low

    @property
    def drawable(self) -> tuple[int, int]:
        """The numbers (first, one past the last) of the transitions that can be drawn."""
        oldest = self._newest - self._rows
        return (int(self._first_of_row[oldest % self._ring]) if oldest > 0 else 0), self._stored

    @staticmethod
    def expected_bytes(capacity: int, num_envs: int, frame_pixels: int = 84 * 84, stack_size: int = 4) -> int:
        """Return the bytes that a replay will occupy, before there is one."""
        entries = (capacity // num_envs + stack_size) * num_envs
        bookkeeping = 1 + 1 + 4 + 1 + 8  # age, action, reward, terminal, number → entry
        return entries * (frame_pixels + bookkeeping) + frame_pixels

    @property
    def nbytes(self) -> int:
        """Bytes that the ring occupies on the device."""
        return self.kept.nbytes

    def start(self, frames: Array) -> None:
        """Store the first frame of every emulator's episode: uint8, shape (N, 84, 84)."""
        self._observe(frames, np.ones(self.num_envs, bool))

    @property
    def rows_kept(self) -> int:
        """Vector steps whose frames the ring holds."""
        return self._ring

    def start_at(self, row: int, stored: int, ages: Array, frames: Array) -> None:
        """Begin an empty replay in the middle of a run, to be filled anew by :meth:`add`.

        Args:
            row: number of the vector step whose frames come first, from 0.
            stored: transitions that were stored before it.
            ages: of each emulator, how many frames its episode had before this one, shape (N,).
            frames: as in :meth:`start`.
        """
        self._newest = row - 1
        self._stored = stored
        ages = np.asarray(ages)
        self._newest_age = np.clip(ages - 1, 0, self.stack_size - 1).astype(np.uint8)
        self._observe(frames, ages == 0)

    def checksum(self) -> str:
        """Return the SHA-256 of what the ring holds and of where it stands in the run.

        It is made of the checksums of the rows (CRC-32), which are taken as they are stored: nothing is read back.
        """
        oldest = max(self._newest - self._ring + 1, 0)
        places = np.arange(oldest, self._newest + 1) % self._ring
        numbers = np.array([self._newest, self._stored, self._rows], "<i8")
        rows = (self._row_sums[places].astype("<u4"), self._first_of_row[places].astype("<i8"))
        digest = hashlib.sha256(numbers.tobytes())
        for part in rows:
            digest.update(part.tobytes())
        return digest.hexdigest()

    def add(self, actions: Array, rewards: Array, terminals: Array, next_frames: Array, is_reset: Array) -> None:
        """Store what followed the newest row, and the frames that came of it.

        Args:
            actions: int, shape (N,).
            rewards: raw points, shape (N,).
            terminals: bool, shape (N,): the learner must not bootstrap (game over or life loss, not truncation).
            next_frames: the newest frame of each emulator after the step, uint8, shape (N, 84, 84).
            is_reset: bool, shape (N,): the step was an auto-reset, so it is no transition and its frame is the first
                of an episode.
        """
        place = self._newest % self._ring
        row = slice(place * self.num_envs, (place + 1) * self.num_envs)
        actions, rewards = np.asarray(actions, np.uint8), np.asarray(rewards, np.float32)
        terminals = np.asarray(terminals, bool)
        for part in (actions, rewards, terminals):
            self._row_sums[place] = zlib.crc32(np.ascontiguousarray(part).data, int(self._row_sums[place]))
        if self._staging is not None:
            self._stage(self._staging, row, actions, rewards, terminals, next_frames, np.asarray(is_reset, bool))
            return
        self.kept.actions[row] = torch.as_tensor(actions, device=self.device)
        self.kept.rewards[row] = torch.as_tensor(rewards, device=self.device)
        self.kept.terminals[row] = torch.as_tensor(terminals, device=self.device)
        (slots,) = np.nonzero(~np.asarray(is_reset, bool))
        numbers = (self._stored + np.arange(len(slots))) % len(self.kept.entry_of)
        self.kept.entry_of[torch.as_tensor(numbers, device=self.device)] = torch.as_tensor(
            row.start + slots, device=self.device
        )
        self._stored += len(slots)
        self._observe(next_frames, is_reset)

    def _observe(self, frames: Array, is_reset: Array) -> None:
        row, frames = self._next_row(frames, is_reset)
        self.kept.frames[row] = torch.as_tensor(frames, device=self.device)
        self.kept.age[row] = torch.as_tensor(self._newest_age, device=self.device)
        if self._staging is not None:
            self._place.copy_(torch.tensor([*self.drawable, row.start]))

    def _next_row(self, frames: Array, is_reset: Array) -> tuple[slice, Array]:
        """Go to the next row: (the entries that it takes, its frames as one block of memory)."""
        self._newest += 1
        place = self._newest % self._ring
        row = slice(place * self.num_envs, (place + 1) * self.num_envs)
        self._first_of_row[place] = self._stored
        self._newest_age = np.where(is_reset, 0, np.minimum(self._newest_age + 1, self.stack_size - 1)).astype(np.uint8)
        frames = np.ascontiguousarray(frames)
        self._row_sums[place] = zlib.crc32(self._newest_age.data, zlib.crc32(frames.data))
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
        """Do the rest of :meth:`add` without waiting for the device."""
        fields = staging.begin()
        fields["actions"][:], fields["rewards"][:], fields["terminals"][:] = actions, rewards, terminals
        # As many numbers as emulators whatever happened: those of resets are taken back by the next real transitions,
        # which come before anybody may draw them.
        order = np.argsort(is_reset, kind="stable")
        fields["numbers"][:] = (self._stored + np.arange(self.num_envs)) % len(self.kept.entry_of)
        fields["entries"][:] = row.start + order
        self._stored += int((~is_reset).sum())
        next_row, frames = self._next_row(frames, is_reset)
        fields["frames"][:], fields["age"][:] = frames, self._newest_age
        fields["place"][:] = (*self.drawable, next_row.start)
        staging.send()
        sent = staging.device
        self.kept.actions[row] = sent["actions"]
        self.kept.rewards[row] = sent["rewards"]
        self.kept.terminals[row] = sent["terminals"]
        self.kept.entry_of.index_copy_(0, sent["numbers"], sent["entries"])
        self.kept.frames[next_row] = sent["frames"]
        self.kept.age[next_row] = sent["age"]
        self._place.copy_(sent["place"])

    def observations(self) -> Tensor:
        """Return the newest observation of every emulator: uint8, shape (N, 4, 84, 84)."""
        if self._staging is not None:
            entries = self._place[2] + self._slots
        else:
            place = self._newest % self._ring
            entries = torch.arange(place * self.num_envs, (place + 1) * self.num_envs, device=self.device)
        return self.kept.frames_at(self.kept.places(entries, self.stack_size))

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Minibatch:
        """Draw ``batch_size`` transitions uniformly, with replacement.

        Each field is looked up when somebody looks at it, which must be before the next vector step.

        Args:
            batch_size: B.
            generator: draws instead of the replay's own.

        Raises:
            UsageError: the replay holds no transition yet.
        """
        return self.transitions(self.draw(batch_size, generator))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the numbers that :meth:`sample` draws, int64, shape (B,)."""
        low: int | Tensor
        high: int | Tensor
        low, high = self.drawable
        if high == low:
            raise UsageError("the replay is empty: learning_starts must be larger than num_envs")
        if self._staging is not None:
            low, high = self._place[0], self._place[1]
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=generator or self.generator)
        return low + (uniform * (high - low)).long()

    def transitions(self, numbers: Tensor) -> Minibatch:
        """Return the transitions with these numbers, int64, shape (B,), each within :attr:`drawable`.

        When their fields are looked up: see :meth:`sample`.
        """
        return self._gather(numbers)

    def _gather(self, numbers: Tensor) -> DrawnMinibatch:
        return DrawnMinibatch(self.kept, numbers)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator and :meth:`checksum`: the frames are made anew from the journal."""
        return {"generator": self.generator.get_state(), "checksum": self.checksum()}

    def load_state_dict(self, state: dict[str, Any], *, same_device: bool = True) -> None:
        """Restore the generator and check that the content is that of the checkpoint.

        Args:
            state: what :meth:`state_dict` returned.
            same_device: False where the generator belongs to another kind of device and cannot go on.

        Raises:
            ValueError: the content is another.
        """
        if state["checksum"] != self.checksum():
            raise ValueError("the replay that was made anew differs from the one of the run")
        if same_device:
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(self.generator.initial_seed() + self._stored)
