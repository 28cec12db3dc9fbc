"""The quick paths of an update give what the plain one gives: eager float32 through autograd, same minibatches."""

from __future__ import annotations

import copy
import resource
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.backends.cpu_kernels import layouts, loader
from agents.backends.cpu_kernels.backend import CpuKernels
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.optimizers import PLAIN, FusedOptimizer
from agents.backends.cpu_kernels.packed_network import PackedNetwork, unsupported
from agents.dqn import DQN
from tests.carried import Carried, carried
from wn_rl.atari.env import make_atari
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.networks import FirstConvolution, QNetworkSpec, build_q_network
from wn_rl.parameterizations import WeightParameterization, names, registry, reparameterize
from wn_rl.parameterizations.base import Units
from wn_rl.parameterizations.layer_norm import LayerNormalization
from wn_rl.replay import Minibatch, Replay
from wn_rl.training import TrainingLoop

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(loader.compiler() is None, reason="needs a C compiler")


def configured(**changes: object) -> TrainConfig:
    """The paper's preset on the CPU; a hidden layer of 64 units unless said otherwise."""
    values: dict[str, object] = {"game": "breakout", "hidden_units": 64, "num_threads": 1, "learning_starts": 64}
    config = resolve(replace(load("paper"), **(values | changes)))
    return replace(config, device="cpu")


