"""The examples of the documentation train as they stand, and compute what they say."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agents.dqn import DQN
from evaluate import main as evaluate
from tests.small_runs import stopped_run, tiny
from wn_rl import networks
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.networks.registry import NETWORKS
from wn_rl.replay import Minibatch
from wn_rl.runs import checkpoint
from wn_rl.training.resume import open_for_resume
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


def test_the_network_trains_goes_on_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the page says: with the flag; without it one line names the flag, and nothing is imported from a file."""
    monkeypatch.setattr(NETWORKS, "entries", dict(NETWORKS.entries))
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    networks.load("own_network:Residual")
    config = replace(
        tiny(param="wn", network="own_network:Residual", frames=1200, update_period=1, batch_size=2, hidden_units=32),
        device="cpu",
    )
    stopped_run(tmp_path, config, after=30)
    resumed, saved = open_for_resume(tmp_path, {})
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0
    after = checkpoint.load(tmp_path)
    assert after.config.backend == "eager"
    assert int(after.training["agent"]["updates"]) > 200
    flag, words = ["--network", "own_network:Residual"], ["--episodes", "1", "--max-frames-per-episode", "100"]
    assert evaluate([str(tmp_path), *words, *flag]) == 0
    assert "Breakout" in capsys.readouterr().out
    del NETWORKS.entries["residual"]
    monkeypatch.delitem(sys.modules, "own_network")
    assert evaluate([str(tmp_path), *words]) == 1
    assert "is not imported from a file: add --network own_network:Residual" in capsys.readouterr().err
    assert "own_network" not in sys.modules


def test_the_network_of_the_example_has_the_sizes_of_impala(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out by hand: 84 → 42 → 21 → 11 pixels, 16, 32, 32 channels; a stage has 1 + 2 convolutions of 3 × 3."""
    monkeypatch.setattr(NETWORKS, "entries", dict(NETWORKS.entries))
    example("own_network")
    network = build_q_network(QNetworkSpec(4, network="residual", hidden_units=256), seed=0)
    stages = [(4, 16), (16, 32), (32, 32)]
    torso = sum((9 * inputs + 1) * outputs + 2 * (9 * outputs + 1) * outputs for inputs, outputs in stages)
    dense = (32 * 11 * 11 + 1) * 256 + (256 + 1) * 4
    assert sum(parameter.numel() for parameter in network.parameters()) == torso + dense == 1_048_628
    wide = QNetworkSpec(4, network="residual", network_options={"width": 2}).outline()
    assert wide.get_submodule("stages.6").out_channels == 64


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


@pytest.mark.parametrize(
    ("page", "name"), [("own-agent.md", "own_agent"), ("own-loss.md", "own_loss"), ("own-network.md", "own_network")]
)
def test_a_page_shows_its_example(page: str, name: str) -> None:
    code = (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in (DOCS / page).read_text(encoding="utf-8")
