"""The vector environment, on real emulators: Gymnasium's preprocessing, auto-reset, lives, options and seeding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import wn_rl.atari.env
from wn_rl import make_atari
from wn_rl.atari.env import NO_CAP, AtariVector, emulator_seeds
from wn_rl.errors import UsageError

gym.register_envs(ale_py)

Trace = dict[str, NDArray[Any]]
"""What each step returned, by name, each of shape (steps, N, …)."""


def draw_actions(env: AtariVector, steps: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(env.num_actions, size=(steps, env.num_envs))


def play(env: AtariVector, actions: NDArray[np.int64]) -> Trace:
    names = ("observations", "rewards", "terminated", "truncated")
    steps = []
    for action in actions:
        *arrays, info = env.step(action)
        steps.append(dict(zip(names, arrays, strict=True)) | info)
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def differing(one: Trace, other: Trace) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not np.array_equal(one[name], other[name])}


def ends(trace: Trace) -> NDArray[np.bool_]:
    return trace["terminated"] | trace["truncated"]


def gymnasium_env(game: str, padding: str, cap: int | None) -> gym.Env[Any, Any]:
    capped = {} if cap is None else {"max_num_frames_per_episode": cap}
    emulator = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False, **capped)
    preprocessed = AtariPreprocessing(
        emulator, noop_max=0, frame_skip=4, screen_size=84, terminal_on_life_loss=False, grayscale_obs=True
    )
    return FrameStackObservation(preprocessed, 4, padding_type=padding)


@pytest.mark.parametrize(
    ("game", "cap", "steps", "action_seeds", "least_ends"),
    [
        ("Breakout", None, 300, (6, 11), 4),
        ("SpaceInvaders", None, 310, (1, 14), 2),
        ("Qbert", None, 300, (8, 14), 2),
        ("Seaquest", None, 360, (0, 5), 2),
        ("Pong", None, 200, (0, 1), 0),
        # 201 frames end an episode after one frame of its 51st step: 50 · 4 = 200.
        ("Pong", 201, 160, (0, 1), 6),
    ],
)
def test_everything_equals_gymnasiums_preprocessing_but_for_the_padding_after_a_reset(
    game: str, cap: int | None, steps: int, action_seeds: tuple[int, int], least_ends: int
) -> None:
    """Slot 0 is compared with padding "zero", slot 1 with padding "reset", Gymnasium's default."""
    env = make_atari(game, 2, noop_max=0, max_frames_per_episode=cap, num_threads=1)
    references = [gymnasium_env(game, padding, cap) for padding in ("zero", "reset")]
    seeds = np.array([11, 12])
    actions = np.stack([np.random.default_rng(s).integers(env.num_actions, size=steps) for s in action_seeds], axis=1)

    observations, _ = env.reset(seed=seeds)
    expected: list[tuple[Any, ...]] = [
        (reference.reset(seed=int(seed))[0], 0.0, False, False)
        for reference, seed in zip(references, seeds, strict=True)
    ]
    age, count = [0, 0], 0
    for action in (None, *actions):
        if action is not None:
            observations, rewards, terminated, truncated, info = env.step(action)
            for slot, reference in enumerate(references):
                was_end = expected[slot][2] or expected[slot][3]
                expected[slot] = (
                    (reference.reset()[0], 0.0, False, False) if was_end else reference.step(action[slot])[:4]
                )
                age[slot] = 0 if was_end else age[slot] + 1
                assert (rewards[slot], terminated[slot], truncated[slot]) == expected[slot][1:]
                assert info["is_reset"][slot] == was_end
                count += was_end
        np.testing.assert_array_equal(observations[0], expected[0][0])
        padded = max(3 - age[1], 0)
        np.testing.assert_array_equal(observations[1][padded:], expected[1][0][padded:])
        assert not observations[1][:padded].any()
        assert expected[1][0][:padded].any(axis=(1, 2)).all()
    assert count >= least_ends
    env.close()


@pytest.fixture(scope="module")
def breakout() -> Iterator[AtariVector]:
    """Two emulators with the default options; a test that uses them seeds them first."""
    env = make_atari("breakout", 2, seed=4, num_threads=1)
    yield env
    env.close()


@pytest.fixture(scope="module")
def games(breakout: AtariVector) -> Trace:
    """Random play of Breakout, more than one whole game in each slot."""
    breakout.reset(seed=4)
    trace = play(breakout, draw_actions(breakout, 420))
    assert (trace["terminated"].sum(axis=0) >= 2).all()
    return trace


