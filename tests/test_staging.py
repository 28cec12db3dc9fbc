"""What goes to the device packed arrives as it was, and a staged replay is the plain one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wn_rl.errors import UsageError
from wn_rl.replay import Minibatch, Replay
from wn_rl.replay.host import HostReplay
from wn_rl.replay.pinned_transfer import ALIGNMENT, Readback, Staging

CPU = torch.device("cpu")
SIZE = 3


def test_fields_arrive_each_as_it_was_packed() -> None:
    staging = Staging(
        {
            "bytes": (torch.uint8, (2, 3)),
            "rewards": (torch.float32, (5,)),
            "ends": (torch.bool, (3,)),
            "numbers": (torch.int64, (2,)),
        },
        CPU,
    )
    assert staging.nbytes == 4 * ALIGNMENT, "6, 20, 3 and 16 bytes each take a place of their own"
    places = {name: field.data_ptr() for name, field in staging.device.items()}
    for turn in range(5):
        fields = staging.begin()
        fields["bytes"][:] = np.arange(6, dtype=np.uint8).reshape(2, 3) + turn
        fields["rewards"][:] = [0.5, -1.0, 2.0, np.inf, turn]
        fields["ends"][:] = [True, False, turn % 2]
        fields["numbers"][:] = [-1, 2**40 + turn]
        staging.send()
        assert staging.device["bytes"].tolist() == [[turn, 1 + turn, 2 + turn], [3 + turn, 4 + turn, 5 + turn]]
        assert staging.device["rewards"].tolist() == [0.5, -1.0, 2.0, float("inf"), float(turn)]
        assert staging.device["ends"].tolist() == [True, False, bool(turn % 2)]
        assert staging.device["numbers"].tolist() == [-1, 2**40 + turn]
    assert {name: field.data_ptr() for name, field in staging.device.items()} == places


def test_what_is_filled_next_does_not_touch_what_is_on_its_way() -> None:
    staging = Staging({"x": (torch.int64, (1,))}, CPU)
    first = staging.begin()["x"]
    first[:] = 1
    staging.send()
    second = staging.begin()["x"]
    second[:] = 2
    assert first.tolist() == [1], "two buffers take turns"
    assert staging.begin()["x"] is first


def test_numbers_come_back_in_an_array_of_their_own() -> None:
    readback = Readback(3, CPU)
    first = readback.read(torch.tensor([1, 2, 3]))
    second = readback.read(torch.tensor([4, 5, 6]))
    assert first.tolist() == [1, 2, 3]
    assert second.tolist() == [4, 5, 6]


def parts(batch: Minibatch) -> dict[str, Tensor]:
    return {entry.name: getattr(batch, entry.name) for entry in fields(Minibatch)}


@settings(max_examples=40, deadline=None)
@given(
    num_envs=st.integers(1, 5),
    rows=st.integers(1, 7),
    steps=st.integers(0, 30),
    started_at=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_staged_and_host_replays_hold_and_draw_what_the_plain_one_does(
    num_envs: int, rows: int, steps: int, started_at: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def frames() -> Any:
        return rng.integers(0, 256, (num_envs, SIZE, SIZE), np.uint8)

    small: dict[str, Any] = {"seed": seed, "frame_shape": (SIZE, SIZE)}
    plain = Replay(rows * num_envs, num_envs, **small)
    staged = Replay(rows * num_envs, num_envs, staged=True, **small)
    host = HostReplay(rows * num_envs, num_envs, device=CPU, **small)
    replays = (plain, staged, host)
    ages, first = rng.integers(0, 6, num_envs), frames()
    for replay in replays:
        if started_at:
            replay.restore_at(started_at, 2 * started_at, ages, first)
        else:
            replay.start(first)
    for step in range(steps):
        row = (
            rng.integers(0, 18, num_envs),
            rng.normal(size=num_envs),
            rng.random(num_envs) < 0.3,
            frames(),
            rng.random(num_envs) < 0.3,
        )
        for replay in replays:
            replay.add(*row)
        for other in (staged, host):
            assert torch.equal(other.observations(), plain.observations())
        assert torch.equal(host.stage_observations(), plain.observations())
        # After start_at nothing is drawn before the ring is full.
        whole = not started_at or step >= plain.num_rows
        if len(plain) == 0 or not whole:
            continue
        expected = parts(plain.sample(6))
        for found in (staged.sample(6), host.stage_minibatch(6)):
            assert parts(found).keys() == expected.keys()
            for name, value in parts(found).items():
                assert torch.equal(value, expected[name]), name
                assert value.dtype == expected[name].dtype
    for other in (staged, host):
        assert other.checksum() == plain.checksum()
        assert other.index_range == plain.index_range
        low, high = plain.index_range
        if high > low and started_at and steps <= plain.num_rows:
            continue
        if high > low:
            for name, value in parts(plain.transitions(torch.arange(low, high))).items():
                assert torch.equal(parts(other.transitions(torch.arange(low, high)))[name], value)
        else:
            with pytest.raises(UsageError, match="empty"):
                other.sample(1)


def test_a_host_replay_samples_into_tensors_of_their_own_but_stages_into_the_same() -> None:
    replay = HostReplay(20, 2, device=CPU, frame_shape=(SIZE, SIZE))
    rng = np.random.default_rng(0)
    replay.start(rng.integers(0, 256, (2, SIZE, SIZE), np.uint8))
    for _ in range(9):
        replay.add(*np.zeros((3, 2)), rng.integers(0, 256, (2, SIZE, SIZE), np.uint8), np.zeros(2, bool))
    first, second = replay.sample(4), replay.sample(4)
    assert first.observations.data_ptr() != second.observations.data_ptr()
    staged, again = replay.stage_minibatch(4), replay.stage_minibatch(4)
    assert {n: v.data_ptr() for n, v in parts(staged).items()} == {n: v.data_ptr() for n, v in parts(again).items()}
