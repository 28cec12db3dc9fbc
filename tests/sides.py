"""Three ways to the same updates, side by side, for tests on the CPU and on a GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.backends.cuda_graphs import CudaGraphs
from agents.backends.cuda_graphs.recording import Recorder
from agents.backends.eager import Eager
from agents.backends.interface import Backend
from agents.dqn import DQN
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.replay import Replay
from wn_rl.replay.host import HostReplay

CPU = torch.device("cpu")
ACTIONS = 4
N = 3


def configured(**changes: Any) -> TrainConfig:
    values = {
        "game": "breakout",
        "hidden_units": 16,
        "batch_size": 8,
        "num_envs": N,
        "init_samples": 16,
        "num_threads": 1,
        "precision": "float32",
        "compile": "off",
    }
    return replace(resolve(replace(load("paper"), **(values | changes))), device="cpu")


class Sides:
    """Three ways on the same frames with the same seeds: plain, static as it is, and static with a recorder.

    With ``compile="on"`` that holds for the last of them.
    """

    def __init__(self, recorder: Recorder, device: torch.device = CPU, *, host: bool = False, **changes: Any) -> None:
        self.config = configured(**changes)
        plain = replace(self.config, compile="off")
        configs = (plain, plain, self.config)
        self.agents = [DQN(config, ACTIONS, device) for config in configs]
        self.plain, self.as_it_is, self.recorded = self.agents

        def replay(staged: bool) -> Replay:
            if host:
                return HostReplay(60, N, device=device, seed=5)
            return Replay(60, N, device=device, seed=5, staged=staged)

        self.replays = [replay(False), replay(True), replay(True)]
        self.graphs = CudaGraphs(self.recorded, self.replays[2], recorder=recorder)
        self.backends: list[Backend] = [
            Eager(self.plain, self.replays[0]),
            CudaGraphs(self.as_it_is, self.replays[1], recorder=None),
            self.graphs,
        ]
        self.rng = np.random.default_rng(0)
        first = self.frames()
        for replay in self.replays:
            replay.start(first)
        for _ in range(10):
            self.store()
        generator = torch.Generator(self.replays[0].generator.device).manual_seed(1)
        x = self.replays[0].sample(16, generator).observations
        for agent in self.agents:
            agent.initialize(x)

    def frames(self) -> Any:
        return self.rng.integers(0, 256, (N, 84, 84), np.uint8)

    def store(self) -> None:
        row = (
            self.rng.integers(0, ACTIONS, N),
            self.rng.normal(size=N),
            self.rng.random(N) < 0.2,
            self.frames(),
            self.rng.random(N) < 0.2,
        )
        for replay in self.replays:
            replay.add(*row)

    def act(self, epsilon: float) -> list[list[int]]:
        """Actions of all three, the first emulator's greedy unless all are random."""
        values = np.array([1.0 if epsilon == 1.0 else 0.0, epsilon, epsilon], np.float32)
        return [backend.act(values).tolist() for backend in self.backends]

    def update(self) -> None:
        for backend in self.backends:
            backend.update()

    def copy_target(self) -> None:
        for agent in self.agents:
            agent.copy_target()

    def go_on_from_plain(self) -> None:
        """Give the static agents the plain one's state; rounding would else grow from update to update."""
        weights = copy.deepcopy(self.plain.q_network.state_dict())
        for agent in self.agents[1:]:
            agent.load_state_dict(weights, copy.deepcopy(self.plain.state_dict()))

    def assert_recorded_is_as_it_is(self) -> None:
        """To the last bit, and every generator is where the plain side's is."""
        for name, expected in self.as_it_is.q_network.state_dict().items():
            assert torch.equal(self.recorded.q_network.state_dict()[name], expected), name
        for name, expected in self.as_it_is.target_network.state_dict().items():
            assert torch.equal(self.recorded.target_network.state_dict()[name], expected), name
        self.assert_same_draws()

    def assert_same_draws(self) -> None:
        """Every generator is where the plain side's is, and as many updates were made."""
        assert self.as_it_is.updates == self.recorded.updates == self.plain.updates
        for generators in zip(
            [replay.generator.get_state() for replay in self.replays],
            [agent.generator.get_state() for agent in self.agents],
            strict=True,
        ):
            assert torch.equal(generators[0], self.replays[0].generator.get_state())
            assert torch.equal(generators[1], self.plain.generator.get_state())

    def assert_as_plain(self, before: dict[str, Tensor], tolerance: float) -> None:
        """After one update from ``before``: the weights, to a fraction of how far the update moved them."""
        for name, expected in self.plain.q_network.state_dict().items():
            found = self.as_it_is.q_network.state_dict()[name]
            moved = float((expected - before[name]).norm())
            assert float((found - expected).norm()) <= tolerance * moved + 1e-6, name
