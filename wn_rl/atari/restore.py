"""Replays the actions of a run, which restores its emulators and its replay buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn_rl.atari.action_log import RESEEDED, History
from wn_rl.atari.env import AtariVector
from wn_rl.errors import CheckpointError

DUMMY_EPISODE = 30
"""Assumed agent steps of an episode of an emulator that plays no-ops until its replay begins: at least so many."""


@dataclass(frozen=True)
class ReplayedStep:
    """A vector step that was replayed; arrays of shape (N,), frames (N, 84, 84).

    Attributes:
        number: of the vector step, from 0.
        actions: 0 where it was an auto-reset.
        rewards: raw points.
        terminated: the game was over.
        truncated: the frame cap ended the episode.
        frames: the newest frame of each emulator after it.
        info: see :class:`wn_rl.atari.env.AtariVector`.
    """

    number: int
    actions: NDArray[np.uint8]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    frames: NDArray[np.uint8]
    info: dict[str, NDArray[Any]]


def replay_actions(
    env: AtariVector,
    history: History,
    first_row: int,
    seeds_of: Callable[[int], NDArray[np.int32]],
    *,
    sticky: bool,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[NDArray[np.uint8] | ReplayedStep]:
    """Restore ``env`` to its state at the end of ``history``.

    Without sticky actions each emulator is seeded, fast-forwarded by resets to the episode that it played at
    ``first_row``, and replays from the beginning of that episode; with them it replays from its last seeding. Until an
    emulator's replay begins it plays no-ops, whose result is not used.

    Args:
        env: emulators with the run's options.
        history: the actions of the run.
        first_row: the first vector step to yield.
        seeds_of: label of a seeding → the seeds of all N emulators.
        sticky: whether the emulators draw random numbers while they play.
        on_progress: called with (vector steps replayed, of how many).

    Yields:
        First the frames before ``first_row``, uint8 (N, 84, 84), then each vector step from there on.

    Raises:
        CheckpointError: the emulators do not do what they did in the run.
    """
    state = history.state(first_row)
    origin = state.seeded if sticky else state.started
    resets = np.zeros_like(state.resets) if sticky else state.resets
    begin, end = int(origin.min()), history.end_row
    slots = np.arange(history.num_envs)
    seeds = np.array([seeds_of(int(label))[slot] for slot, label in zip(slots, state.seed_label, strict=True)])
    observations, _ = env.reset(seed=seeds)
    frames = observations[:, -1].copy()
    done = np.zeros_like(resets)

    def restart(chosen: NDArray[np.bool_], new_seeds: NDArray[np.int32] | None = None) -> None:
        frames[chosen] = env.restart(chosen, new_seeds)[chosen, -1]
        done[chosen] = done[chosen] + 1 if new_seeds is None else 0

    spare = np.where(origin == begin, 0, 1 + (origin - begin) // DUMMY_EPISODE)
    while (chosen := done < resets - spare).any():
        restart(chosen)

    def begin_row(row: int) -> None:
        """Restart the emulators whose replay begins here, and send the actions of all."""
        late = (origin == row) & (row > begin)
        if (overshot := late & (done >= resets)).any():
            restart(overshot, seeds[overshot])
        while (chosen := late & (done < resets)).any():
            restart(chosen)
        if row < end:
            env.send(np.where(origin <= row, actions_of(row), 0))

    def actions_of(row: int) -> NDArray[np.uint8]:
        played = history.row(row)
        return np.where(played < RESEEDED, played, 0).astype(np.uint8)

    begin_row(begin)
    if begin == first_row:
        yield frames.copy()
    for row in range(begin, end):
        live = origin <= row
        played = history.row(row)
        observations, rewards, terminated, truncated, info = env.recv()
        if (info["is_reset"] != (played >= RESEEDED))[live].any():
            raise CheckpointError(
                f"at vector step {row:,} other episodes end than in the run: another version of ale-py, or the "
                "action log of another run"
            )
        frames = observations[:, -1].copy()
        done += info["is_reset"]
        if (reseeded := live & (played == RESEEDED)).any():
            labels = history.state(row + 1).seed_label
            restart(reseeded, np.array([seeds_of(int(labels[slot]))[slot] for slot in slots[reseeded]]))
        begin_row(row + 1)  # the emulators run while this row is stored
        on_progress(row + 1 - begin, end - begin)
        if row >= first_row:
            yield ReplayedStep(row, actions_of(row), rewards, terminated, truncated, frames, info)
        elif row + 1 == first_row:
            yield frames.copy()
