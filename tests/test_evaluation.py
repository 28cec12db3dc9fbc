"""Scores do not favour short episodes, count what the protocol says, and are a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wn_rl.atari.env import make_atari
from wn_rl.errors import UsageError
from wn_rl.evaluation import Episode, EpisodeLedger, EvaluationInterrupted, EvaluationProtocol, evaluate


def play(lengths: list[int], num_envs: int, *, steps: int = 0, episodes: int = 0) -> list[int]:
    """Play scripted episodes on ``num_envs`` emulators at a time; return the lengths of those that count."""
    ledger = EpisodeLedger(steps=steps, episodes=episodes)
    index = [ledger.start() for _ in range(num_envs)]
    age = [0] * num_envs
    for _ in range(100_000):
        if (result := ledger.result()) is not None:
            return [episode.length for episode in result]
        for slot in range(num_envs):
            if age[slot] < 0:  # the auto-reset step
                index[slot], age[slot] = ledger.start(), 0
                continue
            age[slot] += 1
            whole = lengths[index[slot] % len(lengths)]
            ledger.record(index[slot], float(age[slot]), age[slot], completed=age[slot] == whole)
            if age[slot] == whole:
                age[slot] = -1
    raise AssertionError("the evaluation does not end")


def one_emulator(lengths: list[int], steps: int) -> list[int]:
    """Return what a single emulator counts: completed episodes within the budget, or the only, unfinished one."""
    counted: list[int] = []
    while sum(counted) + lengths[len(counted) % len(lengths)] <= steps:
        counted.append(lengths[len(counted) % len(lengths)])
    return counted or [steps]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), num_envs=st.integers(1, 9), steps=st.integers(1, 200)
)
def test_a_budget_counts_the_episodes_that_one_emulator_would_complete(
    lengths: list[int], num_envs: int, steps: int
) -> None:
    assert play(lengths, num_envs, steps=steps) == one_emulator(lengths, steps)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), num_envs=st.integers(1, 9), quota=st.integers(1, 20)
)
def test_a_quota_counts_the_first_episodes_to_start(lengths: list[int], num_envs: int, quota: int) -> None:
    expected = [lengths[index % len(lengths)] for index in range(quota)]
    assert play(lengths, num_envs, episodes=quota) == expected


def test_first_to_end_would_favour_short_episodes_and_this_does_not() -> None:
    lengths = [500, 1, 1, 1]
    assert np.mean(play(lengths, 4, episodes=40)) == np.mean(lengths)


def greedy_noop(observations: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(observations), dtype=torch.int64)


def test_scores_are_raw_points_of_whole_games_hand_summed() -> None:
    env = make_atari("space_invaders", 2, max_frames_per_episode=2000)
    result = evaluate(greedy_noop, env, EvaluationProtocol(epsilon=1.0, episodes=2), seed=7)
    rng = np.random.default_rng([7, 1])
    from wn_rl.atari.env import emulator_seeds

    env.reset(seed=emulator_seeds(7, 2, 1))
    scores, lengths, done = np.zeros(2), np.zeros(2, int), np.zeros(2, bool)
    while not done.all():
        rng.random(2)
        _, rewards, terminated, truncated, _ = env.step(rng.integers(env.num_actions, size=2))
        scores += rewards * ~done
        lengths += ~done
        done |= terminated | truncated
    assert [episode.score for episode in result.episodes] == scores.tolist()
    assert [episode.length for episode in result.episodes] == lengths.tolist()
    assert max(scores) > 5  # raw, not clipped: an invader is worth 5 to 30
    assert result.std == pytest.approx(np.std(scores, ddof=1))
    env.close()


def test_the_seed_decides_the_result_and_epsilon_zero_is_greedy() -> None:
    env = make_atari("breakout", 3, max_frames_per_episode=400)
    protocol = EvaluationProtocol(epsilon=0.5, episodes=4)
    first = evaluate(greedy_noop, env, protocol, seed=1).episodes
    assert evaluate(greedy_noop, env, protocol, seed=1).episodes == first
    still = evaluate(greedy_noop, env, EvaluationProtocol(epsilon=0.0, episodes=3), seed=1)
    assert still.episodes == (Episode(0.0, 100),) * 3  # no ball is ever served; the cap is 400 frames
    env.close()


def test_an_episode_longer_than_the_budget_counts_as_it_stands_when_it_is_the_only_one() -> None:
    env = make_atari("breakout", 2)
    result = evaluate(greedy_noop, env, EvaluationProtocol(epsilon=0.0, steps=30), seed=1)
    assert result.episodes == (Episode(0.0, 30, completed=False),)
    env.close()


def test_an_evaluation_can_be_stopped_and_refuses_to_do_nothing() -> None:
    env = make_atari("breakout", 1)
    with pytest.raises(EvaluationInterrupted):
        evaluate(greedy_noop, env, EvaluationProtocol(), seed=0, should_stop=lambda: True)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate(greedy_noop, env, EvaluationProtocol(episodes=0), seed=0)
    env.close()
