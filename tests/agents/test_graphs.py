"""Acting and updating as on a GPU, on the CPU: with a recorder that repeats operations as a CUDA graph does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from agents.backends.cuda_graphs import CudaGraphs
from agents.backends.cuda_graphs.recording import WARM_UPS, CudaRecorder, Repeated
from agents.dqn import DQN
from tests.carried import Given
from tests.sides import ACTIONS, CPU, N, Sides, configured
from tests.tape import TapeRecorder
from wn_rl.errors import NonFiniteLossError
from wn_rl.parameterizations import names
from wn_rl.replay import Minibatch, Replay


@pytest.mark.parametrize(("param", "host"), [("standard", True), ("wn", False)])
def test_same_actions_and_minibatches_update_by_update(param: str, host: bool) -> None:
    sides = Sides(recorder := TapeRecorder(), host=host, param=param)
    drawn: list[list[Tensor]] = [[], [], []]
    for indices, agent in zip(drawn, sides.agents, strict=True):
        original = agent.td_loss

        def noted(batch: Any, original: Any = original, indices: list[Tensor] = indices) -> Any:
            indices.append(batch.indices.clone())
            return original(batch)

        agent.td_loss = noted  # type: ignore[method-assign]
    for step in range(8):
        ours, *others = sides.act(1.0 if step == 0 else 0.3)
        assert others == [ours, ours]
        for _ in range(2):
            before = copy.deepcopy(sides.plain.q_network.state_dict())
            sides.update()
            sides.assert_recorded_is_as_it_is()
            sides.assert_as_plain(before, 2e-3)
            sides.go_on_from_plain()
        if step in (2, 5):
            sides.copy_target()
        sides.store()
    # What the recorder saw is all but the repetitions, of which the generators' state tells.
    assert len(drawn[0]) == len(drawn[1]) == 16
    assert len(drawn[2]) == WARM_UPS + 1 if not host else 16
    for ours, theirs in zip(*drawn[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert sides.graphs.updating.recorded
    assert sides.graphs.acting.recorded
    assert recorder.recordings == 2
    assert recorder.repetitions == 16 - WARM_UPS + 7 - WARM_UPS
    expected = sides.plain.read_statistics()
    for agent in sides.agents[1:]:
        found = agent.read_statistics()
        assert found.updates == expected.updates == 16
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.q_value == pytest.approx(expected.q_value, rel=1e-4)


@pytest.mark.parametrize(("param", "statistics"), [*((name, "running") for name in names()), ("bn", "batch")])
def test_every_parameterization_can_be_recorded(param: str, statistics: str) -> None:
    """Running statistics, power iteration and projection happen in the recorded update too."""
    sides = Sides(TapeRecorder(), param=param, target_statistics=statistics, joint_batches=statistics == "batch")
    for step in range(WARM_UPS + 4):
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        sides.assert_recorded_is_as_it_is()
        if step < WARM_UPS:
            sides.assert_as_plain(before, 5e-3)
            sides.go_on_from_plain()
        if step == WARM_UPS + 1:
            sides.copy_target()
    assert sides.graphs.updating.recorded


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_mnih"])
def test_other_optimizers_can_be_recorded(optimizer: str) -> None:
    sides = Sides(TapeRecorder(), param="wn", optimizer=optimizer, optimizer_eps=0.01, loss_reduction="mean")
    for _ in range(WARM_UPS + 3):
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        sides.assert_recorded_is_as_it_is()
        sides.assert_as_plain(before, 2e-3)
        sides.go_on_from_plain()
    assert sides.graphs.updating.recorded


def test_bfloat16_is_rounded_at_every_repetition() -> None:
    """A weight that autocast had rounded once and kept would stay what it was."""
    sides = Sides(TapeRecorder(), param="wn", precision="bfloat16")
    for step in range(WARM_UPS + 5):
        sides.update()
        sides.assert_recorded_is_as_it_is()
        if step == WARM_UPS + 2:
            sides.copy_target()
    assert sides.graphs.updating.recorded


def test_a_watched_update_is_not_repeated_but_made_as_it_is() -> None:
    sides = Sides(recorder := TapeRecorder(), param="wn")
    for _ in range(WARM_UPS + 2):
        sides.update()
    sides.go_on_from_plain()
    made = recorder.repetitions
    for backend in sides.backends:
        backend.measure_next_update()
    sides.update()
    assert recorder.repetitions == made
    for agent, backend in zip(sides.agents[1:], sides.backends[1:], strict=True):
        expected = sides.backends[0].effective_learning_rates()
        assert backend.effective_learning_rates() == pytest.approx(expected, rel=1e-3)
        assert agent.gradient_norm() == pytest.approx(sides.plain.gradient_norm(), rel=1e-3)
    sides.update()
    assert recorder.repetitions == made + 1
    sides.assert_recorded_is_as_it_is()


@pytest.mark.parametrize("param", ["wn", "bn"])
def test_state_is_loaded_under_a_recording(param: str) -> None:
    """Back to a state in the middle: what follows is what followed, to the last bit, with no new recording."""
    sides = Sides(recorder := TapeRecorder(), param=param)
    agent, replay = sides.recorded, sides.replays[2]

    def go_on() -> tuple[Any, ...]:
        acted = []
        for _ in range(3):
            acted.append(sides.graphs.act(np.full(N, 0.5, np.float32)).tolist())
            sides.graphs.update()
        return acted, copy.deepcopy(agent.q_network.state_dict()), agent.gradient_norm()

    for _ in range(WARM_UPS + 2):
        sides.graphs.act(np.full(N, 0.5, np.float32))
        sides.graphs.update()
    agent.copy_target()
    weights = copy.deepcopy(agent.q_network.state_dict())
    state, drawn = copy.deepcopy(agent.state_dict()), replay.generator.get_state()
    first = go_on()
    agent.copy_target()  # another target than that of the state
    go_on()
    agent.load_state_dict(weights, state)
    replay.generator.set_state(drawn)
    assert agent.gradient_norm() == pytest.approx(state["gradient_norm"])
    second = go_on()
    assert first[0] == second[0]
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name
    assert first[2] == second[2]
    assert recorder.recordings == 2
    # A new agent that takes the state over goes the same way, and so does one of the plain kind, but for rounding.
    other = DQN(sides.config, ACTIONS, CPU)
    graphs = CudaGraphs(other, replay, recorder=None)
    other.load_state_dict(weights, copy.deepcopy(state))
    for name, value in other.q_network.state_dict().items():
        assert torch.equal(value, weights[name])
    plain = DQN(sides.config, ACTIONS, CPU)
    plain.load_state_dict(weights, copy.deepcopy(state))
    replay.generator.set_state(drawn)
    batch = replay.sample(8)
    plain.update(batch)
    graphs.update_on(batch)
    for ours, theirs in zip(other.q_network.parameters(), plain.q_network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_of_a_static_agent_leaves_its_place() -> None:
    def places(agent: DQN) -> list[int]:
        networks = [agent.q_network, agent.target_network]
        if agent.target._folded is not None:
            networks.append(agent.target._folded)
        tensors = [tensor for network in networks for tensor in network.state_dict(keep_vars=True).values()]
        return [tensor.data_ptr() for tensor in (*tensors, agent.statistics.sums, agent.finite.offending)]

    for param in names():
        sides = Sides(TapeRecorder(), param=param)
        made, replay, backend = sides.as_it_is, sides.replays[1], sides.backends[1]
        backend.update()
        before = places(made)
        made.initialize(replay.sample(16).observations)
        backend.update()
        made.copy_target()
        weights = copy.deepcopy(made.q_network.state_dict())
        made.load_state_dict(weights, copy.deepcopy(made.state_dict()))
        made.read_statistics()
        assert places(made) == before, param


@pytest.mark.parametrize("recorded", [False, True])
def test_a_loss_that_is_not_finite_comes_with_the_next_actions(recorded: bool) -> None:
    sides = Sides(TapeRecorder(), param="wn")
    index = 1 + recorded
    agent, replay, backend = sides.agents[index], sides.replays[index], sides.backends[index]
    epsilon = np.full(N, 0.5, np.float32)
    for _ in range(WARM_UPS + 2):
        backend.act(epsilon)
        backend.update()
    state = replay.generator.get_state()
    backend.update()
    replay.generator.set_state(state)
    with torch.no_grad():
        agent.q_network.get_parameter("output.bias").fill_(float("nan"))
    backend.update()  # the same minibatch as the update before
    backend.update()  # the one after it does not hide it
    assert agent.updates == WARM_UPS + 5
    with pytest.raises(NonFiniteLossError, match="one of the first 8 updates is not finite"):
        backend.act(epsilon)
    with pytest.raises(NonFiniteLossError):
        backend.act(np.ones(N, np.float32))
    replay.generator.set_state(state)
    offending = agent.offending_transitions()
    assert offending is not None
    assert torch.equal(offending, replay.sample_indices(8))


def test_what_cannot_be_recorded_is_done_as_it_is_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    sides = Sides(TapeRecorder(refuses=True), param="wn")
    for _ in range(WARM_UPS + 3):
        _, ours, theirs = sides.act(0.5)
        assert ours == theirs
        sides.update()
        sides.assert_recorded_is_as_it_is()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{name} cannot be captured as a CUDA graph and runs slower: operation not permitted when stream is capturing"
        for name in ("acting", "the update")
    ]


def test_work_that_reads_from_the_device_is_refused_by_the_recorder() -> None:
    """The recorder of these tests would notice."""
    x = torch.ones(3)
    for work in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: bool(x.sum() > 0),
        lambda: torch.tensor([1.0]),
        lambda: torch.rand(2, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError):
            TapeRecorder().record(work, [])  # type: ignore[arg-type]


class StandIn:
    """The parts of torch.cuda that the recorder calls, noting the calls; ``fails``: the end of a recording raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
        self.calls: list[str] = []
        self.stream = "default"
        stand_in = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device == CPU

            def wait_stream(self, other: object) -> None:
                stand_in.calls.append("recording stream waits")

        class Default:
            def wait_stream(self, other: Stream) -> None:
                stand_in.calls.append("default stream waits")

        class Graph:
            def register_generator_state(self, generator: torch.Generator) -> None:
                assert isinstance(generator, torch.Generator)
                stand_in.calls.append("generator registered")

            def replay(self) -> None:
                stand_in.calls.append("replay")

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            stand_in.stream = "recording"
            yield
            stand_in.stream = "default"

        @contextlib.contextmanager
        def recording(graph: Graph, *, stream: Stream) -> Iterator[None]:
            stand_in.stream = "recording"
            stand_in.calls.append("recording")
            yield
            if fails:  # as torch: the stream stays current
                raise RuntimeError("operation failed due to a previous error during capture")
            stand_in.stream = "default"

        default = Default()
        parts = {"Stream": Stream, "CUDAGraph": Graph, "graph": recording, "stream": on}
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: default)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", "default"))