def test_it_is_a_gymnasium_vector_environment(breakout: AtariVector) -> None:
    assert isinstance(breakout, VectorEnv)
    assert breakout.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert breakout.action_meanings == ("NOOP", "FIRE", "RIGHT", "LEFT")
    assert breakout.action_space.nvec.tolist() == [4, 4]
    observations, info = breakout.reset(seed=1)
    stepped, rewards, terminated, truncated, _ = breakout.step(breakout.action_space.sample())
    for each in (observations, stepped):
        assert each in breakout.observation_space
        assert (each.shape, each.dtype) == ((2, 4, 84, 84), np.uint8)
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
    assert info["is_reset"].all()
    assert {name: array.dtype.name for name, array in info.items()} == {
        "lives": "int32",
        "life_loss": "bool",
        "is_reset": "bool",
        "episode_return": "float64",
        "episode_length": "int64",
    }


def test_what_a_step_returned_is_not_overwritten_by_later_steps(breakout: AtariVector) -> None:
    breakout.reset(seed=1)
    observations, rewards, terminated, truncated, info = breakout.step(np.array([1, 1]))
    kept = [observations, rewards, terminated, truncated, *info.values()]
    copies = [array.copy() for array in kept]
    play(breakout, draw_actions(breakout, 40))
    assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=True))


def test_send_and_recv_are_a_step(breakout: AtariVector) -> None:
    actions = draw_actions(breakout, 30)
    breakout.reset(seed=6)
    stepped = play(breakout, actions)
    breakout.reset(seed=6)
    for t, action in enumerate(actions):
        breakout.send(action)
        *arrays, info = breakout.recv()
        for array, expected in zip((*arrays, *info.values()), stepped.values(), strict=True):
            np.testing.assert_array_equal(array, expected[t])


@pytest.mark.parametrize(("noop_max", "rounds"), [(0, 3), (1, 6), (30, 40)])
def test_no_ops_are_uniform_from_0_to_noop_max_inclusive(noop_max: int, rounds: int) -> None:
    """One step ends these episodes, so that explicit and automatic resets alternate cheaply."""
    env = make_atari("breakout", 4, noop_max=noop_max, max_frames_per_episode=4, num_threads=1)
    env.reset(seed=3)
    idle = np.zeros(4, np.int64)
    counts = []
    for _ in range(rounds):
        counts.append(env._emulators.reset()[1]["episode_frame_number"])
        assert env._emulators.step(idle)[3].all()
        counts.append(env._emulators.step(idle)[4]["episode_frame_number"])
    assert {int(count) for array in counts for count in array} == set(range(noop_max + 1))
    # The mean of 8 · rounds draws lies within 4 standard errors of that of a uniform draw.
    error = np.sqrt(noop_max * (noop_max + 2) / 12 / (8 * rounds))
    assert abs(np.mean(counts) - noop_max / 2) <= 4 * error
    env.close()


def test_is_reset_marks_exactly_the_steps_after_an_end(games: Trace) -> None:
    assert not games["is_reset"][0].any()
    np.testing.assert_array_equal(games["is_reset"][1:], ends(games)[:-1])


def test_a_reset_step_has_no_reward_and_a_new_games_state(games: Trace) -> None:
    at = games["is_reset"]
    assert not games["rewards"][at].any()
    assert not ends(games)[at].any()
    assert (games["lives"][at] == 5).all()
    assert not games["observations"][at][:, :3].any()
    assert games["observations"][at][:, 3].any(axis=(1, 2)).all()


def test_a_reset_step_ignores_its_action(breakout: AtariVector, games: Trace) -> None:
    actions = draw_actions(breakout, 420)
    others = np.where(games["is_reset"], (actions + 1) % 4, actions)
    assert (others != actions).sum() >= 2
    breakout.reset(seed=4)
    assert differing(play(breakout, others), games) == set()


def test_episode_return_and_length_run_over_the_real_steps_of_the_episode(games: Trace) -> None:
    for slot in range(2):
        total, length = 0.0, 0
        for t in range(len(games["rewards"])):
            if games["is_reset"][t, slot]:
                total, length = 0.0, 0
            else:
                total, length = total + games["rewards"][t, slot], length + 1
            assert games["episode_return"][t, slot] == total
            assert games["episode_length"][t, slot] == length
    assert games["episode_return"][ends(games)].max() > 0


def test_an_explicit_reset_in_mid_episode_starts_the_counts_and_the_lives_anew(breakout: AtariVector) -> None:
    breakout.reset(seed=4)
    before = play(breakout, draw_actions(breakout, 100))
    assert (before["lives"][-1] < 5).all()
    _, info = breakout.reset()
    assert info["is_reset"].all()
    assert info["lives"].tolist() == [5, 5]
    assert info["episode_return"].tolist() == [0.0, 0.0]
    assert info["episode_length"].tolist() == [0, 0]
    _, _, _, _, info = breakout.step(np.array([0, 0]))
    assert not info["is_reset"].any()
    assert not info["life_loss"].any()
    assert info["episode_length"].tolist() == [1, 1]


