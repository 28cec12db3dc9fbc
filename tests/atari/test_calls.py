"""Calls in an order that means nothing are refused at once, and a reset resets what it was asked to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded
from gymnasium.vector import AsyncVectorEnv

from wn_rl.atari.env import AtariVector, make_atari
from wn_rl.errors import UsageError

N = 3


@pytest.fixture
def env() -> Iterator[AtariVector]:
    made = make_atari("breakout", N, seed=4, num_threads=1)
    yield made
    if not made.closed:
        made.close()


def actions(value: int = 1) -> np.ndarray[Any, Any]:
    return np.full(N, value)


def test_a_reset_while_a_step_is_pending_is_refused_and_nothing_lags_behind(env: AtariVector) -> None:
    """The observation that came back from such a reset was the step's, and all later ones were one behind."""
    other = make_atari("breakout", N, seed=4, num_threads=1)
    for one in (env, other):
        one.reset(seed=4)
    env.send(actions())
    for call in (lambda: env.reset(), lambda: env.send(actions()), lambda: env.step(actions())):
        with pytest.raises(AlreadyPendingCallError, match="call recv"):
            call()
    found, expected = env.recv(), other.step(actions())
    for step in range(20):
        assert np.array_equal(found[0], expected[0]), step
        assert np.array_equal(found[1], expected[1])
        found, expected = env.step(actions(step % 4)), other.step(actions(step % 4))
    other.close()


def test_recv_without_send_is_refused_instead_of_waiting_for_ever(env: AtariVector) -> None:
    env.reset()
    with pytest.raises(NoAsyncCallError, match="without a send"):
        env.recv()
    env.step(actions())
    with pytest.raises(NoAsyncCallError):
        env.recv()


def test_a_step_needs_a_reset_and_nothing_works_after_close(env: AtariVector) -> None:
    with pytest.raises(ResetNeeded):
        env.step(actions())
    env.reset()
    env.close()
    for call in (env.reset, env.recv, lambda: env.send(actions())):
        with pytest.raises(ClosedEnvironmentError):
            call()


def test_the_errors_are_those_of_gymnasiums_own_vector_environments(env: AtariVector) -> None:
    theirs: Any = AsyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * N)
    ours: Any = env
    calls: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
        (lambda e: e.recv(), lambda e: e.step_wait()),
        (
            lambda e: (e.send(actions()), e.send(actions())),
            lambda e: (e.step_async(actions()), e.step_async(actions())),
        ),
        (lambda e: e.reset(), lambda e: e.reset()),
    ]
    for one in (ours, theirs):
        one.reset(seed=1)
    for our_call, their_call in calls:
        kinds = []
        for one, call in ((ours, our_call), (theirs, their_call)):
            with pytest.raises((AlreadyPendingCallError, NoAsyncCallError)) as caught:
                call(one)
            kinds.append(caught.type)
        assert kinds[0] is kinds[1]
    ours.recv()
    theirs.step_wait()
    theirs.close()


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "a seed must be an integer, 0 or more, not -1"),
        (1.5, "seed must be an integer, or 3 of them"),
        (True, "a seed must be an integer"),
        ([1, None, 2], "seed must be an integer, or 3 of them"),
        ([1, 2], "seed must be an integer, or 3 of them"),
        ([2**40, 1, 1], "the seed of an emulator must be from 0 to 2147483647"),
        ([1, -1, 1], "the seed of an emulator must be from 0 to 2147483647"),
        ("three", "seed must be an integer, or 3 of them"),
    ],
)
def test_seeds_that_are_none_are_usage_errors(env: AtariVector, seed: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        env.reset(seed=seed)
    assert "\n" not in str(caught.value)
    env.reset(seed=[1, 2, 2**31 - 1])  # and the emulators are as they were


def test_a_mask_resets_the_chosen_emulators_alone(env: AtariVector) -> None:
    """As ale-py's own vector environment does, whose emulators play beside ours."""
    env.reset(seed=[5, 6, 7])
    for _ in range(30):
        before, *_, info = env.step(actions())
    returns = info["episode_return"].copy()
    assert (info["episode_length"] == 30).all()
    mask = np.array([False, True, False])
    observations, info = env.reset(seed=[0, 9, 0], options={"reset_mask": mask})
    assert np.array_equal(observations[0], before[0])
    assert np.array_equal(observations[2], before[2])
    assert info["episode_length"].tolist() == [30, 0, 30]
    assert info["episode_return"].tolist() == [returns[0], 0.0, returns[2]]
    assert info["is_reset"].tolist() == [False, True, False]
    fresh = make_atari("breakout", N, num_threads=1)
    expected, _ = fresh.reset(seed=[9, 9, 9])
    assert np.array_equal(observations[1], expected[1])
    for _ in range(10):
        found, expected = env.step(actions(2)), fresh.step(actions(2))
        assert np.array_equal(found[0][1], expected[0][1])
    fresh.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reset_mask": np.zeros(N, bool)}, "has no True"),
        ({"reset_mask": np.ones(2, bool)}, r"must be a bool array of shape \(3,\)"),
        ({"reset_mask": [1, 0, 1]}, "must be a bool array"),
        ({"mode": 3}, "reset\\(\\) knows no option mode: only reset_mask"),
    ],
)
def test_options_are_honoured_or_refused(env: AtariVector, options: dict[str, Any], message: str) -> None:
    env.reset()
    with pytest.raises(UsageError, match=message):
        env.reset(options=options)
    env.step(actions())


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_emulators_play_leaves_a_reset_to_make(env: AtariVector) -> None:
    """The result of the step is lost, so the next step is refused until a reset: never an observation that lags."""
    env.reset()
    interrupted = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupted.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - whenever it comes
        while True:
            env.step(actions())
            time.sleep(0)
    interrupted.join()
    with pytest.raises((ResetNeeded, NoAsyncCallError, AlreadyPendingCallError)) as caught:
        env.recv()
    if caught.type is AlreadyPendingCallError:
        env.recv()
    observations, _ = env.reset(seed=1)
    other = make_atari("breakout", N, num_threads=1)
    assert np.array_equal(observations, other.reset(seed=1)[0])
    other.close()
