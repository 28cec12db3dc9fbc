"""A static agent's update through torch.compile against the same update as it is, on the CPU."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from agents.backends.cuda_graphs import CudaGraphs
from agents.backends.cuda_graphs.torch_compile import CompiledLoss
from tests.sides import Sides
from tests.tape import TapeRecorder, _Notes
from wn_rl.parameterizations import names
from wn_rl.replay import LazyMinibatch, Minibatch


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """torch compiles the same code only so many times in a process."""
    torch._dynamo.reset()


def assert_updates_agree(sides: Sides, updates: int, tolerance: float) -> None:
    """Update the static agents, of which the last is compiled, each time from the plain one's state."""
    for step in range(updates):
        before = copy.deepcopy(sides.plain.q_network.state_dict())
        sides.update()
        sides.assert_same_draws()
        sides.assert_as_plain(before, tolerance)
        for name, expected in sides.as_it_is.q_network.state_dict().items():
            found = sides.recorded.q_network.state_dict()[name]
            moved = float((expected - before[name]).norm())
            assert float((found - expected).norm()) <= tolerance * moved + 1e-6, name
        ours, theirs = (agent.read_statistics() for agent in (sides.recorded, sides.as_it_is))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert ours.td_error == pytest.approx(theirs.td_error, rel=1e-2)
        assert ours.q_value == pytest.approx(theirs.q_value, rel=1e-2, abs=2e-3)
        sides.go_on_from_plain()
        if step == 1:
            sides.copy_target()
    assert isinstance(sides.graphs._loss_of, CompiledLoss)


def test_a_compiled_update_is_the_same_but_for_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    assert_updates_agree(Sides(None, param="wn", compile="on"), 4, 2e-3)
    assert capsys.readouterr().err.splitlines() == ["compiling the update (once per run)"]


