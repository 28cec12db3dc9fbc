"""A replay that does not fit is refused before anything is allocated or written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.dqn import DQN
from wn_rl.config import load, resolve
from wn_rl.errors import WnRlError
from wn_rl.machine import check_replay_fits, free_bytes
from wn_rl.replay import Replay
from wn_rl.trainer import train


def test_free_memory_is_a_plausible_number_or_unknown() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**26 < free < 2**50


def test_a_replay_that_does_not_fit_is_refused_with_a_capacity_that_would(tmp_path: Path) -> None:
    if free_bytes(torch.device("cpu")) is None:
        pytest.skip("this system does not tell its free memory")
    config = resolve(replace(load("quick"), game="breakout", replay_capacity=10**9))
    with pytest.raises(WnRlError, match=r"needs 7071\.0 GB.*lower --replay-capacity \(about [\d,]+ would fit\)"):
        train(config, DQN, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_replay_fits(Replay.expected_bytes(1000, 1), 1000, torch.device("cpu"))
