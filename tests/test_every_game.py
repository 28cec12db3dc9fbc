"""Every game that ale-py ships trains and is evaluated; slow, so one that must stay quick stands for all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agents.dqn import DQN
from wn_rl.atari.games import game_names
from wn_rl.config import load, resolve
from wn_rl.evaluation.scoring import score_checkpoint
from wn_rl.training.session import train


def check_it_trains_and_is_evaluated(game: str, directory: Path, *, full_action_set: bool = False) -> None:
    config = replace(
        load("quick"),
        game=game,
        frames=800,
        num_envs=4,
        num_threads=1,
        batch_size=8,
        learning_starts=100,
        target_period=50,
        replay_capacity=1000,
        init_samples=32,
        evaluation_episodes=1,
        evaluation_envs=1,
        max_frames_per_episode=2000,
        log_period=50,
        full_action_set=full_action_set,
    )
    assert train(resolve(config), DQN, directory, quiet=True) == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["agent_steps"] >= 200
    assert summary["updates"] > 20
    score = score_checkpoint(directory, episodes=1, num_threads=1)
    assert len(score.result.episodes) == 1
    assert 0 < score.result.episodes[0].length <= 500


@pytest.mark.slow
@pytest.mark.parametrize("game", game_names())
def test_every_game_trains_and_is_evaluated(game: str, tmp_path: Path) -> None:
    check_it_trains_and_is_evaluated(game, tmp_path / "run")


@pytest.mark.parametrize(("game", "full_action_set"), [("freeway", False), ("ms-pacman", False), ("Pong", True)])
def test_games_with_other_action_sets_train_and_are_evaluated(game: str, full_action_set: bool, tmp_path: Path) -> None:
    check_it_trains_and_is_evaluated(game, tmp_path / "run", full_action_set=full_action_set)
