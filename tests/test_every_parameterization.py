"""Every registered parameterization trains the real DQN on real emulators, is saved, resumes and is evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.dqn import DQN
from wn_rl.atari.env import make_atari
from wn_rl.config import load, resolve
from wn_rl.evaluation.episodes import environment_options
from wn_rl.evaluation.scoring import score_checkpoint
from wn_rl.parameterizations import initialize_from_data, names
from wn_rl.parameterizations.api import treated_layers
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train


class CountingDQN(DQN):
    """A DQN that counts its target copies."""

    copies = 0
    first: dict[str, Tensor]

    def initialize(self, observations: Tensor) -> None:
        super().initialize(observations)
        self.first = {key: value.clone() for key, value in self.q_network.state_dict().items()}

    def copy_target(self) -> None:
        super().copy_target()
        self.copies += 1


@pytest.mark.parametrize(
    ("param", "updates"),
    [
        *((param, 250) for param in names() if param != "wn"),
        *(pytest.param(param, 1000, marks=() if param == "wn" else pytest.mark.slow) for param in names()),
    ],
)
def test_many_updates_with_target_copies_and_a_replay_that_wraps(param: str, updates: int, tmp_path: Path) -> None:
    frames = 16 * updates + 1600
    config = resolve(
        replace(
            load("quick"),
            game="breakout",
            param=param,
            frames=frames,
            num_envs=4,
            num_threads=1,
            hidden_units=16,
            batch_size=4,
            learning_starts=300,
            target_period=updates,
            replay_capacity=2 * updates,
            epsilon_decay_steps=2 * updates,
            init_samples=64,
            evaluation_period=frames // 4,
            evaluation_episodes=1,
            evaluation_envs=1,
            max_frames_per_episode=2000,
            checkpoint_period=frames // 4,
            log_period=frames // 8,
        )
    )
    agents: list[CountingDQN] = []

    def make(*arguments: object) -> CountingDQN:
        agents.append(CountingDQN(*arguments))  # type: ignore[arg-type]
        return agents[-1]

    assert train(config, make, tmp_path / "run", quiet=True) == 0
    (agent,) = agents
    assert agent.updates >= updates
    assert agent.copies >= 2 + 1  # the initialization copies too
    after = agent.q_network.state_dict()
    for name, before in agent.first.items():
        fixed = name.endswith("running_scale")  # spectral normalization's c is no trained tensor
        assert fixed or not torch.equal(before, after[name]), f"{name} did not change"
        assert bool(after[name].isfinite().all()), name

    resumed_config, saved = open_for_resume(tmp_path / "run", {"frames": frames + 1600})
    assert all(torch.equal(saved.weights[key], after[key]) for key in after)
    assert train(resumed_config, make, tmp_path / "run", resume=saved, quiet=True) == 0
    assert agents[-1].updates > agent.updates
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["frames"] >= frames + 1600
    assert np.isfinite(summary["final_evaluation"]["mean"])
    assert score_checkpoint(tmp_path / "run", episodes=1, max_frames_per_episode=400).result.mean >= 0


@pytest.mark.parametrize("param", names())
def test_initialization_on_real_frames_centres_and_scales_every_pre_activation(param: str) -> None:
    config = resolve(replace(load("quick"), game="breakout", param=param, data_dependent_init=True, hidden_units=32))
    env = make_atari("Breakout", 4, num_threads=1, **environment_options(config))
    observations = [env.reset(seed=np.arange(4, dtype=np.int32))[0].copy()]
    generator = np.random.default_rng(0)
    observations += [env.step(generator.integers(env.num_actions, size=4))[0].copy() for _ in range(30)]
    env.close()
    batch = torch.from_numpy(np.concatenate(observations))
    network = DQN(replace(config, precision="float32"), 4, torch.device("cpu")).q_network.double()
    report = initialize_from_data(network, batch)
    treated = treated_layers(network)
    assert report.keys() == treated.keys()
    seen: dict[str, Tensor] = {}
    for name, (layer, entry) in treated.items():
        if not entry.batch_independent:
            layer.normalization.train()  # with the batch's own statistics, which the running ones only estimate

        def keep(module: torch.nn.Module, _: object, output: Tensor, name: str = name) -> None:
            seen[name] = output if isinstance(module, torch.nn.Linear) else output.movedim(1, -1)

        layer.register_forward_hook(keep)
    with torch.no_grad():
        network(batch)
    for name, output in seen.items():
        rows = output.flatten(0, -2)
        alive = report[name].std > 1e-9  # a unit that is constant over the batch is only centred
        assert alive.float().mean() > 0.5
        torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), rtol=0, atol=1e-6, msg=name)
        variance = rows.var(0, correction=0)[alive]
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-6, msg=name)