@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True], ids=["resident", "host"])
@pytest.mark.parametrize(("param", "statistics"), [*((name, "running") for name in names()), ("bn", "batch")])
def test_every_parameterization_can_be_compiled(param: str, statistics: str, host: bool) -> None:
    joint = statistics == "batch"
    sides = Sides(None, param=param, target_statistics=statistics, joint_batches=joint, compile="on", host=host)
    assert_updates_agree(sides, 4, 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_mnih"])
def test_other_optimizers_can_be_compiled(optimizer: str) -> None:
    assert_updates_agree(Sides(None, param="wn", optimizer=optimizer, optimizer_eps=0.01, compile="on"), 4, 2e-3)


@pytest.mark.slow
def test_in_bfloat16_what_is_compiled_is_as_near_to_float32() -> None:
    """Sums are rounded at other places than without, so each is compared with float32 from the same state."""
    low, whole = (Sides(None, param="wn", precision=precision, compile=compile_, hidden_units=512)
                  for precision, compile_ in (("bfloat16", "on"), ("float32", "off")))  # fmt: skip
    for _ in range(5):
        whole.plain.load_state_dict(low.plain.q_network.state_dict(), copy.deepcopy(low.plain.state_dict()))
        whole.go_on_from_plain()
        low.update()
        whole.update()
        compiled, plain, exact = (
            agent.optimizer.gradient  # type: ignore[attr-defined]
            for agent in (low.recorded, low.as_it_is, whole.as_it_is)
        )
        ours, theirs = (torch.nn.functional.cosine_similarity(found, exact, dim=0) for found in (compiled, plain))
        assert float(ours) > float(theirs) - 0.005
        assert float(ours) > 0.98
        low.go_on_from_plain()


def test_looking_up_at_once_is_looking_up_field_by_field() -> None:
    replay = Sides(None, param="standard").replays[0]
    indices = replay.sample_indices(40)
    at_once, one_by_one = replay.storage.minibatch(indices), LazyMinibatch(replay.storage, indices)
    for name in ("observations", "actions", "rewards", "next_observations", "terminals", "indices"):
        assert torch.equal(getattr(at_once, name), getattr(one_by_one, name)), name
        assert getattr(at_once, name).dtype == getattr(one_by_one, name).dtype, name


@pytest.mark.parametrize("where", ["loss", "gradient", "step"])
def test_what_cannot_be_compiled_is_made_without_and_once(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it fails: what was done until then is taken back, running statistics and sums included."""

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            raise RuntimeError("no compiler for the way back\nand more")

    def uncompiled(function: Any, **_: object) -> Any:
        def called(*arguments: Any) -> Any:
            if where == "step" and not arguments:
                raise RuntimeError("no compiler for the way back\nand more")
            result = function(*arguments)
            if arguments:  # as if what was compiled had computed something wrong before
                sides.recorded.finite.offending.fill_(1)
            if where == "loss":
                raise RuntimeError("no compiler for the way back\nand more")
            return Breaks.apply(result) if where == "gradient" and arguments else result

        return called

    sides = Sides(TapeRecorder(), param="bn", compile="on")
    monkeypatch.setattr(torch, "compile", uncompiled)
    for _ in range(6):
        sides.update()
    sides.assert_recorded_is_as_it_is()
    assert sides.graphs.updating.recorded
    ours, theirs = (agent.read_statistics() for agent in (sides.recorded, sides.as_it_is))
    assert ours == theirs
    assert ours.updates == 6
    assert sides.recorded.updates == 6
    assert sides.recorded.offending_transitions() is None
    assert capsys.readouterr().err.splitlines() == [
        "compiling the update (once per run)",
        "the update cannot be compiled and runs slower: no compiler for the way back and more",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("param", ["standard", "wn"])
def test_fewer_operations_are_left(param: str) -> None:
    """Counts what an update asks the device for; with -s the counts are printed."""
    sides = Sides(None, param=param, compile="on", hidden_units=512)
    _, plain, compiled = sides.backends
    assert isinstance(plain, CudaGraphs)
    assert isinstance(compiled, CudaGraphs)
    batch = sides.replays[1].sample(8)
    recorder = Noted()
    recorder.record(lambda: plain.update_on(LazyMinibatch(batch.storage, batch.indices)), [])  # type: ignore[attr-defined]
    before = sum(1 for function, *_ in recorder.steps if gives_work(function))
    _, code = run_and_get_code(lambda: compiled.update_on(LazyMinibatch(batch.storage, batch.indices)))  # type: ignore[attr-defined]
    calls = re.compile(r"^ +(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.\w+\.\w+)\(", re.MULTILINE)
    parts = [len(calls.findall(text)) for text in code]
    print(f"{param}: {before} operations as it is; compiled, in {len(parts)} parts, {parts} and the gradients' joining")
    assert len(parts) == 3
    assert sum(parts) + 1 < before / 2


class Noted(TapeRecorder):
    """Keeps what it saw."""

    def record(self, work: Any, generators: Any) -> Any:
        with _Notes(generators) as notes:
            work()
        self.steps = notes.steps
        return work


def gives_work(function: Any) -> bool:
    """Whether an operation is more than another view of a tensor or memory for one."""
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
    nothing = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach", "aten.promote_types", "profiler")
    return not views and not str(function).startswith(nothing)


@pytest.mark.slow
def test_a_minibatch_that_was_given_can_be_compiled_too() -> None:
    sides = Sides(None, param="standard", compile="on", host=True)
    batch = sides.replays[1].transitions(torch.arange(8))
    assert type(batch) is Minibatch
    assert_updates_agree(sides, 2, 2e-3)


@pytest.mark.slow
def test_what_somebody_looked_at_or_wrote_into_counts() -> None:
    sides = Sides(None, param="standard", compile="on")
    for step in range(3):
        for agent, backend, replay in zip(sides.agents, sides.backends, sides.replays, strict=True):
            batch = replay.sample(8)
            if step > 0:  # the first, untouched, decides whether updates are compiled
                batch.rewards.fill_(0.5 * step)
            if isinstance(backend, CudaGraphs):
                backend.update_on(batch)
                agent.count_updates(1)
            else:
                agent.update(batch)
        before = sides.as_it_is.read_statistics()
        found = sides.recorded.read_statistics()
        assert found.loss == pytest.approx(before.loss, rel=1e-4)
        assert found.td_error == pytest.approx(before.td_error, rel=1e-4)
        sides.go_on_from_plain()
    assert isinstance(sides.graphs._loss_of, CompiledLoss)
