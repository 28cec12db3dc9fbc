"""The same network under our evaluation and under Stable-Baselines3's: the same score but for chance."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from agents.dqn import DQN
from wn_rl.config import load, resolve
from wn_rl.training.session import train

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "against_sb3.py"


@pytest.mark.slow
def test_the_difference_from_evaluate_policy_is_chance(tmp_path: Path) -> None:
    """Trained for a moment only; the figures of a network that plays are in docs/evaluation.md."""
    config = replace(
        load("quick"), game="Pong", param="wn", frames=60_000, learning_starts=2000, evaluation_period=10**6,
        evaluation_episodes=1, epsilon_decay_steps=10_000, num_threads=1, replay_capacity=30_000,
    )  # fmt: skip
    assert train(resolve(config), DQN, tmp_path / "run", quiet=True) == 0
    spec = importlib.util.spec_from_file_location("against_sb3", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    against_sb3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(against_sb3)
    found = against_sb3.compare(tmp_path / "run", 10)
    assert found.relative_half_width < 0.1
    # Twice the 95% interval, which chance alone leaves once in 10,000 times; at −21 points in every game it is empty.
    assert abs(found.value) <= 2 * found.half_width
