"""The vector environment equals Gymnasium's preprocessing with a frame cap and with the full action set too."""

from __future__ import annotations

from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from wn_rl import make_atari
from wn_rl.atari.games import find_game

gym.register_envs(ale_py)


def gymnasium_env(game: str, padding: str, **options: Any) -> gym.Env[Any, Any]:
    emulator = gym.make(find_game(game).gymnasium_id, frameskip=1, repeat_action_probability=0.0, **options)
    return FrameStackObservation(AtariPreprocessing(emulator, noop_max=0, frame_skip=4), 4, padding_type=padding)


@pytest.mark.parametrize(
    ("game", "options", "steps"),
    [
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
    assert not cap or ends == 2 * (steps // 51)
    env.close()