def test_a_life_loss_is_a_drop_of_lives_and_resets_nothing(games: Trace) -> None:
    before = np.concatenate([[[5, 5]], games["lives"][:-1]])
    np.testing.assert_array_equal(games["life_loss"], (games["lives"] < before) & ~games["is_reset"])
    assert (before - games["lives"])[games["life_loss"]].max() == 1
    for slot in range(2):
        end = int(np.flatnonzero(games["terminated"][:, slot])[0])
        lost = np.flatnonzero(games["life_loss"][: end + 1, slot])
        assert games["lives"][lost, slot].tolist() == [4, 3, 2, 1, 0]
        assert not games["is_reset"][: end + 1, slot].any()
        np.testing.assert_array_equal(games["episode_length"][: end + 1, slot], np.arange(1, end + 2))


def test_the_last_life_is_lost_on_the_step_that_ends_the_game(games: Trace) -> None:
    over = games["terminated"]
    assert games["life_loss"][over].all()
    assert (games["lives"][over] == 0).all()
    assert (games["lives"][games["life_loss"] & ~over] > 0).all()


def test_pong_has_no_lives_to_lose_in_a_whole_game() -> None:
    env = make_atari("pong", 1, noop_max=0, num_threads=1)
    env.reset()
    idle = np.array([0])
    for _ in range(1000):
        _, _, terminated, _, info = env.step(idle)
        assert info["lives"][0] == 0
        assert not info["life_loss"][0]
        if terminated[0]:
            break
    assert info["episode_return"][0] == -21.0
    assert not env.step(idle)[4]["life_loss"][0]
    env.close()


def test_the_full_action_set_has_all_18_actions() -> None:
    env = make_atari("breakout", 1, full_action_set=True, num_threads=1)
    assert env.num_actions == env.single_action_space.n == 18
    assert env.action_meanings == tuple(ale_py.Action.__members__)
    env.reset()
    env.step(np.array([17]))
    env.close()


def test_sticky_actions_change_the_trajectory_and_only_a_seeded_reset_repeats_it() -> None:
    plain, sticky = (make_atari("breakout", 1, noop_max=0, sticky_actions=p, num_threads=1) for p in (0.0, 0.25))
    actions = draw_actions(plain, 80)
    first, _ = plain.reset(seed=5)
    ordinary = play(plain, actions)

    second, _ = sticky.reset(seed=5)
    np.testing.assert_array_equal(first, second)
    seeded = play(sticky, actions)
    sticky.reset()
    unseeded = play(sticky, actions)
    assert "observations" in differing(seeded, ordinary)
    assert "observations" in differing(seeded, unseeded)
    sticky.reset()
    assert "observations" in differing(unseeded, play(sticky, actions))

    sticky.reset(seed=5)
    assert differing(play(sticky, actions), seeded) == set()
    sticky.reset()
    assert differing(play(sticky, actions), unseeded) == set()
    plain.close()
    sticky.close()


@pytest.mark.parametrize("fire_reset", [False, True])
def test_only_a_fire_reset_sets_the_ball_in_motion(fire_reset: bool) -> None:
    """Breakout waits for FIRE: without it, idling shows one and the same picture, after either kind of reset."""
    env = make_atari("breakout", 1, noop_max=0, fire_reset=fire_reset, max_frames_per_episode=80, num_threads=1)
    env.reset()
    trace = play(env, np.zeros((41, 1), np.int64))
    assert np.flatnonzero(ends(trace)[:, 0]).tolist() == [19, 40]
    newest = trace["observations"][:, 0, 3]
    for episode in (newest[:20], newest[21:]):
        assert bool((episode[2:] != episode[2]).any()) == fire_reset
    env.close()


@pytest.mark.parametrize(("cap", "noop_max", "last_step"), [(80, 0, 20), (81, 0, 21), (3, 0, 1), (40, 30, 10)])
def test_the_frame_cap_truncates_after_so_many_frames_besides_the_no_ops(
    cap: int, noop_max: int, last_step: int
) -> None:
    env = make_atari("breakout", 2, noop_max=noop_max, max_frames_per_episode=cap, num_threads=1)
    env.reset()
    trace = play(env, np.zeros((2 * last_step + 1, 2), np.int64))
    assert not trace["terminated"].any()
    for slot in range(2):
        assert np.flatnonzero(trace["truncated"][:, slot]).tolist() == [last_step - 1, 2 * last_step]
    assert (trace["episode_length"][trace["truncated"]] == last_step).all()
    env.close()