def frames(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def minibatch(size: int = 8, seed: int = 0) -> Minibatch:
    generator = torch.Generator().manual_seed(seed)
    x = frames(2 * size, seed)
    return Minibatch(
        x[:size],
        torch.randint(0, 4, (size,), generator=generator),
        torch.randint(-2, 3, (size,), generator=generator).float(),
        x[size:],
        torch.rand(size, generator=generator) < 0.2,
    )


def agent(param: str, precision: str = "float32", compile: str = "on", **changes: object) -> Carried:  # noqa: A002
    made = carried(configured(param=param, precision=precision, compile=compile, **changes))
    made.initialize(frames(64, 99))
    return made


def played(config: TrainConfig, vector_steps: int) -> tuple[Carried, Replay]:
    env = make_atari("breakout", config.num_envs, num_threads=config.emulator_threads)
    replay = Replay(config.replay_capacity, config.num_envs, seed=config.seed)
    made = carried(config, env.num_actions, replay=replay)
    loop = TrainingLoop(config, env, made.backend, replay)
    loop.start()
    for _ in range(vector_steps):
        loop.vector_step()
    env.close()
    return made, replay


def gradient(dqn: Carried) -> Tensor:
    """The whole gradient of the last update, in the order of the parameters."""
    dqn.write_gradients()
    return torch.cat([p.grad.flatten().double() for p in dqn.q_network.parameters() if p.grad is not None])


def each_gradient(first: Carried, second: Carried) -> list[tuple[Tensor, Tensor]]:
    """The gradients of the last update by each parameter, flat, of both, after :func:`gradient` of both."""
    pairs = zip(first.q_network.parameters(), second.q_network.parameters(), strict=True)
    return [tuple(p.grad.flatten().double() for p in pair if p.grad is not None) for pair in pairs]  # type: ignore[misc]


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(first, second, dim=0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- frames as blocks of pixels ----------------------------------------------------------------------------------


def test_blocks_written_out() -> None:
    """Two 4 × 4 frames in blocks of 2 × 2: a block's pixels, row by row, first those of the older frame."""
    layer = FirstConvolution(2, 3, 4, 2)
    x = torch.arange(32, dtype=torch.uint8).view(1, 2, 4, 4)
    packed = layer.packed(x)
    assert packed.shape == (1, 8, 2, 2)
    assert packed[0, :, 0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert packed[0, :, 1, 0].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]
    assert packed[0, :, 0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


@pytest.mark.parametrize(("size", "stride"), [(8, 4), (4, 2), (2, 1), (3, 3), (8, 8)])
def test_a_convolution_on_blocks_is_the_convolution_on_pixels(size: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = FirstConvolution(3, 5, size, stride).double()
    x = torch.randint(0, 256, (2, 3, 24, 48), dtype=torch.uint8)
    assert layer.packs(x) == (stride in (2, 4, 8)), "three bytes are no machine word, one is no block"
    if layer.packs(x):
        expected = nn.functional.conv2d(x.double() / 255, layer.weight, layer.bias, stride)
        torch.testing.assert_close(layer(layer.packed(x).double()), expected, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_blocks_is_not_packed() -> None:
    x = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    assert FirstConvolution(4, 2, 8, 4).packs(x)
    assert not FirstConvolution(4, 2, 6, 4).packs(x), "a kernel of one block and a half"
    assert not FirstConvolution(4, 2, 8, 4).packs(x[..., 1:, :]), "83 rows"
    assert not FirstConvolution(4, 2, 8, 4).packs(x.transpose(2, 3))
    assert not FirstConvolution(4, 2, 8, 4).packs(x.float())


@needs_compiler
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convolution", [(5, 8, 4), (5, 4, 2), (5, 8, 8)])
def test_compiled_packing_is_the_written_one(precision: torch.dtype, convolution: tuple[int, int, int]) -> None:
    spec = QNetworkSpec(2, observation_shape=(3, 24, 40), convolutions=(convolution,), hidden_units=2)
    network = build_q_network(spec, seed=0)
    library = loader.load()
    assert not isinstance(library, str)
    fused = PackedNetwork(network, library, precision=precision)
    wider = torch.randint(0, 256, (2, 4, 24, 40), dtype=torch.uint8)
    for x in (wider[:, :3], wider[:, 1:], wider[:, :3].transpose(2, 3).contiguous().transpose(2, 3)):
        packed = fused.pack_observations(x)
        assert packed.dtype == precision
        assert torch.equal(packed, network.convolutions[0].packed(x.contiguous()).to(precision))


# --- updates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Centred(WeightParameterization):
    """w = v - mean(v) of each unit: what a user may have written. In training the mean counts a little more."""

    has_training_mode = True
    preserves_output = False

    def computes(self, units: Units, weight: Tensor) -> nn.Module:
        return MinusMean()


class MinusMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.ones(()))

    def forward(self, v: Tensor) -> Tensor:
        share = self.share * (1.1 if self.training else 1.0)
        return v - share * v.flatten(1).mean(1).view(-1, *[1] * (v.dim() - 1))

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.clone()


@pytest.fixture(autouse=True)
def _centred_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dict(registry.PARAMETERIZATIONS.entries)
    monkeypatch.setattr(registry.PARAMETERIZATIONS, "entries", entries)  # others list all that is registered
    registry.register("centred")(Centred)


HIDDEN = ("hidden", "convolutions.1")
WAYS: list[tuple[str, dict[str, object]]] = [
    ("standard", {}),
    ("standard", {"loss_reduction": "mean"}),
    ("wn", {}),
    ("wn", {"loss_reduction": "mean"}),
    ("wn", {"param_layers": HIDDEN}),
    ("wn", {"param_options": {"g": "exp"}}),
    ("wn_projected", {}),
    ("wn_projected", {"param_options": {"g": "none"}, "param_layers": HIDDEN}),
    ("sn", {}),
    ("sn", {"param_layers": ("*",), "param_options": {"iterations": 2}}),
    ("centred", {}),
    ("centred", {"param_layers": HIDDEN}),
    ("ln", {}),
    ("ln", {"param_options": {"over": "units"}, "param_layers": ("*",)}),
    ("bn", {}),
    ("bn", {"param_layers": HIDDEN, "optimizer": "adam"}),
    ("mean_only_bn", {"optimizer": "rmsprop_mnih", "optimizer_eps": 0.01}),
    ("mean_only_bn", {"param_layers": ("convolutions.0", "convolutions.1")}),
    ("wn_mean_only_bn", {}),
    *((param, {"optimizer": "adam"}) for param in ("standard", "wn", "sn", "wn_projected")),
    *((param, {"optimizer": "rmsprop_mnih", "optimizer_eps": 0.01}) for param in ("standard", "wn", "centred")),
    ("wn", {"optimizer": "rmsprop_mnih", "optimizer_eps": 0.01, "param_options": {"g": "exp"}}),
]
"""Parameterizations and optimizers that the kernels know, or that torch computes in between, with what was changed."""
MOMENTS_OF = {"adamax": ("exp_avg", "exp_inf"), "adam": ("exp_avg", "exp_avg_sq"), "rmsprop_mnih": ("mean", "square")}


@needs_compiler
@pytest.mark.parametrize(("param", "changes"), WAYS, ids=str)
def test_float32_updates_equal_the_plain_ones(param: str, changes: dict[str, object]) -> None:
    settings: dict[str, object] = {"reward_clip": 1.0, "loss_reduction": "sum"} | changes
    fused, plain = (agent(param, compile=choice, **settings) for choice in ("on", "off"))
    assert isinstance(fused.agent.optimizer, FusedOptimizer)
    assert type(plain.agent.optimizer) in PLAIN
    for number in range(6):
        before = copy.deepcopy(fused.q_network.state_dict())
        plain.load_state_dict(before, copy.deepcopy(fused.state_dict()))
        # Minibatches in which no sum is so close to zero that rounding alone says what a ReLU does.
        fused.update(minibatch(seed=20 + number))
        plain.update(minibatch(seed=20 + number))
        assert relative(gradient(fused), gradient(plain)) < 2e-5
        for name, expected in plain.q_network.state_dict().items():
            moved = float((expected - before[name]).norm())
            assert float((fused.q_network.state_dict()[name] - expected).norm()) < 2e-3 * moved + 1e-7, name
        for name in MOMENTS_OF[fused.config.optimizer]:
            for ours, theirs in zip(fused.q_network.parameters(), plain.q_network.parameters(), strict=True):
                assert relative(fused.optimizer.state[ours][name], plain.optimizer.state[theirs][name]) < 2e-5
        if number == 3:
            fused.copy_target()
    torch.testing.assert_close(fused.q_values(frames(5)), fused.q_network(frames(5)), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("param", "changes"), [(name, {}) for name in names()], ids=str)
def test_statistics_are_those_of_the_plain_path(param: str, changes: dict[str, object]) -> None:
    fused, plain = (agent(param, compile=choice, **changes) for choice in ("on", "off"))
    for dqn in (fused, plain):
        dqn.measure_next_update()
        dqn.update(minibatch(32))
    assert fused.effective_learning_rates() == pytest.approx(plain.effective_learning_rates(), rel=1e-3)
    assert fused.gradient_norm() == pytest.approx(plain.gradient_norm(), rel=1e-4)
    ours, theirs = fused.read_statistics(), plain.read_statistics()
    for name in ("updates", "loss", "td_error", "q_value"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name


@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("param", "changes"), WAYS, ids=str)
def test_a_loaded_agent_goes_on_bit_for_bit(param: str, changes: dict[str, object], precision: str) -> None:
    first = agent(param, precision, **changes)
    for number in range(3):
        first.update(minibatch(seed=number))
    first.copy_target()
    first.update(minibatch(seed=3))
    second = carried(first.config)
    second.update(minibatch(seed=50))  # has working weights and moments that must be forgotten
    second.load_state_dict(copy.deepcopy(first.q_network.state_dict()), copy.deepcopy(first.state_dict()))
    for number in (4, 5):
        for dqn in (first, second):
            dqn.update(minibatch(seed=number))
    for name, ours in first.q_network.state_dict().items():
        assert torch.equal(ours, second.q_network.state_dict()[name]), name
    assert torch.equal(first.q_values(frames(3)), second.q_values(frames(3)))


@needs_compiler
def test_a_change_of_the_weights_by_somebody_else_is_noticed() -> None:
    dqn = agent("wn")
    dqn.update(minibatch())
    with torch.no_grad():
        for parameter in dqn.q_network.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(dqn.q_values(frames(5)), dqn.q_network(frames(5)), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_weights_that_are_no_number_stay_visible() -> None:
    for precision in ("float32", "bfloat16"):
        dqn = agent("wn", precision)
        batch = minibatch()
        dqn.update(replace(batch, rewards=torch.full_like(batch.rewards, float("nan"))))
        assert not dqn.is_finite()
        assert not np.isfinite(dqn.read_statistics().loss)
        assert bool(dqn.q_values(frames(1)).isnan().all())


class OwnNormalization(LayerNormalization):
    """A user's own, of which nobody knows what it computes."""


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"param": "bn", "target_statistics": "batch"}, "the statistics of the minibatch"),
        ({"param": "mean_only_bn", "joint_batches": True}, "joint_batches"),
        ({"param": "bn", "batch_size": 1}, "no variance"),
    ],
    ids=str,
)
def test_batch_statistics_that_the_kernels_do_not_take_are_left_to_eager(changes: dict[str, Any], reason: str) -> None:
    made = carried(configured(compile="on", **changes))
    assert made.backend.name == "eager"
    assert reason in made.backend.reason
    # Without statistics of a minibatch these settings change nothing.
    assert carried(configured(compile="on", **(changes | {"param": "ln"}))).backend.name == "cpu_kernels"


def test_what_is_not_written_out_takes_the_plain_path() -> None:
    network = build_q_network(QNetworkSpec(4, hidden_units=16), seed=0)
    reparameterize(network, OwnNormalization(), include=["hidden"])
    assert "'ln'" in unsupported(network)
    network = build_q_network(QNetworkSpec(4, "wn", hidden_units=16), seed=0)
    assert unsupported(network) == ""
    handle = network.hidden.register_forward_hook(lambda *_: None)
    assert "hooks" in unsupported(network)
    handle.remove()
    assert "float32" in unsupported(network.double())
    odd = QNetworkSpec(4, hidden_units=16, convolutions=((4, 7, 4),))
    assert "blocks" in unsupported(build_q_network(odd, seed=0))


def test_without_a_compiler_updates_take_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "load", lambda: "there is no C compiler")
    made = carried(configured(compile="on"))
    assert made.backend.name == "eager"
    assert made.backend.reason == "it supports everything; not cpu_kernels, since there is no C compiler"
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@needs_compiler
def test_code_is_compiled_once_and_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loader.load.cache_clear()
    try:
        assert not isinstance(loader.load(), str)
        (made,) = (tmp_path / "wn_rl").iterdir()
        written = made.stat().st_mtime_ns
        loader.load.cache_clear()
        assert not isinstance(loader.load(), str)
        assert made.stat().st_mtime_ns == written
        # A place that is no directory: a temporary one then.
        monkeypatch.setenv("XDG_CACHE_HOME", str(made))
        loader.load.cache_clear()
        assert not isinstance(loader.load(), str)
        # A source that does not compile says so in one line.
        broken = tmp_path / "broken.c"
        broken.write_text("int f( {")
        monkeypatch.setattr(loader, "SOURCES", (broken,))
        loader.load.cache_clear()
        problem = loader.load()
        assert isinstance(problem, str)
        assert "\n" not in problem
    finally:
        loader.load.cache_clear()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("param", ["standard", "wn"])
