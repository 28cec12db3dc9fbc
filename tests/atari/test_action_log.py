"""The action log on disk, and emulators and replay that are restored from it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agents.backends.eager import Eager
from wn_rl.atari.action_log import AUTO_RESET, RESEEDED, ActionLog, EmulatorState, History, Mark, read_history
from wn_rl.atari.env import make_atari
from wn_rl.config import TrainConfig
from wn_rl.errors import CheckpointError
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.replay import Replay
from wn_rl.training import TrainingLoop

Rows = NDArray[np.uint8]


def rows_of(*rows: tuple[int, ...]) -> Rows:
    return np.array(rows, np.uint8)


class TestState:
    """Two emulators; agent steps by hand, a reseeding period of 3 agent steps."""

    ROWS = rows_of((1, 2), (0, AUTO_RESET), (3, 3), (AUTO_RESET, 1), (2, RESEEDED), (2, 1))
    # agent steps before each row: 0, 2, 3, 5, 6, 7 and 9 at the end

    def test_by_hand(self) -> None:
        state = EmulatorState.initial(2).after(self.ROWS, reseed_period=3)
        assert (state.row, state.steps) == (6, 9)
        assert state.started.tolist() == [4, 5]
        assert state.seeded.tolist() == [0, 5]
        assert state.seed_label.tolist() == [0, 2]  # 6 agent steps before the row that seeded it
        assert state.resets.tolist() == [1, 0]

    def test_episodes_by_hand(self) -> None:
        episodes = list(History(self.ROWS, EmulatorState.initial(2), 3).episodes())
        assert [(e.slot, e.first_row, e.last_row, e.resets) for e in episodes] == [
            (1, 0, 0, 0),
            (0, 0, 2, 0),
            (1, 2, 3, 1),
        ]
        assert [e.length for e in episodes] == [1, 3, 2]
        assert [e.last_step for e in episodes] == [2, 4, 6]

    @given(
        st.lists(st.tuples(*[st.sampled_from([0, 1, 17, AUTO_RESET, RESEEDED])] * 3), max_size=30),
        st.integers(0, 30),
        st.integers(1, 9),
    )
    def test_two_parts_give_the_same_as_the_whole(self, rows: list[tuple[int, ...]], cut: int, period: int) -> None:
        whole = rows_of(*rows).reshape(-1, 3)
        at_once = EmulatorState.initial(3).after(whole, period)
        in_parts = EmulatorState.initial(3).after(whole[:cut], period).after(whole[cut:], period)
        assert (at_once.row, at_once.steps) == (in_parts.row, in_parts.steps)
        assert np.array_equal(at_once.arrays(), in_parts.arrays())


@given(rows=st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=60), marks=st.sets(st.integers(1, 60)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_read_is_what_was_written(tmp_path: Path, rows: list[tuple[int, ...]], marks: set[int]) -> None:
    log = ActionLog(tmp_path / "action_log.bin", 4, 0)
    log.create()
    known: list[Mark] = []
    for count, row in enumerate(rows, 1):
        log.append(np.array(row, np.uint8))
        if count in marks:
            known.append(log.mark())
    known.append(log.mark())
    for mark in known:
        assert read_history(tmp_path / "action_log.bin", 4, 0, mark).rows.tolist() == [
            list(r) for r in rows[: mark.rows]
        ]


def test_writing_goes_on_behind_a_mark_and_drops_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "action_log.bin"
    first = ActionLog(path, 2, 0)
    first.create()
    first.append(rows_of((1, 1))[0])
    mark = first.mark()
    for _ in range(50):
        first.append(rows_of((2, 2))[0])
    first.mark()
    longer = path.stat().st_size
    again = ActionLog(path, 2, 0)
    assert again.open(mark).rows.tolist() == [[1, 1]]
    assert path.stat().st_size == longer  # opening changes nothing yet
    again.cut()
    assert path.stat().st_size < longer
    again.append(rows_of((3, 3))[0])
    assert read_history(path, 2, 0, again.mark()).rows.tolist() == [[1, 1], [3, 3]]


@pytest.mark.parametrize("place", [3, 20, 60, 90, -40, -1])
def test_a_flipped_bit_is_found(tmp_path: Path, place: int) -> None:
    path = tmp_path / "action_log.bin"
    log = ActionLog(path, 2, 0)
    log.create()
    rng = np.random.default_rng(0)
    for _ in range(100):
        log.append(rng.integers(0, 4, 2).astype(np.uint8))
    mark = log.mark()
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"action_log\.bin is damaged"):
        read_history(path, 2, 0, mark)


def test_a_action_log_that_ends_too_early_is_another_runs_or_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "action_log.bin"
    log = ActionLog(path, 2, 0)
    with pytest.raises(CheckpointError, match="No such file"):
        log.open(Mark(1, ""))
    log.create()
    log.append(rows_of((1, 1))[0])
    mark = log.mark()
    with pytest.raises(CheckpointError, match="damaged"):
        read_history(path, 2, 0, Mark(2, mark.digest))
    with pytest.raises(CheckpointError, match="belongs to the checkpoint"):
        read_history(path, 2, 0, Mark(1, "0" * 64))
    with pytest.raises(CheckpointError, match="not the action log of 3 emulators"):
        read_history(path, 3, 0, mark)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="damaged"):
        read_history(path, 2, 0, mark)


def test_trimming_keeps_what_a_resumed_run_needs(tmp_path: Path) -> None:
    path = tmp_path / "action_log.bin"
    log = ActionLog(path, 2, 0)
    log.create()
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 4, (400, 2)).astype(np.uint8)
    rows[100::90, 0] = AUTO_RESET
    rows[50::70, 1] = AUTO_RESET
    for index, row in enumerate(rows):
        log.append(row)
        if index % 20 == 0:
            log.mark()
    mark = log.mark()
    before, size = read_history(path, 2, 0, mark), path.stat().st_size
    log.trim(300)
    after = read_history(path, 2, 0, mark)
    assert path.stat().st_size < size / 2
    needed = before.state(300).needed_row(sticky=False)
    assert 0 < after.first_row <= needed
    assert np.array_equal(after.rows, rows[after.first_row :])
    assert np.array_equal(after.state(350).arrays(), before.state(350).arrays())
    assert after.state(350).steps == before.state(350).steps
    log.append(rows[0])
    assert len(read_history(path, 2, 0, log.mark()).rows) == len(after.rows) + 1
    with pytest.raises(CheckpointError, match="is not in it"):
        after.state(0)


def test_a_position_that_no_run_can_have_is_refused() -> None:
    """Two emulators, 5 agent steps: with an episode a step each resets every other time, so 6 vector steps at most."""
    loop = {"agent_steps": 5, "action_log": "00"}
    assert Mark.of(loop | {"vector_steps": 6}, 2) == Mark(6, "00")
    for rows in (7, 10**12, -1):
        with pytest.raises(ValueError, match="are not 5 agent steps"):
            Mark.of(loop | {"vector_steps": rows}, 2)


def test_50_million_actions_fit_into_40_mb(tmp_path: Path) -> None:
    log = ActionLog(tmp_path / "action_log.bin", 16, 0)
    log.create()
    rng = np.random.default_rng(0)
    # the hardest case: eighteen actions, all random
    for row in rng.integers(0, 18, (40_000, 16)).astype(np.uint8):
        log.append(row)
    log.mark()
    assert (tmp_path / "action_log.bin").stat().st_size / 640_000 * 50e6 < 40e6


class RandomAgent:
    """Plays at random and learns nothing."""

    def __init__(self, num_actions: int) -> None:
        self.updates = 0
        self.device = torch.device("cpu")
        self.q_network = build_q_network(QNetworkSpec(num_actions, hidden_units=1), seed=0)
        self._generator = torch.Generator().manual_seed(7)

    def act(self, observations: torch.Tensor, epsilon: NDArray[np.float32]) -> torch.Tensor:
        return torch.randint(self.q_network.spec.num_actions, (len(observations),), generator=self._generator)


def content(replay: Replay) -> dict[str, list[bytes]]:
    """Return every byte that can ever be drawn: frames and ages of all rows, what followed all but the newest one."""
    oldest = max(replay._newest - replay._ring + 1, 0)
    rows = [
        slice(row % replay._ring * replay.num_envs, (row % replay._ring + 1) * replay.num_envs)
        for row in range(oldest, replay._newest + 1)
    ]
    low, high = replay.index_range
    indices = torch.arange(low, high) % len(replay.storage.entry_of)
    return {
        "frames": [replay.storage.frames[row].numpy().tobytes() for row in rows],
        "ages": [replay.storage.age[row].numpy().tobytes() for row in rows],
        "actions": [replay.storage.actions[row].numpy().tobytes() for row in rows[:-1]],
        "rewards": [replay.storage.rewards[row].numpy().tobytes() for row in rows[:-1]],
        "terminals": [replay.storage.terminals[row].numpy().tobytes() for row in rows[:-1]],
        "indices": [replay.storage.entry_of[indices].numpy().tobytes(), f"{low} {high}".encode()],
    }


def loop_of(config: TrainConfig, path: Path) -> TrainingLoop:
    env = make_atari(
        config.game,
        config.num_envs,
        num_threads=1,
        noop_max=config.noop_max,
        sticky_actions=config.sticky_actions,
        max_frames_per_episode=config.max_frames,
    )
    log = ActionLog(path, config.num_envs, config.reseed_period if config.sticky_actions else 0)
    replay = Replay(config.replay_capacity, config.num_envs)
    backend = Eager(RandomAgent(env.num_actions), replay)  # type: ignore[arg-type]
    return TrainingLoop(config, env, backend, replay, log)


@pytest.mark.parametrize("sticky", [0.0, 0.25])
@given(
    game=st.sampled_from(["Breakout", "SpaceInvaders", "Pong", "Freeway"]),
    num_envs=st.integers(1, 5),
    capacity=st.integers(5, 300),
    cap=st.sampled_from([0, 0, 40, 200, 1000]),
    steps=st.integers(0, 420),
    period=st.sampled_from([1, 150, 10**6]),
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_emulators_and_replay_get_to_where_they_were(
    tmp_path: Path, sticky: float, game: str, num_envs: int, capacity: int, cap: int, steps: int, period: int
) -> None:
    config = TrainConfig(
        game=game,
        num_envs=num_envs,
        replay_capacity=max(capacity, num_envs),
        learning_starts=10**9,
        sticky_actions=sticky,
        max_frames_per_episode=cap,
        reseed_period=period,
        noop_max=5,
    )
    path = tmp_path / "action_log.bin"
    first = loop_of(config, path)
    assert first.action_log is not None
    first.action_log.create()
    first.start()
    ended = []
    while first.agent_steps < steps:
        ended += first.vector_step()
    second = loop_of(config, path)
    assert second.action_log is not None
    history = second.action_log.open(first.action_log.mark())
    second.restore(history)
    assert content(second.replay) == content(first.replay)
    assert second.replay.checksum() == first.replay.checksum()
    assert second.agent_steps == first.agent_steps
    logged = [(episode.last_step * 4, episode.length) for episode in history.episodes()]
    assert logged == [(episode.frames, episode.length) for episode in ended][: len(logged)]
    second.agent._generator.set_state(first.agent._generator.get_state())  # type: ignore[attr-defined]
    for _ in range(60):
        assert first.vector_step() == second.vector_step()
    assert content(second.replay) == content(first.replay)
    assert second.replay.checksum() == first.replay.checksum()
    first.env.close()
    second.env.close()


def test_reseeding_is_due_once_a_period_at_an_episodes_start(tmp_path: Path) -> None:
    config = TrainConfig(
        game="Breakout",
        num_envs=3,
        replay_capacity=50,
        learning_starts=10**9,
        sticky_actions=0.25,
        max_frames_per_episode=80,  # an episode every 20 agent steps of each
        reseed_period=120,
    )
    loop = loop_of(config, tmp_path / "action_log.bin")
    assert loop.action_log is not None
    loop.action_log.create()
    loop.start()
    while loop.agent_steps < 500:
        loop.vector_step()
    rows = read_history(loop.action_log.path, 3, 120, loop.action_log.mark()).rows
    # 21 rows an episode, 60 agent steps in each: due at the resets after 120, 240, … agent steps, every second one
    assert np.flatnonzero((rows == RESEEDED).all(1)).tolist() == [41, 83, 125, 167]
    assert np.flatnonzero((rows == AUTO_RESET).all(1)).tolist() == [20, 62, 104, 146]
    loop.env.close()


def test_a_changed_content_changes_the_checksum() -> None:
    def filled(change: str | None) -> str:
        replay = Replay(6, 1)
        rng = np.random.default_rng(0)
        frame = lambda: rng.integers(0, 255, (1, 84, 84)).astype(np.uint8)  # noqa: E731
        replay.start(frame())
        for step in range(9):
            parts = {"actions": [step % 3], "rewards": [float(step)], "terminals": [step == 4], "frames": frame()}
            if step == 5 and change is not None:
                parts[change] = {"actions": [7], "rewards": [-1.0], "terminals": [True], "frames": frame()}[change]
            replay.add(
                *(np.array(parts[key]) for key in ("actions", "rewards", "terminals", "frames")), np.array([False])
            )
        return replay.checksum()

    sums = {filled(change) for change in (None, "actions", "rewards", "terminals", "frames")}
    assert len(sums) == 5
    assert filled(None) == filled(None)