def test_cuda_recorder_warms_up_and_records_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandIn(monkeypatch, fails=False)
    seen = []
    repeated = Repeated("work", lambda: seen.append(cuda.stream), CudaRecorder(CPU), [torch.Generator()])
    for _ in range(WARM_UPS + 2):
        repeated()
    assert seen == ["recording"] * (WARM_UPS + 1)
    assert cuda.calls == [
        *["recording stream waits", "default stream waits"] * WARM_UPS,
        "generator registered",
        "recording",
        "replay",
        "replay",
    ]
    assert cuda.stream == "default"


def test_a_failed_recording_gives_stream_and_generators_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Generator(torch.Generator):  # a CPU's has no state that a graph could take
        def graphsafe_set_state(self, state: torch.Generator) -> None:
            self.given = state.get_state()

    cuda = StandIn(monkeypatch, fails=True)
    generator = Generator()
    generator.manual_seed(4)
    before = generator.get_state()
    seen = []
    repeated = Repeated("work", lambda: seen.append(cuda.stream), CudaRecorder(CPU), [generator])
    for _ in range(WARM_UPS + 2):
        repeated()
    assert torch.equal(generator.given, before)
    assert seen == [*["recording"] * (WARM_UPS + 1), "default", "default"], "done as it is, on the stream of before"
    assert capsys.readouterr().err.startswith(
        "work cannot be captured as a CUDA graph and runs slower: operation failed"
    )