def test_bfloat16_gradients_point_where_float32_ones_do_over_1000_updates(param: str) -> None:
    """The full network on Breakout's frames; at every update the float32 path has the same weights and minibatch."""
    config = configured(param=param, precision="bfloat16", compile="on", hidden_units=512, num_envs=8, batch_size=32)
    config = replace(config, learning_starts=2000, replay_capacity=10_000, epsilon_decay_steps=1000, target_period=400)
    quick, replay = played(config, 260)
    assert quick.updates > 0
    plain = carried(replace(config, precision="float32", compile="off"))
    sums: list[Tensor] = []
    plain.q_network.hidden.register_forward_hook(lambda *given: sums.append(given[-1].detach()))
    cosines, by_parameter, turned = [], [], []
    for number in range(1000):
        batch = replay.sample(config.batch_size)
        plain.load_state_dict(copy.deepcopy(quick.q_network.state_dict()), copy.deepcopy(quick.state_dict()))
        quick.update(batch)
        sums.clear()
        plain.update(batch)
        cosines.append(float(cosine(gradient(quick), gradient(plain))))
        by_parameter.append([float(cosine(ours, theirs)) for ours, theirs in each_gradient(quick, plain)])
        if isinstance(quick.network, KernelNetwork):
            active = sums[-1] > 0
            also = quick.network.workspace.activations_for(len(active), True).hidden != 0
            turned.append(float((active != also).sum() / active.sum()))
        if number % 100 == 99:
            quick.copy_target()
    lowest, tenth, median = np.quantile(cosines, [0.0, 0.1, 0.5])
    below = int(np.sum(np.array(cosines) < 0.99))
    print(f"{param}: mean {np.mean(cosines):.4f}, lowest {lowest:.3f}, a tenth below {tenth:.3f}, median {median:.4f}")
    print(f"{below} below 0.99")
    names = [name.replace("parametrizations.", "") for name, _ in quick.q_network.named_parameters()]
    for name, mean in zip(names, np.mean(by_parameter, axis=0), strict=True):
        print(f"{name:35} {mean:.4f}")
    print(f"hidden units at rest in one precision alone, of those active: {np.mean(turned) if turned else np.nan:.2%}")
    # On average: single minibatches whose TD errors are small were seen as low as 0.93, under autocast too.
    assert float(np.mean(cosines)) >= 0.99, sorted(cosines)[:5]


