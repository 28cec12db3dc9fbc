"""What only a GPU can show: ``python -m pytest -m gpu`` there before anything else.

The recorded path against the unrecorded one, no wait but the one for the actions, and whole runs on the real emulators.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.backends import make_backend
from agents.backends.cuda_graphs import CudaGraphs
from agents.backends.cuda_graphs.recording import WARM_UPS, CudaRecorder, Repeated
from agents.backends.cuda_graphs.torch_compile import CompiledLoss
from agents.dqn import DQN
from tests.sides import ACTIONS, N, Sides, configured
from tests.small_runs import tiny
from wn_rl import machine
from wn_rl.atari.env import make_atari
from wn_rl.config import TrainConfig
from wn_rl.errors import NonFiniteLossError
from wn_rl.parameterizations import names
from wn_rl.replay import Minibatch, Replay
from wn_rl.replay.host import HostReplay
from wn_rl.replay.pinned_transfer import Readback, Staging
from wn_rl.training import TrainingLoop
from wn_rl.training import session as trainer
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def float32_means_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    machine.set_float32_precision("float32")
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waits() -> Iterator[None]:
    """Make a wait for the device an error; an event's own wait, the one for the actions, is none to torch."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close_weights(found: nn.Module, expected: nn.Module, before: dict[str, Tensor], tolerance: float) -> None:
    """To a fraction of how far the update moved them: kernels may add in another order each time."""
    for name, value in expected.state_dict().items():
        moved = float((value - before[name]).norm())
        assert float((found.state_dict()[name] - value).norm()) <= tolerance * moved + 1e-6, name


def random_minibatch(size: int, seed: int, device: torch.device) -> Minibatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2 * size, 4, 84, 84), dtype=torch.uint8, generator=generator)
    batch = Minibatch(
        x[:size],
        torch.randint(0, ACTIONS, (size,), generator=generator),
        torch.randint(-2, 3, (size,), generator=generator).float(),
        x[size:],
        torch.rand(size, generator=generator) < 0.2,
        torch.arange(size),
    )
    return Minibatch(**{name: value.to(device) for name, value in vars(batch).items()})


