"""The examples of the documentation train as they stand, and compute what they say."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agents.dqn import DQN
from tests.small_runs import tiny
from wn_rl.replay import Minibatch
from wn_rl.runs import checkpoint
from wn_rl.training.session import train

DOCS = Path(__file__).parents[1] / "docs"
CPU = torch.device("cpu")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minibatch() -> Minibatch:
    x = torch.randint(0, 256, (12, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rewards, terminals = torch.tensor([3.0, 0, -1, 1, 0, 2]), torch.tensor([False, True, False, False, False, True])
    return Minibatch(x[:6], torch.tensor([0, 1, 2, 3, 0, 1]), rewards, x[6:], terminals)


@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [("own_agent", "DoubleDQN", ("eager",)), ("own_loss", "SquaredLossDQN", ("cpu_kernels", "eager"))],
)
def test_an_example_trains(name: str, kind: str, backend: tuple[str, ...], tmp_path: Path) -> None:
    agent = getattr(example(name), kind)
    config = replace(tiny(param="wn", frames=800, hidden_units=32, compile="on"), device="cpu")
    assert train(config, agent, tmp_path, quiet=True) == 0
    saved = checkpoint.load(tmp_path)
    assert saved.config.backend in backend
    assert int(saved.training["agent"]["updates"]) > 10


def test_double_dqn_bootstraps_from_the_action_that_the_online_network_chooses() -> None:
    agent: DQN = example("own_agent").DoubleDQN(replace(tiny(param="standard"), device="cpu"), 4, CPU)
    with torch.no_grad():
        agent.target_network.output.bias.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    batch = minibatch()
    _, td_error, q_value = agent.td_loss(batch)
    with torch.no_grad():
        online, target = agent.q_network(batch.next_observations), agent.target_network(batch.next_observations)
    for i in range(6):
        bootstrap = 0.0 if batch.terminals[i] else 0.99 * float(target[i, int(online[i].argmax())])
        reward = max(-1.0, min(1.0, float(batch.rewards[i])))
        assert float((td_error + q_value)[i].detach()) == pytest.approx(reward + bootstrap, abs=1e-5)


@pytest.mark.parametrize(("page", "name"), [("own-agent.md", "own_agent"), ("own-loss.md", "own_loss")])
def test_a_page_shows_its_example(page: str, name: str) -> None:
    code = (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in (DOCS / page).read_text(encoding="utf-8")