@pytest.mark.parametrize("param", names())
def test_no_autograd_graph_outlives_an_update(param: str) -> None:
    """A parameter's node that did would be of the stream of then, and a recording on another stream fails at it."""
    agent = DQN(configured(param=param), ACTIONS, CPU)
    graphs = CudaGraphs(agent, Given(), recorder=None)  # type: ignore[arg-type]

    def node_of(parameter: Tensor) -> Any:
        function = parameter.view_as(parameter).grad_fn
        assert function is not None
        return function.next_functions[0][0]

    marked = []
    check = agent.finite.check

    def noted(loss: Tensor, indices: Any) -> None:
        for parameter in agent.q_network.parameters():
            node = node_of(parameter)
            node.metadata["seen"] = True
            assert "seen" in node_of(parameter).metadata, "while the graph lives, the node is the same"
            marked.append(parameter)
        check(loss, indices)

    agent.finite.check = noted  # type: ignore[method-assign]
    x = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    zeros = torch.zeros(8, dtype=torch.int64)
    batch = Minibatch(x, zeros, zeros.float(), x, zeros.bool(), zeros)
    agent.initialize(x)
    for _ in range(2):
        graphs.measure_next_update()
        graphs.replay.batch = batch  # type: ignore[attr-defined]
        graphs.update()
        graphs.read_statistics()
        assert marked
        assert not any("seen" in node_of(parameter).metadata for parameter in marked)


