"""Marks: slow tests run with --run-slow, gpu tests where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

# The workers share the cores (docs/performance.md, "Several runs at once"). Before torch, which looks at it once.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch

from wn_rl.atari.env import FULL_ACTION_SET, minimal_actions
from wn_rl.config import load, resolve, to_yaml
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.runs import checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small networks gain nothing from more threads, and on busy cores threads wait for each other."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: add --run-slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: torch finds no GPU here"))


@pytest.fixture
def save_checkpoint() -> Callable[..., Path]:
    """Return a function that writes an untrained network as a run's checkpoint; nothing is trained."""

    def save(
        directory: Path, game: str = "Breakout", param: str = "standard", *, frames: int = 4000, **keys: Any
    ) -> Path:
        config = resolve(replace(load("quick"), game=game, param=param, hidden_units=16, **keys))
        actions = FULL_ACTION_SET if config.full_action_set else minimal_actions(config.game)
        assert config.weight_init is not None
        spec = QNetworkSpec(
            actions,
            param,
            hidden_units=16,
            layers=config.param_layers,
            options=config.param_options,
            weight_init=config.weight_init,
        )
        checkpoint.save(
            directory / "checkpoints" / "latest",
            config=asdict(config),
            spec=spec,
            weights=build_q_network(spec, seed=config.seed).state_dict(),
            agent_steps=frames // 4,
            training={},
            versions={},
        )
        (directory / "config.yaml").write_text(to_yaml(config))
        return directory

    return save
