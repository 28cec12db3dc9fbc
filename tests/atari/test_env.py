"""The vector environment equals Gymnasium's preprocessing, and marks resets, life losses and ends as it promises."""

from __future__ import annotations

from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from numpy.typing import NDArray

from wn_rl import make_atari
from wn_rl.atari.env import NO_CAP, AtariVector, emulator_seeds
from wn_rl.atari.games import find_game
from wn_rl.errors import UsageError

gym.register_envs(ale_py)


def gymnasium_env(game: str, padding: str, **options: Any) -> gym.Env[Any, Any]:
    emulator = gym.make(find_game(game).gymnasium_id, frameskip=1, repeat_action_probability=0.0, **options)
    return FrameStackObservation(AtariPreprocessing(emulator, noop_max=0, frame_skip=4), 4, padding_type=padding)


@pytest.mark.parametrize(
    ("game", "options", "steps"),
    [
        ("Breakout", {}, 400),
        ("SpaceInvaders", {}, 150),
        ("Qbert", {}, 250),
        ("Seaquest", {}, 250),
        ("Pong", {}, 100),
        ("Pong", {"cap": 200}, 160),
        ("Freeway", {"full": True}, 60),
    ],
)
def test_pixels_rewards_and_ends_equal_gymnasiums_but_for_the_padding_after_a_reset(
    game: str, options: dict[str, Any], steps: int
) -> None:
    cap, full = options.get("cap"), options.get("full", False)
    env = make_atari(game, 2, noop_max=0, max_frames_per_episode=cap, full_action_set=full)
    extra = {"full_action_space": full} | ({"max_num_frames_per_episode": cap} if cap else {})
    seeds = np.array([11, 12])
    observations, _ = env.reset(seed=seeds)
    references = [[gymnasium_env(game, padding, **extra) for padding in ("zero", "reset")] for _ in seeds]
    rng = np.random.default_rng(3)
    age, ended, ends = [0, 0], [False, False], 0
    for slot, pair in enumerate(references):
        for reference in pair:
            reference.reset(seed=int(seeds[slot]))
    for _ in range(steps):
        actions = rng.integers(env.num_actions, size=2)
        observations, rewards, terminated, truncated, info = env.step(actions)
        for slot, pair in enumerate(references):
            assert info["is_reset"][slot] == ended[slot]
            if ended[slot]:
                expected = [(reference.reset()[0], 0.0, False, False) for reference in pair]
                age[slot], ends = 0, ends + 1
            else:
                expected = [reference.step(actions[slot])[:4] for reference in pair]
                age[slot] += 1
            zero, repeated = expected
            np.testing.assert_array_equal(observations[slot], zero[0])
            # Padding with the reset frame, Gymnasium's default, is the one difference: it fills what is black here.
            black = max(3 - age[slot], 0)
            np.testing.assert_array_equal(observations[slot][black:], repeated[0][black:])
            assert not observations[slot][:black].any()
            assert (rewards[slot], terminated[slot], truncated[slot]) == zero[1:]
            ended[slot] = bool(zero[2] or zero[3])
    assert ends > 0 or game != "Breakout"
    assert not cap or ends == 2 * (steps // 51)
    env.close()


def play(env: AtariVector, steps: int, seed: int = 0) -> list[tuple[NDArray[Any], ...]]:
    rng = np.random.default_rng(seed)
    trace = []
    for _ in range(steps):
        observations, rewards, terminated, truncated, info = env.step(rng.integers(env.num_actions, size=env.num_envs))
        trace.append((observations.copy(), rewards, terminated, truncated, *(info[key].copy() for key in sorted(info))))
    return trace


def info_life_loss(step: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    """Return ``info["life_loss"]`` of a step of :func:`play`, whose infos are sorted by name."""
    return step[4 + 3]


def same(a: list[tuple[NDArray[Any], ...]], b: list[tuple[NDArray[Any], ...]]) -> bool:
    return all(np.array_equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_it_is_a_gymnasium_vector_environment() -> None:
    env = make_atari("breakout", 3)
    assert isinstance(env, gym.vector.VectorEnv)
    observations, _ = env.reset(seed=1)
    assert env.observation_space.contains(observations)
    assert (observations.shape, observations.dtype) == ((3, 4, 84, 84), np.uint8)
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert env.action_meanings == ("NOOP", "FIRE", "RIGHT", "LEFT")
    _, rewards, terminated, truncated, _ = env.step(np.zeros(3, np.int64))
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
    env.close()


def test_the_step_after_an_end_ignores_its_action_and_counts_for_nothing() -> None:
    traces = []
    for action in (0, 3):
        env = make_atari("breakout", 1, seed=4, noop_max=30)
        env.reset()
        rng = np.random.default_rng(0)
        ended, total, length, trace = False, 0.0, 0, []
        for _ in range(600):
            played = np.array([action]) if ended else rng.integers(4, size=1)
            if ended:
                rng.integers(4, size=1)
            observation, reward, terminated, truncated, info = env.step(played)
            assert info["is_reset"][0] == ended
            total, length = (0.0, 0) if ended else (total + reward[0], length + 1)
            assert (info["episode_return"][0], info["episode_length"][0]) == (total, length)
            assert not ended or reward[0] == 0.0
            ended = bool(terminated[0] or truncated[0])
            trace.append(observation.copy())
        traces.append(np.stack(trace))
        env.close()
    np.testing.assert_array_equal(traces[0], traces[1])


def test_a_life_loss_is_a_drop_of_lives_that_resets_nothing() -> None:
    env = make_atari("breakout", 2, seed=0)
    env.reset()
    rng = np.random.default_rng(1)
    before, losses, games = np.array([5, 5]), 0, 0
    for _ in range(500):
        _, _, terminated, _, info = env.step(rng.integers(4, size=2))
        dropped = (info["lives"] < before) & ~info["is_reset"]
        np.testing.assert_array_equal(info["life_loss"], dropped)
        assert not (terminated & ~info["life_loss"]).any()  # the last life is a life too
        losses += int(dropped.sum())
        games += int(terminated.sum())
        before = info["lives"]
    assert games > 0
    assert losses >= 5 * games
    env.close()
    pong = make_atari("pong", 1)
    pong.reset()
    assert not any(info_life_loss(step).any() for step in play(pong, 100))
    pong.close()


def test_no_ops_are_uniform_from_0_to_noop_max_inclusive() -> None:
    for noop_max, expected in ((0, {0}), (3, {0, 1, 2, 3})):
        env = make_atari("breakout", 16, noop_max=noop_max, seed=2)
        seen: set[int] = set()
        env.reset()
        for _ in range(3):
            _, info = env._emulators.reset()
            seen |= set(info["episode_frame_number"].tolist())
        assert seen == expected
        env.close()


def test_options_reach_the_emulators() -> None:
    full = make_atari("breakout", 1, full_action_set=True)
    assert full.num_actions == 18
    plain, sticky, fire = (
        make_atari("breakout", 2, noop_max=0, seed=1, **options)
        for options in ({}, {"sticky_actions": 0.25}, {"fire_reset": True})
    )
    traces = []
    for env in (plain, sticky, fire):
        first, _ = env.reset(seed=5)
        traces.append((first, play(env, 60)))
    assert not same(traces[0][1], traces[1][1])
    assert not same(traces[0][1], traces[2][1])
    sticky.reset(seed=5)
    assert same(traces[1][1], play(sticky, 60))
    for env in (full, plain, sticky, fire):
        env.close()


def test_the_frame_cap_truncates_and_no_cap_is_none() -> None:
    env = make_atari("breakout", 1, max_frames_per_episode=80)
    env.reset()
    for step in range(1, 21):
        _, _, terminated, truncated, info = env.step(np.array([0]))
        assert not terminated[0]
        assert truncated[0] == (step == 20)
    assert info["episode_length"][0] == 20
    env.close()
    endless = make_atari("breakout", 1)
    endless.reset()
    assert not any(step[3].any() for step in play(endless, 30))
    endless.close()


def test_rewards_are_raw_points() -> None:
    env = make_atari("space_invaders", 4, seed=0)
    env.reset()
    assert max(float(step[1].max()) for step in play(env, 150)) >= 5.0
    env.close()


def test_a_trajectory_depends_on_the_seed_and_not_on_threads_or_on_split_steps() -> None:
    one, two, other = (make_atari("breakout", 3, seed=s, num_threads=n) for s, n in ((7, 1), (7, 2), (8, 1)))
    for env in (one, two, other):
        env.reset()
    first = play(one, 120)
    assert same(first, play(two, 120))
    two.reset(seed=7)
    rng = np.random.default_rng(0)
    for expected in first:
        two.send(rng.integers(4, size=3))
        np.testing.assert_array_equal(two.recv()[0], expected[0])
    assert not same(first, play(other, 120))
    one.reset()  # unseeded now: it goes on with other no-op counts
    unseeded = play(one, 60)
    one.reset(seed=7)
    assert not same(unseeded, play(one, 60))
    for env in (one, two, other):
        env.close()


def test_seeds_and_streams_share_no_emulator() -> None:
    runs = [emulator_seeds(1, 16, 0), emulator_seeds(2, 16, 0), emulator_seeds(1, 16, 1), emulator_seeds(1, 16, 0, 5)]
    assert len({int(seed) for seeds in runs for seed in seeds}) == 64
    assert all((seeds >= 0).all() for seeds in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"game": "Brekout"}, "Did you mean 'Breakout'"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"noop_max": -1}, "noop_max must be 0 or more"),
        ({"sticky_actions": 1.0}, "sticky_actions is a probability"),
        ({"max_frames_per_episode": 0}, "max_frames_per_episode must be 1"),
        ({"max_frames_per_episode": NO_CAP + 1}, "max_frames_per_episode must be 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_atari(**({"game": "breakout"} | arguments))