# --- the loop ---------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("num_envs", [1, 8, pytest.param(64, marks=pytest.mark.slow)])
def test_same_seed_same_threads_same_weights(num_envs: int) -> None:
    """Also on another number of emulator threads. 64 are slow because each loads its game."""
    config = configured(
        param="wn",
        precision="bfloat16",
        compile="on",
        num_envs=num_envs,
        replay_capacity=2000,
        batch_size=8,
        learning_starts=100,
        epsilon_decay_steps=100,
        target_period=64,
        init_samples=32,
    )
    runs = [played(replace(config, emulator_threads=threads), 400 // num_envs) for threads in (1, 2)]
    (first, first_replay), (second, second_replay) = runs
    assert first.updates > 50
    for ours, theirs in zip(first.q_network.parameters(), second.q_network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first_replay.storage.frames, second_replay.storage.frames)
    assert torch.equal(first_replay.storage.actions, second_replay.storage.actions)


@needs_compiler
def test_replay_holds_the_same_whatever_path_the_updates_take() -> None:
    """Random play, so the actions are the same too; the updates of the last steps run while the emulators do."""
    found = []
    for choice in ("on", "off"):
        config = configured(compile=choice, num_envs=4, replay_capacity=1000, batch_size=4, epsilon_end=1.0)
        dqn, replay = played(replace(config, init_samples=16), 60)
        assert dqn.updates > 30
        found.append(replay)
    first, second = found
    assert torch.equal(first.storage.frames, second.storage.frames)
    assert torch.equal(first.storage.rewards, second.storage.rewards)
    ours, theirs = first.sample(16), second.sample(16)
    for entry in fields(Minibatch):
        assert torch.equal(getattr(ours, entry.name), getattr(theirs, entry.name))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [PackedNetwork, KernelNetwork])
def test_memory_stays_flat_over_200_000_updates(kind: type[PackedNetwork], monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network on small frames, or it would take an hour; the code is that of the large one."""
    convolutions = ((16, 4, 4), (16, 2, 2))
    spec = QNetworkSpec(3, "wn", observation_shape=(4, 16, 16), convolutions=convolutions, hidden_units=16)
    library = loader.load()
    assert not isinstance(library, str)
    network = build_q_network(spec, seed=0)
    if kind is KernelNetwork and (reason := layouts.unsupported(network, library, torch.bfloat16)):
        pytest.skip(reason)
    agent = DQN(configured(param="wn", precision="bfloat16", compile="on", hidden_units=16, batch_size=4), 3, CPU)
    agent.q_network, agent.target.network = network, copy.deepcopy(network)
    agent.optimizer = torch.optim.Adamax(network.parameters(), 1e-4, (0.5, 0.999), 1e-8)
    replay = Replay(500, 4, frame_shape=(16, 16))
    if kind is PackedNetwork:
        monkeypatch.setattr(layouts, "unsupported", lambda *_: "switched off")
    dqn = CpuKernels(agent, replay)
    assert type(dqn.network) is kind
    generator = np.random.default_rng(0)
    replay.start(generator.integers(0, 256, (4, 16, 16), np.uint8))

    def updates(count: int) -> int:
        for number in range(0, count, 4):
            shown = generator.integers(0, 256, (4, 16, 16), np.uint8)
            replay.add(np.zeros(4), np.ones(4), np.zeros(4, bool), shown, np.zeros(4, bool))
            dqn.update(4)
            if number % 1000 == 0:
                dqn.copy_target()
                dqn.read_statistics()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    settled = updates(20_000)
    assert updates(200_000) - settled < 5_000  # kB
