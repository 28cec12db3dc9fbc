"""Which backend carries an agent out, and that whatever a subclass overrides is called or refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.backends import FORMER, make_backend
from agents.backends.cpu_kernels.backend import LOSS, REPLACED, CpuKernels
from agents.dqn import DQN
from tests.carried import Given, carried
from tests.small_runs import tiny
from tests.vectors import needs_passes
from wn_rl.config import load, resolve
from wn_rl.errors import UsageError
from wn_rl.replay import Minibatch
from wn_rl.runs import checkpoint
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train

CPU = torch.device("cpu")


def small(**changes: Any) -> Any:
    return replace(tiny(param="wn", hidden_units=32, **changes), device="cpu", compile="on")


def minibatch(seed: int, size: int = 4) -> Minibatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2 * size, 4, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(0, 4, (size,), generator=generator)
    rewards = torch.randint(-1, 2, (size,), generator=generator).float()
    return Minibatch(x[:size], actions, rewards, x[size:], torch.rand(size, generator=generator) < 0.3)


def counting(name: str, calls: list[str]) -> type[DQN]:
    """Return a subclass whose method ``name`` does what DQN's does, and counts its calls."""

    def own(self: DQN, *arguments: Any) -> Any:
        calls.append(name)
        return getattr(DQN, name)(self, *arguments)

    return type("Own", (DQN,), {name: own})