# --- recording ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True], ids=["resident", "host"])
@pytest.mark.parametrize("param", names())
def test_graphs_do_what_was_recorded(param: str, host: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, static and recorded sides go from the same state at every update, with the same draws."""
    sides = Sides(CudaRecorder(CUDA), CUDA, host=host, param=param)
    for step in range(WARM_UPS + 5):
        ours, *others = sides.act(1.0 if step == 0 else 0.5)
        assert others == [ours, ours]
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        sides.assert_same_draws()
        assert_close_weights(sides.as_it_is.q_network, sides.plain.q_network, before, 0.02)
        assert_close_weights(sides.recorded.q_network, sides.as_it_is.q_network, before, 0.02)
        sides.go_on_from_plain()
        if step == WARM_UPS + 2:
            sides.copy_target()
        sides.store()
    assert sides.graphs.updating.recorded, capsys.readouterr().err
    assert sides.graphs.acting.recorded
    expected = sides.plain.read_statistics()
    for agent in sides.agents[1:]:
        found = agent.read_statistics()
        assert found.updates == expected.updates
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)


@pytest.mark.parametrize("host", [False, True], ids=["resident", "host"])
@pytest.mark.parametrize("param", ["standard", "wn", "bn", "wn_projected"])
def test_a_compiled_update_is_recorded_too(param: str, host: bool, capsys: pytest.CaptureFixture[str]) -> None:
    sides = Sides(CudaRecorder(CUDA), CUDA, host=host, param=param, compile="on")
    for step in range(WARM_UPS + 5):
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        sides.assert_same_draws()
        assert_close_weights(sides.recorded.q_network, sides.plain.q_network, before, 0.02)
        sides.go_on_from_plain()
        if step == WARM_UPS + 2:
            sides.copy_target()
        sides.store()
    assert isinstance(sides.graphs._loss_of, CompiledLoss), capsys.readouterr().err
    assert sides.graphs.updating.recorded, capsys.readouterr().err


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_updates_a_second(compile_: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With -s the figure is printed; a graph must not be slower than a tenth of what is aimed at."""
    config = configured(param="wn", precision="bfloat16", compile=compile_, hidden_units=512, batch_size=32)
    agent, replay = DQN(config, ACTIONS, CUDA), Replay(20_000, 16, device=CUDA)
    generator = np.random.default_rng(0)
    replay.start(generator.integers(0, 256, (16, 84, 84), np.uint8))
    for _ in range(200):
        frames = generator.integers(0, 256, (16, 84, 84), np.uint8)
        replay.add(generator.integers(0, ACTIONS, 16), generator.normal(size=16), np.zeros(16), frames, np.zeros(16))
    agent.initialize(replay.sample(16).observations)
    backend = make_backend(agent, replay)
    backend.update(20)
    torch.cuda.synchronize()
    started = time.perf_counter()
    backend.update(2000)
    torch.cuda.synchronize()
    rate = 2000 / (time.perf_counter() - started)
    assert isinstance(backend, CudaGraphs)
    assert backend.updating.recorded, capsys.readouterr().err
    with capsys.disabled():
        print(f" wn, bfloat16, minibatch 32, compile {compile_}: {rate:,.0f} updates/s", end="")
    assert rate > 900


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_mnih"])
def test_graphs_with_other_optimizers(optimizer: str) -> None:
    sides = Sides(CudaRecorder(CUDA), CUDA, param="wn", optimizer=optimizer, optimizer_eps=0.01)
    for _ in range(WARM_UPS + 3):
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        assert_close_weights(sides.recorded.q_network, sides.plain.q_network, before, 0.02)
        sides.go_on_from_plain()
    assert sides.graphs.updating.recorded


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_survive_loading_a_state_and_a_watched_update(precision: str) -> None:
    sides = Sides(CudaRecorder(CUDA), CUDA, param="wn", precision=precision)
    agent, replay = sides.recorded, sides.replays[2]
    for _ in range(WARM_UPS + 2):
        sides.graphs.update()
    weights, state = copy.deepcopy(agent.q_network.state_dict()), copy.deepcopy(agent.state_dict())
    drawn = replay.generator.get_state()
    losses = []
    for _ in range(2):
        agent.load_state_dict(weights, copy.deepcopy(state))
        replay.generator.set_state(drawn)
        agent.read_statistics()
        for _ in range(4):
            sides.graphs.update()
        losses.append(agent.read_statistics().loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert sides.graphs.updating.recorded
    sides.graphs.measure_next_update()
    sides.graphs.update()
    assert all(math.isfinite(value) and value > 0 for value in sides.graphs.effective_learning_rates().values())
    assert math.isfinite(agent.gradient_norm())
    assert agent.is_finite()


def test_drawing_inside_a_graph_goes_on_as_outside() -> None:
    generator, expected_generator = (torch.Generator(CUDA).manual_seed(7) for _ in range(2))
    out = torch.zeros(5, device=CUDA)

    def work() -> None:
        out.copy_(torch.rand(5, device=CUDA, generator=generator))
        out.add_(torch.randint(9, (5,), device=CUDA, generator=generator))

    repeated = Repeated("drawing", work, CudaRecorder(CUDA), [generator])
    for _ in range(WARM_UPS + 5):
        repeated()
        expected = torch.rand(5, device=CUDA, generator=expected_generator)
        expected += torch.randint(9, (5,), device=CUDA, generator=expected_generator)
        assert torch.equal(out, expected)
        assert torch.equal(generator.get_state(), expected_generator.get_state())
    assert repeated.recorded
    state = generator.get_state()
    repeated()
    first = out.clone()
    generator.set_state(state)
    repeated()
    assert torch.equal(out, first)


def test_what_cannot_be_recorded_goes_on_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator(CUDA).manual_seed(7)
    total = torch.zeros((), device=CUDA)
    stream = torch.cuda.current_stream()

    def work() -> None:
        total.add_(torch.rand((), device=CUDA, generator=generator))
        total.item()  # waits, which is not allowed while recording

    repeated = Repeated("summing", work, CudaRecorder(CUDA), [generator])
    for _ in range(WARM_UPS + 4):
        repeated()
    assert not repeated.recorded
    expected_generator = torch.Generator(CUDA).manual_seed(7)
    expected = sum(float(torch.rand((), device=CUDA, generator=expected_generator)) for _ in range(WARM_UPS + 4))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert torch.cuda.current_stream() == stream
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("summing cannot be captured as a CUDA graph and runs slower: ")
    # Another piece of work can still be recorded afterwards.
    other = Repeated("adding", lambda: total.add_(1) and None, CudaRecorder(CUDA), [])
    before = float(total)
    for _ in range(WARM_UPS + 2):
        other()
    assert float(total) == pytest.approx(before + WARM_UPS + 2, rel=1e-6)


# --- transfers ---------------------------------------------------------------------------------------------------


def test_the_host_never_overwrites_what_is_still_being_copied() -> None:
    staging = Staging({"x": (torch.int64, (1 << 20,))}, CUDA)
    sums = torch.zeros(50, dtype=torch.int64, device=CUDA)
    busy = torch.randn(4096, 4096, device=CUDA)
    with no_waits():
        for turn in range(50):
            for _ in range(3):
                busy = busy @ busy * 1e-3  # keeps the device behind the host
            staging.begin()["x"][:] = turn
            staging.send()
            sums[turn : turn + 1].copy_(staging.device["x"].sum(0, keepdim=True))
    assert sums.tolist() == [turn << 20 for turn in range(50)]


def test_numbers_come_back_when_they_are_there() -> None:
    readback = Readback(3, CUDA)
    busy = torch.randn(4096, 4096, device=CUDA)
    with no_waits():
        for turn in range(20):
            for _ in range(3):
                busy = busy @ busy * 1e-3
            found = readback.read(torch.full((3,), turn, device=CUDA))
            assert found.tolist() == [turn] * 3


# --- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("param", ["standard", "wn"])
def test_the_gpu_makes_the_update_of_the_cpu(param: str) -> None:
    config = configured(param=param, hidden_units=64)
    here, there = DQN(config, ACTIONS, torch.device("cpu")), DQN(config, ACTIONS, CUDA)
    here.initialize(random_minibatch(16, 9, torch.device("cpu")).observations)
    there.load_state_dict(here.q_network.state_dict(), here.state_dict() | {"generator": there.generator.get_state()})
    for seed in range(3):
        before = {name: value.clone() for name, value in here.q_network.state_dict().items()}
        here.update(random_minibatch(8, seed, torch.device("cpu")))
        there.update(random_minibatch(8, seed, CUDA))
        assert there.gradient_norm() == pytest.approx(here.gradient_norm(), rel=1e-3)
        on_cpu = {name: value.cpu() for name, value in there.q_network.state_dict().items()}
        for name, value in here.q_network.state_dict().items():
            assert float((on_cpu[name] - value).norm()) <= 0.05 * float((value - before[name]).norm()) + 1e-6, name
        there.load_state_dict(
            here.q_network.state_dict(), here.state_dict() | {"generator": there.generator.get_state()}
        )


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_lower_precision_gives_gradients_that_point_the_same_way(precision: str) -> None:
    gradients = {}
    for name in ("float32", precision):
        machine.set_float32_precision(name)
        agent = DQN(configured(param="wn", hidden_units=512, precision=name), ACTIONS, CUDA)
        agent.initialize(random_minibatch(64, 9, CUDA).observations)
        agent.update(random_minibatch(32, 1, CUDA))
        gradients[name] = torch.cat([p.grad.flatten() for p in agent.q_network.parameters() if p.grad is not None])
    cosine = nn.functional.cosine_similarity(gradients["float32"], gradients[precision], dim=0)
    assert float(cosine) > 0.98


# --- the loop ----------------------------------------------------------------------------------------------------


def loop_on_gpu(config: TrainConfig, *, host: bool = False) -> TrainingLoop:
    env = make_atari("breakout", config.num_envs)
    agent = DQN(config, env.num_actions, CUDA)
    kind = HostReplay if host else Replay
    replay = kind(config.replay_capacity, config.num_envs, device=CUDA, seed=config.seed)
    loop = TrainingLoop(config, env, make_backend(agent, replay), replay)
    loop.start()
    return loop


@pytest.mark.parametrize("host", [False, True], ids=["resident", "host"])
@pytest.mark.parametrize(("precision", "compile_"), [("float32", "off"), ("bfloat16", "off"), ("bfloat16", "on")])
def test_a_vector_step_waits_for_nothing_but_the_actions(precision: str, compile_: str, host: bool) -> None:
    config = replace(tiny(num_envs=8, precision=precision, target_period=16, compile=compile_), device="cuda")
    loop = loop_on_gpu(config, host=host)
    backend = loop.backend
    assert isinstance(backend, CudaGraphs)
    while loop.agent.updates < 2 * WARM_UPS:
        loop.vector_step()
    assert backend.updating.recorded
    while not backend.acting.recorded:
        loop.vector_step()
    with no_waits():
        for _ in range(30):
            loop.vector_step()
    statistics = loop.agent.read_statistics()
    assert statistics.updates > 50
    assert math.isfinite(statistics.loss)
    assert loop.agent.is_finite()
    loop.env.close()


def test_frames_of_the_emulators_are_in_the_replay() -> None:
    config = replace(tiny(num_envs=4, epsilon_end=1.0), device="cuda")
    loop = loop_on_gpu(config)
    seen = []
    add = loop.replay.add

    def noted(*row: Any) -> None:
        seen.append(row[3].copy())
        add(*row)

    loop.replay.add = noted  # type: ignore[method-assign]
    for _ in range(60):
        loop.vector_step()
        np.testing.assert_array_equal(loop.replay.observations()[:, -1].cpu().numpy(), seen[-1])
    loop.env.close()


def test_a_loss_that_is_not_finite_stops_the_next_vector_step() -> None:
    config = replace(tiny(num_envs=4), device="cuda")
    loop = loop_on_gpu(config)
    while loop.agent.updates < 2 * WARM_UPS:
        loop.vector_step()
    with torch.no_grad():
        loop.agent.q_network.get_parameter("output.bias").fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="is not finite"):  # noqa: PT012 - at the first or the second
        loop.vector_step()
        loop.vector_step()
    offending = loop.agent.offending_transitions()
    assert offending is not None
    low, high = loop.replay.index_range
    assert bool(((offending >= low) & (offending < high)).all())
    loop.env.close()


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True], ids=["resident", "host"])
def test_a_run_stops_and_goes_on(
    tmp_path: Path, host: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if host:
        monkeypatch.setattr(
            trainer, "place_replay", lambda plan, free: machine.place_replay(plan, _room_for_rest(plan))
        )
    config = replace(tiny(frames=2400), device="cuda")
    assert train(config, DQN, tmp_path) == 0
    printed = capsys.readouterr()
    assert ("is kept in host memory" in " ".join((printed.out + printed.err).split())) == host
    resumed, saved = open_for_resume(tmp_path, {"frames": 4000})
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0
    _, ended = open_for_resume(tmp_path, {})
    assert ended.agent_steps * 4 >= 4000
    assert int(ended.training["agent"]["updates"]) > int(saved.training["agent"]["updates"])
    # And the checkpoint goes on on a CPU.
    resumed, saved = open_for_resume(tmp_path, {"frames": 4400, "device": "cpu", "precision": "float32"})
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0


def _room_for_rest(plan: machine.MemoryPlan) -> int:
    return sum(plan.on_device.values()) - plan.on_device["replay_capacity"] + machine.CONTEXT_BYTES


@pytest.mark.slow
def test_memory_of_a_whole_replay_and_of_many_updates() -> None:
    """1M agent steps in at most 7.3 GB beside the framework, and flat over 20,000 recorded updates."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = replace(configured(param="wn", hidden_units=512, batch_size=32, precision="bfloat16"), num_envs=N)
    agent = DQN(config, ACTIONS, CUDA)
    replay = Replay(1_000_000, N, device=CUDA)
    backend = make_backend(agent, replay)
    frames = np.zeros((N, 84, 84), np.uint8)
    replay.start(frames)
    for _ in range(10):
        replay.add(*np.zeros((3, N)), frames, np.zeros(N, bool))
    agent.initialize(replay.sample(512).observations)

    def updates(count: int) -> int:
        for _ in range(count):
            backend.update()
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    settled = updates(1000)
    assert updates(20_000) == settled
    assert torch.cuda.max_memory_allocated() - before <= 7.3e9
