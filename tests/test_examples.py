"""The examples of the documentation train as they stand, and compute what they say."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agents.backends.interface import REGISTRY
from agents.dqn import DQN
from evaluate import main as evaluate
from tests.carried import carried
from tests.small_runs import stopped_run, tiny
from train import main as train_command
from wn_rl import networks
from wn_rl.errors import UsageError
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


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_backend_makes_eagers_updates(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "entries", dict(REGISTRY.entries))
    kind = example("own_backend").InParts
    config = replace(tiny(param="wn", loss_reduction=reduction, optimizer="rmsprop_mnih"), device="cpu")
    made = [carried(replace(config, backend=name)) for name in (kind.name, "eager")]
    for number in range(3):
        for one in made:
            one.update(replace(minibatch(), rewards=torch.full((6,), number / 4), indices=torch.arange(6)))
    ours, theirs = (one.read_statistics() for one in made)
    assert (ours.updates, ours.loss) == (3, pytest.approx(theirs.loss, rel=1e-5))
    assert (ours.td_error, ours.q_value) == pytest.approx((theirs.td_error, theirs.q_value), rel=1e-5)
    for a, b in zip(*(one.q_network.parameters() for one in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    refused = carried(replace(tiny(param="bn", backend="eager"), device="cpu"))
    assert "the whole minibatch" in kind.unsupported(refused.agent, refused.given)


def test_the_backend_trains_and_goes_on_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(REGISTRY, "entries", dict(REGISTRY.entries))
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    run, flag = str(tmp_path / "run"), ["--backend", "own_backend:InParts"]
    words = ["--game", "Breakout", "--preset", "quick", "--learning-starts", "64", "--hidden-units", "16"]
    words += ["--batch-size", "2", "--replay-capacity", "500", "--init-samples", "16", "--evaluation-episodes", "1"]
    words += ["--max-frames-per-episode", "100", "--num-envs", "4", "--device", "cpu"]
    assert train_command([*words, "--frames", "800", "--run-dir", run, *flag]) == 0
    assert "backend in_parts: as asked for" in capsys.readouterr().out
    assert checkpoint.load(Path(run)).config.backend == "in_parts"
    del REGISTRY.entries["in_parts"]
    monkeypatch.delitem(sys.modules, "own_backend")
    with pytest.raises(UsageError, match="give --backend YOUR_MODULE:ITS_CLASS"):
        train_command(["--resume", run, "--frames", "1000"])
    assert train_command(["--resume", run, "--frames", "1000", *flag]) == 0
    assert checkpoint.load(Path(run)).agent_steps >= 250
    for name, said in (("cpu_kernel", "Did you mean 'cpu_kernels'"), ("no_file:Mine", "cannot import 'no_file'")):
        with pytest.raises(UsageError, match=said):
            train_command([*words, "--backend", name, "--run-dir", str(tmp_path / name)])


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
    ("page", "name"),
    [
        ("own-agent.md", "own_agent"),
        ("own-loss.md", "own_loss"),
        ("own-network.md", "own_network"),
        ("own-backend.md", "own_backend"),
    ],
)
def test_a_page_shows_its_example(page: str, name: str) -> None:
    code = (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in (DOCS / page).read_text(encoding="utf-8")
