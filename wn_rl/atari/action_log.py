"""The action log: an episode is a seed and a list of actions, so the log of a run restores its replay buffer.

The emulators are deterministic. Without sticky actions an episode depends on its number of no-ops and its actions, and
the number of no-ops on the emulator's seed and the number of resets before it. With sticky actions the emulator draws
random numbers in every frame, so everything since its last seeding counts; therefore it is re-seeded periodically.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from wn_rl.errors import CheckpointError, WnRlError

AUTO_RESET = 255
"""The byte of a vector step that started this emulator's next episode: its action was ignored."""
RESEEDED = 254
"""The same, and then the emulator was re-seeded."""
CHUNK_BYTES = 2**20
"""Actions that are compressed and written at a time; the rest is written at every checkpoint."""
MAX_CHUNK_BYTES = 2**26
"""No chunk may claim more: a damaged action log must not exhaust memory."""

_FILE = struct.Struct("<8sI")
_MAGIC = b"wn_rl j1"
_CHUNK = struct.Struct("<4sQQII32s")
_CHUNK_MAGIC = b"rows"
_DIGEST_BYTES = 32
_STATE_BYTES = 4 * 8
"""State of each emulator, stored before a chunk's rows."""

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Mark:
    """A position in an action log: the number of vector steps before it, and the digest of everything before it."""

    rows: int
    digest: str

    @classmethod
    def of(cls, loop: Mapping[str, Any], num_envs: int) -> Mark:
        """Return the position that a checkpoint's loop state holds.

        Raises:
            ValueError: no run of so many agent steps has so many vector steps, so reading them could exhaust memory.
            KeyError: it holds none.
        """
        rows, steps = int(loop["vector_steps"]), int(loop["agent_steps"])
        # An emulator never makes two auto-reset steps in succession.
        if not 0 <= rows * num_envs <= 2 * steps + num_envs:
            raise ValueError(f"{rows:,} vector steps of {num_envs:,} emulators are not {steps:,} agent steps")
        return cls(rows, str(loop["action_log"]))