class OneDevice(TorchDispatchMode):
    """Refuses an operation that has tensors of two devices, or reads a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_iter((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{func} has tensors on {' and '.join(sorted(devices))}")
        return result


@pytest.mark.parametrize("param", names())
def test_no_work_crosses_from_host_to_device(param: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's meta device, where tensors have no values: nothing can be read, and nothing may come from the host."""
    meta = torch.device("meta")
    kind = torch.Generator
    # The meta device has neither generators nor autocast.
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": kind())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    agent = DQN(configured(param=param), ACTIONS, meta)
    replay = Replay(60, N, device=meta, staged=True)
    rng = np.random.default_rng(0)
    replay.start(rng.integers(0, 256, (N, 84, 84), np.uint8))
    zeros = np.zeros(N)
    for _ in range(6):
        replay.add(zeros, zeros, zeros, rng.integers(0, 256, (N, 84, 84), np.uint8), zeros)
    graphs = CudaGraphs(agent, replay, recorder=None)
    agent.copy_target()
    with OneDevice():
        graphs._act()
        graphs._update()
        agent.copy_target()
        with pytest.raises(RuntimeError, match=r"tensors on cpu and meta"):
            torch.zeros(2).to(meta)
        with pytest.raises(RuntimeError):
            agent.statistics.sums.sum().item()


def test_recording_leaves_no_trace_and_repeating_goes_on() -> None:
    total, generator = torch.zeros(2), torch.Generator().manual_seed(3)

    def work() -> None:
        total.add_(torch.rand(2, generator=generator))

    expected_generator = torch.Generator().manual_seed(3)
    repeated = Repeated("adding", work, TapeRecorder(), [generator])
    expected = torch.zeros(2)
    for call in range(6):
        repeated()
        expected += torch.rand(2, generator=expected_generator)
        assert torch.equal(total, expected), call
        assert repeated.recorded == (call >= WARM_UPS)
    repeated.run_directly()
    assert torch.equal(total, expected + torch.rand(2, generator=expected_generator))
