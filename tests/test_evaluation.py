"""Scores do not favour short episodes, count what the protocol says, and are a function of the seed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wn_rl.atari.env import make_atari
from wn_rl.config import load, resolve
from wn_rl.errors import UsageError
from wn_rl.evaluation.episodes import (
    Episode,
    EpisodeLedger,
    EvaluationInterrupted,
    EvaluationProtocol,
    ValueRecorder,
    environment_options,
    evaluate,
)


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


# --- what Q-values promised --------------------------------------------------------------------------------------


def info(*, reset: tuple[bool, bool] = (False, False), life: tuple[bool, bool] = (False, False)) -> dict[str, Any]:
    return {"is_reset": np.array(reset), "life_loss": np.array(life)}


@pytest.mark.parametrize("life_loss_terminal", [True, False])
def test_overestimation_counts_whole_episodes_with_clipped_rewards(life_loss_terminal: bool) -> None:
    """Slot 0 ends after two steps; slot 1 loses a life at once, and its next episode is truncated."""
    promised = iter([[2.0, 4.0], [3.0, 9.0], [7.0, 9.0]])
    recorder = ValueRecorder(
        lambda _: torch.tensor([[value, -1.0] for value in next(promised)]),
        gamma=0.5,
        reward_clip=1.0,
        life_loss_terminal=life_loss_terminal,
    )
    no = np.array([False, False])
    steps = [
        (np.array([1.0, 50.0]), no, no, info(life=(False, True))),
        (np.array([1.0, 0.0]), np.array([True, False]), np.array([False, True]), info()),
        (np.array([0.0, 0.0]), no, no, info(reset=(True, True))),
    ]
    for step in steps:
        assert recorder(torch.zeros(2)).tolist() == [0, 0]
        recorder.after_step(*step)
    # Slot 0: G = 1 + 0.5 · 1 = 1.5 against 2, then 1 against 3. Slot 1: 1 (clipped) against 4.
    differences = [2 - 1.5, 3 - 1.0] + ([4 - 1.0] if life_loss_terminal else [])
    assert recorder.overestimation() == pytest.approx(sum(differences) / len(differences))


def test_nothing_played_to_an_end_has_no_overestimation() -> None:
    recorder = ValueRecorder(lambda x: x, gamma=0.9, reward_clip=0.0, life_loss_terminal=True)
    assert math.isnan(recorder.overestimation())


def test_recording_values_changes_no_score() -> None:
    config = resolve(replace(load("quick"), game="breakout", param="standard"))
    weights = torch.randn(4 * 84 * 84, 4, generator=torch.Generator().manual_seed(0))

    def q_values(observations: torch.Tensor) -> torch.Tensor:
        return observations.flatten(1).float() @ weights

    recorder = ValueRecorder(q_values, gamma=0.99, reward_clip=1.0, life_loss_terminal=True)
    found = []
    for policy, on_step in ((lambda x: q_values(x).argmax(1), None), (recorder, recorder.after_step)):
        env = make_atari("Breakout", 2, num_threads=1, **environment_options(config))
        protocol = EvaluationProtocol(0.05, 0, 2)
        found.append(evaluate(policy, env, protocol, seed=1, on_step=on_step).episodes)
        env.close()
    assert found[0] == found[1]
    assert math.isfinite(recorder.overestimation())