@pytest.mark.parametrize("name", ["td_loss", "loss", "forward", "td_loss_of"])
def test_a_loss_of_a_subclass_is_called_at_every_update_of_a_run(name: str, tmp_path: Path) -> None:
    """In a real run of the preset that trains with kernels; the run says which backend it took."""
    calls: list[str] = []
    config = replace(tiny(param="wn", frames=800, compile="on"), device="cpu")
    assert train(config, counting(name, calls), tmp_path, quiet=True) == 0
    updates = int(checkpoint.load(tmp_path).training["agent"]["updates"])
    assert updates > 10
    assert len(calls) == updates
    expected = "cpu_kernels" if name in LOSS else "eager"
    assert checkpoint.load(tmp_path).config.backend == expected or CpuKernels.unsupported(
        DQN(config, 4, CPU),
        Given(),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", REPLACED)
def test_what_the_kernels_would_not_call_is_computed_by_eager_and_said(name: str) -> None:
    made = carried(small(), kind=counting(name, []))
    assert made.backend.name == "eager"
    assert f"Own overrides {name}" in made.backend.reason
    agent = DQN(small(), 4, CPU)
    setattr(agent, name, getattr(agent, name))  # on the instance alone
    backend = make_backend(agent, Given())  # type: ignore[arg-type]
    assert backend.name == "eager"
    agent.config = replace(agent.config, backend="cpu_kernels")
    with pytest.raises(UsageError, match=f"--backend cpu_kernels: DQN overrides {name}"):
        make_backend(agent, Given())  # type: ignore[arg-type]


class Squared(DQN):
    """Learns by the squared TD error instead of Huber's."""

    def td_loss_of(self, batch: Minibatch, q_values: Tensor, next_q_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, td_error, q_value = super().td_loss_of(batch, q_values, next_q_values)
        return 0.5 * td_error.square(), td_error, q_value


@pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=needs_passes(name)) for name in ("float32", "bfloat16")]
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", [DQN, Squared])
def test_kernels_around_a_loss_by_torch_make_eagers_update(kind: type[DQN], reduction: str, precision: str) -> None:
    config = resolve(replace(load("paper"), game="breakout", param="wn", hidden_units=64, loss_reduction=reduction))
    config = replace(config, device="cpu", precision=precision, compile="on", reward_clip=0.0)
    kernels = carried(config, kind=type("Own", (kind,), {"td_loss_of": lambda *a: kind.td_loss_of(*a)}))
    eager = carried(replace(config, backend="eager", compile="off", precision="float32"), kind=kind)
    assert kernels.backend.name == "cpu_kernels"
    assert kernels.backend.detail.startswith("loss by torch")
    kernels.initialize(minibatch(9, 16).observations)
    for seed in range(3):
        eager.load_state_dict(copy.deepcopy(kernels.q_network.state_dict()), copy.deepcopy(kernels.state_dict()))
        for made in (kernels, eager):
            made.update(minibatch(seed))
            made.backend.write_gradients()
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in made.q_network.parameters() if p.grad is not None])
            for made in (kernels, eager)
        )
        if precision == "float32":
            assert float((ours - theirs).norm() / theirs.norm()) < 2e-5
        else:
            assert float(nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.98
    found, expected = kernels.read_statistics(), eager.read_statistics()
    assert found.updates == 3
    assert expected.updates == 1 + found.updates - 1
    assert found.loss == pytest.approx(expected.loss, rel=0.2)


@pytest.mark.parametrize("name", FORMER)
def test_a_method_of_an_earlier_version_is_refused_instead_of_ignored(name: str) -> None:
    with pytest.raises(UsageError, match=f"Own overrides {name}, which is no longer called: override {FORMER[name]}"):
        carried(small(), kind=type("Own", (DQN,), {name: lambda self, *_: None}))


def test_another_network_or_optimizer_takes_eager() -> None:
    agent = DQN(small(), 4, CPU)
    agent.optimizer = torch.optim.SGD(agent.q_network.parameters(), 0.1)
    assert "the optimizer is a SGD" in make_backend(agent, Given()).reason  # type: ignore[arg-type]
    agent = DQN(small(), 4, CPU)
    agent.optimizer = torch.optim.Adam(agent.q_network.parameters(), 0.1)
    assert "an optimizer of its own" in make_backend(agent, Given()).reason  # type: ignore[arg-type]
    agent = DQN(small(), 4, CPU)
    agent.optimizer.param_groups[0]["weight_decay"] = 0.1
    assert "changed weight_decay of its optimizer" in make_backend(agent, Given()).reason  # type: ignore[arg-type]
    agent = DQN(small(), 4, CPU)
    agent.q_network = nn.Sequential(nn.Flatten(), nn.Linear(4 * 84 * 84, 4))  # type: ignore[assignment]
    assert "the network is a Sequential" in make_backend(agent, Given()).reason  # type: ignore[arg-type]


def test_a_backend_that_is_asked_for_is_taken_or_refused() -> None:
    for name in ("eager", "cpu_kernels"):
        made = carried(replace(small(), compile="off", backend=name))
        assert made.backend.name == name
        assert made.backend.reason == "as asked for"
    with pytest.raises(UsageError, match="--backend cuda_graphs: the network is on cpu, not on a CUDA GPU"):
        carried(small(backend="cuda_graphs"))


def test_the_backend_of_a_run_is_in_its_config_and_goes_on(tmp_path: Path) -> None:
    config = replace(tiny(param="wn", frames=800), device="cpu", backend="cpu_kernels")
    assert train(config, DQN, tmp_path, quiet=True) == 0
    assert "\nbackend: cpu_kernels\n" in (tmp_path / "config.yaml").read_text()
    resumed, saved = open_for_resume(tmp_path, {"frames": 1000})
    assert resumed.backend == "cpu_kernels"
    # Where it is not there any more, the run goes on with another and says so; asked for by name it is refused.
    without = type("Own", (DQN,), {"update": lambda self, batch: DQN.update(self, batch)})
    assert train(resumed, without, tmp_path, resume=saved, quiet=True) == 0
    assert checkpoint.load(tmp_path).config.backend == "eager"
    resumed, saved = open_for_resume(tmp_path, {"frames": 1200, "backend": "cpu_kernels"})
    with pytest.raises(UsageError, match="Own overrides update"):
        train(resumed, without, tmp_path, resume=saved, quiet=True)
