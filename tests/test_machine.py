"""A run that does not fit is refused before anything is allocated or written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.dqn import DQN
from wn_rl.config import load, resolve
from wn_rl.errors import WnRlError
from wn_rl.machine import check_memory, free_bytes, plan_memory
from wn_rl.networks import QNetworkSpec
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


def test_the_plan_counts_what_a_run_allocates() -> None:
    config = replace(resolve(replace(load("quick"), game="breakout", param="wn")), device="cpu", precision="float32")
    agent = DQN(config, 4, torch.device("cpu"))
    parameters = QNetworkSpec(4).count_parameters()
    # w of each layer becomes v of the same size and one g per unit.
    units = 32 + 64 + 64 + 512 + 4
    assert sum(parameter.numel() for parameter in agent.q_network.parameters()) == parameters + units
    replay_bytes = Replay.expected_bytes(config.replay_capacity, config.num_envs)
    plan = plan_memory(config, replay_bytes, parameters)
    assert plan.on_device["replay_capacity"] == replay_bytes
    assert plan.on_device["hidden_units"] > 4 * sum(p.numel() for p in agent.q_network.parameters()) * 4
    assert plan.working_bytes == sum(plan.on_device.values()) + sum(plan.on_host.values()) - replay_bytes
    if free_bytes(torch.device("cpu")) is not None:
        check_memory(replace(config, replay_capacity=1000), plan_memory(config, 7_056_000, 1000), torch.device("cpu"))