@dataclass(frozen=True)
class EmulatorState:
    """The state of each emulator before a row (one vector step); every array has shape (N,).

    Attributes:
        row: number of the vector step, from 0.
        steps: agent steps (real transitions) before it, over all emulators.
        started: row whose frame was the first of the emulator's current episode.
        seeded: row whose frame was the first after its last seeding.
        seed_label: agent steps at that seeding, divided by ``reseed_period``: the label of the seed.
        resets: resets since that seeding, the seeding not counted.
    """

    row: int
    steps: int
    started: Counts
    seeded: Counts
    seed_label: Counts
    resets: Counts

    @classmethod
    def initial(cls, num_envs: int) -> EmulatorState:
        """Return the state of N emulators after their first, seeded reset."""
        zeros = np.zeros(num_envs, np.int64)
        return cls(0, 0, zeros, zeros, zeros, zeros)

    def needed_row(self, *, sticky: bool) -> int:
        """Return the first row that must be replayed to restore every emulator."""
        return int((self.seeded if sticky else self.started).min())

    def arrays(self) -> Counts:
        """Return the four arrays as a file stores them, shape (4, N)."""
        return np.stack([self.started, self.seeded, self.seed_label, self.resets])

    def after(self, rows: Bytes, reseed_period: int) -> EmulatorState:
        """Return the state after these rows, shape (rows, N)."""
        count = len(rows)
        if count == 0:
            return self
        played = rows < RESEEDED
        steps_before = self.steps + np.concatenate([[0], np.cumsum(played.sum(1))])
        numbers = np.arange(count)[:, None]
        last_reset = np.where(~played, numbers, -1).max(0)
        last_seeding = np.where(rows == RESEEDED, numbers, -1).max(0)
        resets = ((rows == AUTO_RESET) & (numbers > last_seeding)).sum(0)
        seeded = last_seeding >= 0
        return EmulatorState(
            self.row + count,
            int(steps_before[-1]),
            np.where(last_reset >= 0, self.row + last_reset + 1, self.started),
            np.where(seeded, self.row + last_seeding + 1, self.seeded),
            np.where(seeded, steps_before[last_seeding] // max(reseed_period, 1), self.seed_label),
            np.where(seeded, resets, self.resets + resets),
        )


@dataclass(frozen=True)
class PlayedEpisode:
    """A training episode, by its position in the action log.

    Attributes:
        slot: the emulator.
        first_row: vector step of its first action.
        last_row: vector step of its last action.
        last_step: agent step of its last action, over all emulators.
        seed_label: of the emulator's last seeding before it.
        resets: of the emulator since that seeding, this episode's own included.
        seeded_row: first vector step after that seeding.
    """

    slot: int
    first_row: int
    last_row: int
    last_step: int
    seed_label: int
    resets: int
    seeded_row: int

    @property
    def length(self) -> int:
        """Agent steps."""
        return self.last_row - self.first_row + 1


class History:
    """The rows of an action log in memory: uint8, shape (rows, N); an action below 18, AUTO_RESET or RESEEDED."""

    def __init__(self, rows: Bytes, first: EmulatorState, reseed_period: int) -> None:
        """Hold ``rows``, the first of which is vector step ``first.row``."""
        self.rows = rows
        self._first = first
        self._reseed_period = reseed_period

    @property
    def first_row(self) -> int:
        """Number of the oldest vector step in memory."""
        return self._first.row

    @property
    def end_row(self) -> int:
        """Number of the vector step after the newest."""
        return self._first.row + len(self.rows)

    @property
    def num_envs(self) -> int:
        """N."""
        return int(self.rows.shape[1])

    def row(self, number: int) -> Bytes:
        """Return the bytes of a vector step, shape (N,)."""
        row: Bytes = self.rows[number - self._first.row]
        return row

    def state(self, row: int) -> EmulatorState:
        """Return the state of each emulator before vector step ``row``.

        Raises:
            CheckpointError: the action log was trimmed to later rows.
        """
        if not self._first.row <= row <= self.end_row:
            raise CheckpointError(f"the action log begins at vector step {self._first.row:,}: {row:,} is not in it")
        return self._first.after(self.rows[: row - self._first.row], self._reseed_period)

    def episodes(self) -> Iterator[PlayedEpisode]:
        """Yield the episodes that the action log holds completely, in the order in which they ended.

        Those that ended in the same vector step come in slot order, as in ``episodes.csv``. One that ended in the last
        row is left out: only the reset in the next row shows an episode's end.
        """
        first = self._first
        started, resets = first.started.copy(), first.resets.copy()
        seeded, label = first.seeded.copy(), first.seed_label.copy()
        steps = first.steps + np.concatenate([[0], np.cumsum((self.rows < RESEEDED).sum(1))])
        for index in np.flatnonzero((self.rows >= RESEEDED).any(1)):
            for slot in np.flatnonzero(self.rows[index] >= RESEEDED):
                row = first.row + int(index)
                if started[slot] >= first.row:
                    before = int((self.rows[index - 1, : slot + 1] < RESEEDED).sum())
                    yield PlayedEpisode(
                        int(slot),
                        int(started[slot]),
                        row - 1,
                        int(steps[index - 1]) + before,
                        int(label[slot]),
                        int(resets[slot]),
                        int(seeded[slot]),
                    )
                started[slot] = row + 1
                resets[slot] += 1
                if self.rows[index, slot] == RESEEDED:
                    seeded[slot], resets[slot] = row + 1, 0
                    label[slot] = steps[index] // max(self._reseed_period, 1)


class ActionLog:
    """The actions of a run, append-only on disk: a header, then chunks of rows.

    Each chunk holds the state of every emulator before it, its rows compressed, and at the end the SHA-256 of itself
    and, through the digest of the chunk before it, of everything before. Rows are written to the disk a megabyte at a
    time and at :meth:`mark`; :meth:`open` cuts what follows the last mark that a checkpoint holds.
    """

    def __init__(self, path: Path, num_envs: int, reseed_period: int) -> None:
        """Name the file; :meth:`create` or :meth:`open` comes next.

        Args:
            path: of the file.
            num_envs: N.
            reseed_period: agent steps after which an emulator with sticky actions is re-seeded; 0 without them.
        """
        self.path = path
        self._num_envs = num_envs
        self._reseed_period = reseed_period
        self._end = 0
        self._state = EmulatorState.initial(num_envs)
        self._digest = bytes(_DIGEST_BYTES)
        self._pending: list[Bytes] = []

    def create(self) -> None:
        """Begin an empty action log.

        Raises:
            WnRlError: it cannot be written.
        """
        try:
            self.path.write_bytes(_FILE.pack(_MAGIC, self._num_envs))
        except OSError as error:
            raise self._unwritable(error) from None
        self._end = _FILE.size

    def open(self, mark: Mark) -> History:
        """Return the rows up to ``mark``; writing continues there and replaces what follows.

        Raises:
            CheckpointError: the file is missing, damaged before the mark, or another run's.
        """
        history, self._end, self._state, self._digest = _read(self.path, self._num_envs, self._reseed_period, mark)
        return history

    def cut(self) -> None:
        """Remove what follows the position where writing continues.

        Raises:
            WnRlError: it cannot be written.
        """
        try:
            os.truncate(self.path, self._end)
        except OSError as error:
            raise self._unwritable(error) from None

    def append(self, row: Bytes) -> None:
        """Append a vector step: uint8, shape (N,).

        Raises:
            WnRlError: it cannot be written.
        """
        self._pending.append(row)
        if len(self._pending) * self._num_envs >= CHUNK_BYTES:
            self._write()

    def mark(self) -> Mark:
        """Sync everything to the disk and return the position.

        Raises:
            WnRlError: it cannot be written.
        """
        self._write(sync=True)
        return Mark(self._state.row, self._digest.hex())

    def _write(self, *, sync: bool = False) -> None:
        rows = np.stack(self._pending) if self._pending else np.zeros((0, self._num_envs), np.uint8)
        chunk, digest = b"", self._digest
        if len(rows):
            # Emulator by emulator, which compresses better: an emulator's actions resemble its own earlier ones.
            payload = zlib.compress(np.ascontiguousarray(rows.T).tobytes(), 6)
            state = self._state
            header = _CHUNK.pack(_CHUNK_MAGIC, state.row, state.steps, len(rows), len(payload), self._digest)
            chunk = header + state.arrays().astype("<i8").tobytes() + payload
            digest = hashlib.sha256(chunk).digest()
            chunk += digest
        try:
            with open(self.path, "r+b") as file:
                file.seek(self._end)
                file.write(chunk)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self._end += len(chunk)
        self._state = self._state.after(rows, self._reseed_period)
        self._digest = digest
        self._pending.clear()

    def trim(self, first_row: int) -> None:
        """Remove the chunks that are not needed to restore the frames from vector step ``first_row`` on.

        The file is only rewritten if at least half of it is removed. Call it after :meth:`mark`.

        Raises:
            WnRlError: it cannot be written; the action log is then unchanged.
        """
        end = self._end
        history, _, _, _ = _read(self.path, self._num_envs, self._reseed_period, Mark(self._state.row, ""))
        needed = history.state(max(first_row, history.first_row)).needed_row(sticky=self._reseed_period > 0)
        temporary = self.path.with_name(f".{self.path.name}.writing")
        try:
            begin = _chunk_that_holds(self.path, needed, end, self._num_envs)
            if begin - _FILE.size < (end - _FILE.size) // 2:
                return
            with open(self.path, "rb") as source, open(temporary, "wb") as file:
                file.write(source.read(_FILE.size))
                source.seek(begin)
                file.write(source.read(end - begin))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            self._end = self.path.stat().st_size
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> WnRlError:
        return WnRlError(f"cannot write {self.path}: {error.strerror or error}")


def _chunk_that_holds(path: Path, row: int, end: int, num_envs: int) -> int:
    """Return the position in the file of the last chunk whose first row is not after ``row``."""
    found = _FILE.size
    with open(path, "rb") as file:
        position = _FILE.size
        while position < end:
            file.seek(position)
            _, first_row, _, _, payload, _ = _CHUNK.unpack(file.read(_CHUNK.size))
            if first_row > row:
                break
            found = position
            position += _chunk_size(num_envs, payload)
    return found


def _chunk_size(num_envs: int, payload: int) -> int:
    return _CHUNK.size + _STATE_BYTES * num_envs + payload + _DIGEST_BYTES


def read_history(path: Path, num_envs: int, reseed_period: int, mark: Mark) -> History:
    """Return the rows of an action log up to ``mark``, without opening it for writing; see :meth:`ActionLog.open`."""
    return _read(path, num_envs, reseed_period, mark)[0]


def _read(path: Path, num_envs: int, reseed_period: int, mark: Mark) -> tuple[History, int, EmulatorState, bytes]:
    """Return the rows up to ``mark``, the position in the file, the state and the digest there."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _read_chunks(file, size, num_envs, reseed_period, mark)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, struct.error, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _read_chunks(
    file: IO[bytes], size: int, num_envs: int, reseed_period: int, mark: Mark
) -> tuple[History, int, EmulatorState, bytes]:
    magic, emulators = _FILE.unpack(file.read(_FILE.size))
    if magic != _MAGIC or emulators != num_envs:
        raise ValueError(f"it is not the action log of {num_envs} emulators")
    parts: list[Bytes] = []
    first: EmulatorState | None = None
    state = EmulatorState.initial(num_envs)
    digest = bytes(_DIGEST_BYTES)
    while state.row < mark.rows:
        header = file.read(_CHUNK.size)
        kind, row, steps, count, payload_bytes, previous = _CHUNK.unpack(header)
        if kind != _CHUNK_MAGIC or not 0 < count * num_envs <= MAX_CHUNK_BYTES:
            raise ValueError("a chunk has no valid header")
        if row + count > mark.rows:  # each position that a checkpoint holds is the end of a chunk
            raise ValueError("a chunk goes beyond the checkpoint's position")
        if payload_bytes > size - file.tell():
            raise ValueError("it ends before the checkpoint's position")
        arrays, payload = file.read(_STATE_BYTES * num_envs), file.read(payload_bytes)
        found = hashlib.sha256(header + arrays + payload).digest()
        if file.read(_DIGEST_BYTES) != found:
            raise ValueError(f"the checksum of the chunk at vector step {row:,} does not match")
        if first is None:
            started, seeded, seed_label, resets = np.frombuffer(arrays, "<i8").reshape(4, num_envs).astype(np.int64)
            first = state = EmulatorState(row, steps, started, seeded, seed_label, resets)
        elif previous != digest or row != state.row:
            raise ValueError(f"the chunk at vector step {row:,} does not follow the one before it")
        rows = _unpack(payload, count, num_envs)
        parts.append(rows)
        state = state.after(rows, reseed_period)
        digest = found
    if state.row != mark.rows or (mark.digest and digest.hex() != mark.digest):
        raise ValueError("it is not the action log that belongs to the checkpoint")
    empty = np.zeros((0, num_envs), np.uint8)
    history = History(np.concatenate([empty, *parts]), first or state, reseed_period)
    return history, file.tell(), state, digest


def _unpack(payload: bytes, count: int, num_envs: int) -> Bytes:
    decompressor = zlib.decompressobj()
    data = decompressor.decompress(payload, count * num_envs)
    if len(data) != count * num_envs or decompressor.unconsumed_tail:
        raise ValueError("a chunk does not hold the rows that it claims")
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(num_envs, count).T)
