"""Each backend beside ``eager``: same agent, same replay, same seed, so the same minibatches; then the same weights.

Whatever stands in ``BACKENDS`` is compared, for every parameterization, precision and kind of loss that it supports on
a device of this machine; what it does not support is skipped with its own reason. ``cuda_graphs`` is compared on a CPU
too, with a recorder in place of the GPU's, in ``tests/agents/test_graphs.py``.

How close is close: float32 differs by rounding alone, so gradients agree to 2e-5 of their norm, weights to 2e-3 of how
far they moved, and statistics to 1e-4. By chance a sum may be zero but for rounding, though, and its unit be at rest on
one side alone: so at least one of three rounds must be that close, and the gradients of the others must point the same
way (cosine above 0.99). In bfloat16 two orders of the same sums round differently at every update: cosines are above
0.93 each and 0.98 on average, and statistics agree to 2%.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.backends import BACKENDS
from agents.backends.cpu_kernels import loader
from agents.backends.cpu_kernels.backend import CpuKernels
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.structs import TileStage
from agents.backends.eager import Eager
from agents.backends.interface import Backend
from agents.dqn import DQN
from agents.optimizers import make_optimizer
from agents.target_network import TargetNetwork
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import names
from wn_rl.replay import Minibatch, Replay

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
ROUNDS = 3
"""In each both sides start from one state, make one update, copy the target, and make two more in one call."""


class Squared(DQN):
    """Learns by the squared TD error, which no kernel knows: torch computes the loss."""

    def td_loss_of(self, batch: Minibatch, q_values: Tensor, next_q_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, td_error, q_value = super().td_loss_of(batch, q_values, next_q_values)
        return 0.5 * td_error.square(), td_error, q_value


def configured(**changes: Any) -> TrainConfig:
    values = {"game": "breakout", "hidden_units": 32, "batch_size": 8, "num_threads": 1, "compile": "off"}
    return replace(resolve(replace(load("paper"), **(values | changes))), device="cpu")


def replay_of_noise(device: torch.device, height: int = 84, width: int = 84) -> Replay:
    """60 vector steps of 2 emulators in a ring of 50, with episode ends, resets and lost lives."""
    generator = np.random.default_rng(0)

    def frames() -> Any:
        return generator.integers(0, 256, (2, height, width), np.uint8)

    replay = Replay(100, 2, device=device, seed=3, frame_shape=(height, width))
    replay.start(frames())
    for step in range(60):
        rewards, terminals = generator.integers(-3, 4, 2) / 2, generator.random(2) < 0.2
        replay.add(generator.integers(0, 4, 2), rewards, terminals, frames(), np.full(2, step % 9 == 8))
    return replay


def compare(backend: Backend, eager: Backend, precision: str) -> None:
    """Make the same updates with both: same draws, gradients, weights, statistics and Q-values."""
    eager.initialize(eager.replay.sample(32).observations)
    eager.update()  # the first step of Adamax is the sign of a gradient, also of one that is nearly zero
    eager.read_statistics()
    backend.replay.generator.set_state(eager.replay.generator.get_state())
    exact = in_float32(eager) if precision == "bfloat16" else None
    cosines: list[float] = []
    angles: list[tuple[float, float]] = []
    differences: list[str] = []
    for _ in range(ROUNDS):
        for other in (backend, exact):
            if other is not None:
                go_on_from(eager, other)
        told = ""
        for count in (1, 2):
            before = copy.deepcopy(eager.q_network.state_dict())
            if exact is not None:
                exact.replay.generator.set_state(eager.replay.generator.get_state())
            for made in (backend, eager) if exact is None else (backend, eager, exact):
                made.update(count)
                made.write_gradients()
            assert torch.equal(backend.replay.generator.get_state(), eager.replay.generator.get_state())
            assert backend.updates == eager.updates
            cosines.append(float(nn.functional.cosine_similarity(gradient(backend), gradient(eager), dim=0)))
            if exact is not None:
                angles.append((angle(backend, exact), angle(eager, exact)))
            told = more_than_rounding(backend, eager, before, count) or told
            if count == 1:
                backend.copy_target()
                eager.copy_target()
                if exact is not None:
                    exact.copy_target()
        differences += [told] if told else []
    if exact is None:
        assert len(differences) < ROUNDS, differences
        assert min(cosines) > 0.99, cosines
    else:  # two gradients in bfloat16 differ by the rounding of both; each is compared with that in float32
        assert all(ours < theirs + 0.1 for ours, theirs in angles), angles
        assert np.mean([ours for ours, _ in angles]) < np.mean([theirs for _, theirs in angles]) + 0.03, angles
        assert np.mean(cosines) > 0.98, cosines
    go_on_from(eager, backend)
    x = eager.replay.sample(5).observations
    if exact is None:
        torch.testing.assert_close(backend.q_values(x), eager.q_values(x), rtol=1e-4, atol=1e-5)
    else:
        go_on_from(eager, exact)
        off, theirs_off = ((made.q_values(x) - exact.q_values(x)).abs().max() for made in (backend, eager))
        assert off < theirs_off + 1e-2


def in_float32(eager: Backend) -> Eager:
    """Return eager in float32 with the same configuration otherwise, on a replay of its own with the same content."""
    assert isinstance(eager.agent, DQN)
    agent, spec = eager.agent, eager.agent.q_network.spec
    exact = type(agent)(replace(agent.config, precision="float32"), spec.num_actions, agent.device)
    return Eager(exact, copy.deepcopy(eager.replay))


def angle(backend: Backend, exact: Backend) -> float:
    """The angle between two gradients, in radians."""
    cosine = nn.functional.cosine_similarity(gradient(backend), gradient(exact), dim=0)
    return float(cosine.clamp(-1, 1).arccos())


def go_on_from(eager: Backend, backend: Backend) -> None:
    """Give the backend eager's state."""
    backend.load_state_dict(copy.deepcopy(eager.q_network.state_dict()), copy.deepcopy(eager.state_dict()))