@pytest.mark.parametrize(("cap", "reached"), [(None, NO_CAP), (108_000, 108_000)])
def test_the_emulators_are_given_the_cap_and_for_none_the_largest(
    cap: int | None, reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An episode of Gymnasium's default cap, 108,000 frames, would take too long to play here."""
    given_options: dict[str, Any] = {}

    class Noting(AtariVectorEnv):
        def __init__(self, game: str, num_envs: int, **options: Any) -> None:
            given_options.update(options)
            super().__init__(game, num_envs, **options)

    monkeypatch.setattr(wn_rl.atari.env, "AtariVectorEnv", Noting)
    env = make_atari("pong", 1, max_frames_per_episode=cap, num_threads=1)
    env.reset()
    assert given_options["max_num_frames_per_episode"] == reached
    assert not ends(play(env, draw_actions(env, 5))).any()
    env.close()


def test_rewards_are_the_games_raw_points() -> None:
    """Space Invaders' six rows of invaders score 5, 10, … 30 points."""
    env = make_atari("space_invaders", 2, num_threads=1)
    env.reset()
    rewards = play(env, draw_actions(env, 150))["rewards"]
    assert set(np.unique(rewards)) <= {0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0}
    assert rewards.max() > 1.0
    env.close()


def test_a_trajectory_depends_on_the_seed_and_not_on_the_number_of_threads() -> None:
    same, threaded, other = (make_atari("breakout", 2, seed=s, num_threads=n) for s, n in ((7, 1), (7, 2), (8, 1)))
    actions = draw_actions(same, 120)
    traces = []
    for env in (same, threaded, other):
        env.reset()
        traces.append(play(env, actions))
    assert differing(traces[0], traces[1]) == set()
    assert "observations" in differing(traces[0], traces[2])

    same.reset(seed=7)
    assert differing(play(same, actions), traces[0]) == set()
    for env in (same, threaded, other):
        env.close()


def test_an_array_seeds_each_emulator_whatever_its_slot(breakout: AtariVector) -> None:
    actions = draw_actions(breakout, 30)
    breakout.reset(seed=np.array([21, 22]))
    straight = play(breakout, actions)
    breakout.reset(seed=np.array([22, 21]))
    swapped = play(breakout, actions[:, ::-1])
    assert differing({name: array[:, ::-1] for name, array in swapped.items()}, straight) == set()


def test_emulators_of_different_runs_and_streams_share_no_seed() -> None:
    assert not set(emulator_seeds(1, 16)) & set(emulator_seeds(2, 16))
    streams = [
        emulator_seeds(1, 16, 1),
        emulator_seeds(1, 16, 2),
        emulator_seeds(1, 16, 1, 5),
        emulator_seeds(2, 16, 1),
    ]
    assert len({int(seed) for seeds in (emulator_seeds(1, 16), *streams) for seed in seeds}) == 80


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 64), stream=st.lists(st.integers(0, 99), max_size=3))
def test_emulator_seeds_are_valid_and_a_function_of_seed_and_stream(seed: int, count: int, stream: list[int]) -> None:
    seeds = emulator_seeds(seed, count, *stream)
    assert (seeds.shape, seeds.dtype) == ((count,), np.int32)
    assert (seeds >= 0).all()
    np.testing.assert_array_equal(seeds, emulator_seeds(seed, count, *stream))
    np.testing.assert_array_equal(seeds, emulator_seeds(seed, 64, *stream)[:count])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"game": "Brekout"}, r"unknown game 'Brekout'. Did you mean 'Breakout'"),
        ({"num_envs": 0}, r"num_envs must be at least 1, not 0"),
        ({"noop_max": -1}, r"noop_max must be 0 or more, not -1"),
        ({"sticky_actions": 1.0}, r"sticky_actions is a probability in \[0, 1\), not 1.0"),
        ({"sticky_actions": -0.1}, r"sticky_actions is a probability in \[0, 1\), not -0.1"),
        ({"sticky_actions": float("nan")}, r"sticky_actions is a probability in \[0, 1\), not nan"),
        ({"max_frames_per_episode": -1}, r"max_frames_per_episode must be 1 … 2147483647, or None for no cap"),
        ({"max_frames_per_episode": 0}, r"max_frames_per_episode must be 1 … 2147483647, or None for no cap"),
        ({"max_frames_per_episode": NO_CAP + 1}, r"max_frames_per_episode must be 1 … 2147483647, or None for no cap"),
    ],
)
def test_bad_arguments_are_usage_errors_that_name_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_atari(**({"game": "breakout", "num_envs": 1} | arguments))


@pytest.mark.parametrize("actions", [[4], [-1], [0, 0], [[0]]])
def test_an_action_that_the_game_does_not_have_is_refused_instead_of_waiting_for_ever(actions: list[Any]) -> None:
    env = make_atari("breakout", 1)
    env.reset(seed=np.int64(3))
    with pytest.raises(ValueError, match="actions must be 1 integers from 0 to 3"):
        env.step(np.array(actions))
    with pytest.raises(UsageError, match="a seed must be an integer, 0 or more"):
        env.reset(seed=-1)
    env.close()