def more_than_rounding(backend: Backend, eager: Backend, before: dict[str, Tensor], count: int) -> str:
    """Return what differs by more than float32 rounds after ``count`` updates; fails on statistics that are wrong."""
    found, expected = backend.read_statistics(), eager.read_statistics()
    assert found.updates == expected.updates == count
    told = ""
    for name in ("loss", "td_error", "q_value"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours == pytest.approx(theirs, rel=2e-2, abs=1e-2), name
        if ours != pytest.approx(theirs, rel=1e-4, abs=1e-6):
            told = f"{name} {ours}, not {theirs}"
    error = float((gradient(backend) - gradient(eager)).norm() / gradient(eager).norm())
    if error > 2e-5:
        told = f"gradient off by {error:.1e}"
    for name, weight in eager.q_network.state_dict().items():
        moved = float((weight - before[name]).double().norm())
        off = float((backend.q_network.state_dict()[name] - weight).double().norm())
        if off > 2e-3 * moved + 1e-7:
            told = f"{name} off by {off:.1e} of {moved:.1e}"
    return told


def gradient(backend: Backend) -> Tensor:
    """The whole gradient of the last update, in the order of the parameters."""
    return torch.cat([p.grad.flatten().double() for p in backend.q_network.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", [DQN, Squared], ids=["loss of DQN", "loss by torch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("param", names())
@pytest.mark.parametrize("backend", [kind for kind in BACKENDS if kind is not Eager], ids=lambda kind: kind.name)
def test_a_backend_makes_eagers_updates(backend: type[Backend], param: str, precision: str, kind: type[DQN]) -> None:
    config = configured(param=param, precision=precision)
    problems = []
    for device in DEVICES:
        agent = kind(config, 4, device)
        if problem := backend.unsupported(agent, Replay(100, 2, device=device)):
            problems.append(problem)
            continue
        eager = Eager(kind(config, 4, device), replay_of_noise(device))
        compare(backend(agent, replay_of_noise(device)), eager, precision)
        return
    pytest.skip(f"{backend.name}: {'; '.join(problems)}")


def kernels_of(config: TrainConfig, vectors: str) -> CpuKernels:
    """The backend on one of the builds of the kernels."""
    library = loader.load(vectors=vectors)
    if isinstance(library, str) or not loader.supports(library, torch.bfloat16):
        pytest.skip("no kernels in bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "load", lambda: library)
        agent, replay = DQN(config, 4, CPU), replay_of_noise(CPU)
        assert not CpuKernels.unsupported(agent, replay)
        return CpuKernels(agent, replay)


@pytest.mark.parametrize("param", names())
def test_the_tile_units_stand_in_makes_the_updates_of_the_kernels_over_vectors(param: str) -> None:
    config = configured(param=param, precision="bfloat16")
    tiles, vectors = kernels_of(config, "tiles"), kernels_of(config, "no_tiles")
    assert isinstance(tiles.network, KernelNetwork)
    assert isinstance(vectors.network, KernelNetwork)
    assert tiles.network.shape.tiles == sum(TileStage)
    assert vectors.network.shape.tiles == 0
    assert tiles.detail.endswith("products by the tile unit")
    compare(tiles, vectors, "bfloat16")


@pytest.mark.parametrize("param", ["standard", "wn", "sn", "ln"])
def test_the_tile_units_stand_in_makes_eagers_updates(param: str) -> None:
    config = configured(param=param, precision="bfloat16")
    compare(kernels_of(config, "tiles"), Eager(DQN(config, 4, CPU), replay_of_noise(CPU)), "bfloat16")


class OnFramesOf(DQN):
    """A DQN whose observations are not square; :attr:`shape` is theirs."""

    shape: tuple[int, int, int]

    def __init__(self, config: TrainConfig, num_actions: int, device: torch.device) -> None:
        super().__init__(config, num_actions, device)
        spec = QNetworkSpec(
            num_actions, config.param, observation_shape=self.shape, hidden_units=config.hidden_units, weight_init="he"
        )
        self.q_network, target = (build_q_network(spec, seed=0).eval() for _ in range(2))
        self.target = TargetNetwork(target, folds=True, precision=self.precision)
        self.optimizer = make_optimizer(config, self.q_network.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden_units", [20, 32])
@pytest.mark.parametrize(
    ("param", "size"), [("wn", (44, 84)), ("standard", (84, 60))], ids=["wn wide", "standard tall"]
)
def test_cpu_kernels_make_eagers_updates_on_frames_that_are_not_square(
    param: str, size: tuple[int, int], hidden_units: int, precision: str
) -> None:
    """By its kernels, and with 20 hidden units by torch's products, as always where the vectors are not of 512 bits."""
    kind = type("OnFrames", (OnFramesOf,), {"shape": (4, *size)})
    config = configured(param=param, precision=precision, hidden_units=hidden_units)
    agent, replay = kind(config, 4, CPU), replay_of_noise(CPU, *size)
    if problem := CpuKernels.unsupported(agent, replay):
        pytest.skip(problem)
    library = loader.load()
    assert not isinstance(library, str)
    backend = CpuKernels(agent, replay)
    by_kernels = hidden_units % 16 == 0 and loader.supports(library, agent.precision)
    assert isinstance(backend.network, KernelNetwork) == by_kernels
    compare(backend, Eager(kind(config, 4, CPU), replay_of_noise(CPU, *size)), precision)
