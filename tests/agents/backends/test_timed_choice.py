"""Which backend and precision a run takes by timing: decided from scripted times, and that timing leaves no trace."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from agents.backends import choice, timing, timing_cache
from agents.backends.choice import WORTH_TIMING, choose, choose_for_all, decide, gain
from agents.backends.timing import Candidate, Measured, best_times, measure, synthetic_replay
from agents.dqn import DQN
from tests.small_runs import stopped_run, tiny
from wn_rl import machine
from wn_rl.config import TrainConfig, load, recorded, resolve
from wn_rl.errors import UsageError
from wn_rl.machine import Precision, resolve_device
from wn_rl.runs import checkpoint
from wn_rl.training import session
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train

CPU = torch.device("cpu")
KERNELS, KERNELS16 = Candidate("cpu_kernels", "float32"), Candidate("cpu_kernels", "bfloat16")
EAGER, EAGER16 = Candidate("eager", "float32"), Candidate("eager", "bfloat16")
BOTH: tuple[Precision, ...] = ("float32", "bfloat16")


def open_config(**changes: Any) -> TrainConfig:
    return replace(tiny(param="wn"), **({"device": "cpu", "compile": "on", "precision": "float32"} | changes))


class Scripted:
    """In place of a measurement: the milliseconds that a test says, and how often and for what it was asked."""

    def __init__(self, milliseconds: dict[Candidate, float], *, busy: bool = False) -> None:
        self.seconds = {candidate: value / 1e3 for candidate, value in milliseconds.items()}
        self.busy = busy
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, config: TrainConfig, make_agent: Any, num_actions: int, precisions: Sequence[str]) -> Measured:
        self.asked.append((config.backend, tuple(precisions)))
        found = {
            candidate: seconds
            for candidate, seconds in self.seconds.items()
            if candidate.precision in precisions and config.backend in ("auto", candidate.backend)
        }
        return Measured(tuple(found), found if len(found) > 1 else {}, {}, 1.5, self.busy)


class Refused(Scripted):
    """A measurement that nobody may ask for."""

    def __init__(self) -> None:
        super().__init__({})

    def __call__(self, *arguments: Any) -> Measured:
        raise AssertionError("something was timed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of timings that is empty; the compiled kernels stay where they are."""
    monkeypatch.setattr(timing_cache, "directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


# --- the decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({KERNELS: 11.4, KERNELS16: 10.0}, KERNELS),  # 14% more updates
        ({KERNELS: 11.6, KERNELS16: 10.0}, KERNELS16),  # 16%
        ({KERNELS: 10.0, KERNELS16: 10.0}, KERNELS),
        ({KERNELS: 8.6, KERNELS16: 11.0, EAGER16: 8.9}, KERNELS),  # a processor that is slow in bfloat16
        ({KERNELS: 8.6, KERNELS16: 11.0, EAGER16: 7.3}, EAGER16),  # 8.6 / 7.3 = 1.18
        ({KERNELS: 10.0, EAGER: 9.8}, KERNELS),  # 2% are no difference: the first of BACKENDS
        ({KERNELS: 10.0, EAGER: 9.0}, EAGER),
        ({KERNELS16: 10.0, EAGER16: 9.8}, KERNELS16),  # float32 was ruled out
        ({EAGER: 20.0}, EAGER),
        ({KERNELS: 30.0, EAGER: 11.4, KERNELS16: 10.0, EAGER16: 12.0}, EAGER),  # each precision by its own fastest
    ],
)
def test_the_decision_by_hand(milliseconds: dict[Candidate, float], expected: Candidate) -> None:
    assert decide(milliseconds) == expected


def test_the_gain_is_that_of_the_fastest_of_each_precision() -> None:
    assert gain({KERNELS: 12.0, EAGER: 20.0, KERNELS16: 8.0, EAGER16: 30.0}) == pytest.approx(1.5)
    assert gain({KERNELS: 12.0, EAGER: 20.0}) == 1.0


def test_what_was_timed_is_taken_and_the_line_gives_the_numbers() -> None:
    script = Scripted({KERNELS: 7.2, EAGER: 23.8, KERNELS16: 4.3, EAGER16: 15.1})
    taken = choose(open_config(), DQN, precisions=BOTH, updates=WORTH_TIMING, measure=script)
    assert (taken.backend, taken.precision) == ("cpu_kernels", "bfloat16")
    assert taken.reason == (
        "the fastest in bfloat16; ms per update: cpu_kernels bfloat16 4.30, cpu_kernels float32 7.20, eager bfloat16 "
        "15.10, eager float32 23.80; timed in 1.5 s"
    )
    applied = taken.applied(open_config())
    assert (applied.backend, applied.precision) == ("cpu_kernels", "bfloat16")
    stays = choose(open_config(seed=2, batch_size=8), DQN, precisions=BOTH, updates=WORTH_TIMING,
                   measure=Scripted({KERNELS: 7.0, KERNELS16: 6.25}))  # fmt: skip
    assert stays.precision == "float32"
    assert "the fastest in float32, since bfloat16 gains only 12.0%" in stays.reason


def test_only_what_is_left_open_is_timed() -> None:
    script = Scripted({KERNELS: 7.2, EAGER: 23.8, KERNELS16: 4.3, EAGER16: 15.1})
    taken = choose(open_config(), DQN, precisions=("float32",), updates=WORTH_TIMING, measure=script)
    assert (taken.backend, taken.precision) == ("cpu_kernels", "float32")
    taken = choose(open_config(backend="eager"), DQN, precisions=BOTH, updates=WORTH_TIMING, measure=script)
    assert (taken.backend, taken.precision) == ("eager", "bfloat16")
    assert script.asked == [("auto", ("float32",)), ("eager", BOTH)]
    taken = choose(open_config(backend="eager"), DQN, precisions=("bfloat16",), updates=10**6, measure=Refused())
    assert (taken.backend, taken.precision, taken.reason) == ("eager", "bfloat16", "")


def test_nothing_is_timed_on_a_gpu_or_for_a_short_run() -> None:
    taken = choose(open_config(device="cuda"), DQN, precisions=("bfloat16",), updates=10**6, measure=Refused())
    assert (taken.backend, taken.precision) == ("auto", "bfloat16")
    taken = choose(open_config(), DQN, precisions=BOTH, updates=WORTH_TIMING - 1, measure=Refused())
    assert (taken.backend, taken.precision) == ("auto", "float32")
    assert taken.note == "; nothing is timed for 19,999 updates and float32 stays"


def test_one_candidate_or_none_needs_no_time() -> None:
    taken = choose(open_config(), DQN, precisions=BOTH, updates=10**6, measure=Scripted({EAGER16: 9.0}))
    assert (taken.backend, taken.precision, taken.reason) == ("auto", "bfloat16", "")
    taken = choose(open_config(), DQN, precisions=BOTH, updates=10**6, measure=Scripted({}))
    assert (taken.backend, taken.precision, taken.reason) == ("auto", "float32", "")


def test_what_is_gone_since_it_was_timed_is_replaced_and_that_is_said() -> None:
    own = type("Own", (DQN,), {"update": lambda self, batch: DQN.update(self, batch)})
    taken = choice.Choice("cpu_kernels", "float32", reason="the fastest")
    backend = taken.make_backend(own(taken.applied(open_config()), 4, CPU), synthetic_replay(3, 4))
    assert backend.name == "eager"
    assert backend.reason == "it supports everything; not cpu_kernels, since Own overrides update"
    named = choice.Choice("cpu_kernels", "float32")
    with pytest.raises(UsageError, match="--backend cpu_kernels: Own overrides update"):
        named.make_backend(own(named.applied(open_config()), 4, CPU), synthetic_replay(3, 4))


def test_arms_that_are_compared_get_the_choice_of_the_one_that_gains_least() -> None:
    times = {
        "standard": {KERNELS: 7.2, EAGER: 20.0, KERNELS16: 4.3, EAGER16: 12.0},
        "wn": {KERNELS: 4.5, EAGER: 21.0, KERNELS16: 4.0, EAGER16: 12.0},  # gains 12.5%
    }

    def script(config: TrainConfig, make_agent: Any, num_actions: int, precisions: Sequence[str]) -> Measured:
        found = {entry: value / 1e3 for entry, value in times[config.param].items()}
        return Measured(tuple(found), found if len(found) > 1 else {}, {}, 1.0)

    arms = {name: open_config(param=name) for name in times}
    taken = choose_for_all(arms, DQN, precisions=BOTH, measure=script, cached=False)
    assert (taken.backend, taken.precision) == ("cpu_kernels", "float32")
    assert taken.reason.startswith("one for all of 2 arms: the fastest in float32, since bfloat16 gains only 12.5%")
    assert taken.reason.endswith("with wn")
    times["wn"] = {KERNELS: 5.0, EAGER: 21.0, KERNELS16: 4.0, EAGER16: 12.0}
    assert choose_for_all(arms, DQN, precisions=BOTH, measure=script, cached=False).precision == "bfloat16"
    # What one arm cannot have, no arm gets.
    times["sn"] = {EAGER: 22.0, EAGER16: 11.0}
    arms["sn"] = open_config(param="sn")
    taken = choose_for_all(arms, DQN, precisions=BOTH, measure=script, cached=False)
    assert (taken.backend, taken.precision) == ("eager", "bfloat16")
    times["sn"] = {EAGER: 22.0}
    taken = choose_for_all(arms, DQN, precisions=BOTH, measure=script, cached=False)
    assert (taken.backend, taken.precision) == ("eager", "float32")
    named = {name: replace(config, backend="eager") for name, config in arms.items()}
    taken = choose_for_all(named, DQN, precisions=("bfloat16",), measure=Refused())
    assert (taken.backend, taken.precision) == ("eager", "bfloat16")


# --- what was timed before -------------------------------------------------------------------------------------------


def test_times_are_kept_for_this_machine_model_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted({KERNELS: 7.2, KERNELS16: 4.3})

    def taken(config: TrainConfig, measure: Any = script, maker: Any = DQN) -> choice.Choice:
        return choose(config, maker, precisions=BOTH, updates=10**6, measure=measure)

    first = taken(open_config())
    again = taken(open_config(seed=9, frames=10**9, learning_rate=1.0, evaluation_envs=3), Refused())
    assert (again.backend, again.precision) == (first.backend, first.precision)
    assert again.reason.endswith("timed before")
    for other in ({"batch_size": 8}, {"num_envs": 4}, {"optimizer": "adam"}, {"param": "standard"},
                  {"param_options": {"g": "exp"}}, {"hidden_units": 32}, {"full_action_set": True}):  # fmt: skip
        assert taken(open_config(**other)).reason.endswith("timed in 1.5 s"), other
    assert len(script.asked) == 8
    torch.set_num_threads(2)
    taken(open_config())
    torch.set_num_threads(1)
    for owner, name, value in (
        (timing_cache, "_code", lambda: "other sources"),
        (timing_cache, "processor", lambda device: "another model"),
        (timing_cache.loader, "processor", lambda: "other features"),
        (timing_cache, "cores", lambda: 96),
        (timing_cache.loader, "compiler", lambda: None),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            taken(open_config())
    assert len(script.asked) == 14
    taken(open_config(), maker=type("Named", (DQN,), {}))
    assert len(script.asked) == 15
    for _ in range(2):  # a function without a name of its own may be another one in the next process
        taken(open_config(), maker=lambda *arguments: DQN(*arguments))
    assert len(script.asked) == 17
    taken(open_config(), Refused())


def test_times_from_a_busy_machine_are_not_kept() -> None:
    script = Scripted({KERNELS: 7.2, KERNELS16: 4.3}, busy=True)
    for _ in range(2):
        taken = choose(open_config(), DQN, precisions=BOTH, updates=10**6, measure=script)
        assert "CPU time of one thread" in taken.reason
    assert len(script.asked) == 2


def damaged(text: str) -> list[str]:
    """Return texts of a file of timings with something wrong."""
    kept = json.loads(text)
    rows = kept["seconds"]
    changed = [
        [],
        [*rows, ["abacus", "float32", 0.1]],
        [*rows, ["eager", "int8", 0.1]],
        [[*rows[0][:2], -1.0], rows[1]],
        [[*rows[0][:2], float("nan")], rows[1]],
        [[*rows[0][:2], float("inf")], rows[1]],
        [[*rows[0][:2], "0.1"], rows[1]],
        [[*rows[0][:2], True], rows[1]],
        [rows[0][:2]],
        [[["eager"], "float32", 0.1]],
        5,
        None,
        "seconds",
    ]
    return [
        "",
        text[: len(text) // 2],
        "[" * 100_000,
        "null",
        "[]",
        "{}",
        "\x00\xff",
        json.dumps(kept | {"key": {"threads": 3}}),
        *(json.dumps(kept | {"seconds": seconds}) for seconds in changed),
    ]


def test_a_damaged_file_of_times_is_no_error(cache: Path) -> None:
    script = Scripted({KERNELS: 7.2, KERNELS16: 4.3})

    def taken() -> choice.Choice:
        return choose(open_config(), DQN, precisions=BOTH, updates=10**6, measure=script)

    taken()
    (file,) = cache.iterdir()
    whole = file.read_text()
    assert taken().reason.endswith("timed before")
    for count, text in enumerate(damaged(whole), start=2):
        file.write_text(text, encoding="latin-1")
        found = taken()
        assert found.precision == "bfloat16"
        assert len(script.asked) == count, text[:200]
        assert file.read_text() == whole  # written anew


def test_a_cache_that_cannot_be_had_is_no_error(cache: Path) -> None:
    script = Scripted({KERNELS: 7.2, KERNELS16: 4.3})
    cache.write_text("no directory")
    for _ in range(2):
        assert choose(open_config(), DQN, precisions=BOTH, updates=10**6, measure=script).precision == "bfloat16"
    assert len(script.asked) == 2


# --- timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Advances by what the trials take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trials_of(script: dict[Candidate, Callable[[int], float]], clock: Clock) -> tuple[dict[Candidate, Any], list[Any]]:
    """Return trials that take what ``script`` says for their n-th call, and the calls (candidate, updates)."""
    calls: list[tuple[Candidate, int]] = []

    def trial(candidate: Candidate) -> Callable[[int], float]:
        def call(updates: int) -> float:
            number = sum(entry is candidate for entry, _ in calls)
            calls.append((candidate, updates))
            took = script[candidate](number)
            clock.now += took * updates
            return took

        return call

    return {candidate: trial(candidate) for candidate in script}, calls


def test_the_least_of_rounds_in_turn_counts() -> None:
    """Calls 0 to 2 are a warm-up and single updates; a busy moment meets one round of both."""
    clock = Clock()
    trials, calls = trials_of(
        {
            KERNELS: lambda n: 5.0 if n == 0 else 0.9 if n == 4 else 0.012,
            EAGER: lambda n: 5.0 if n == 0 else 0.9 if n == 4 else 0.011,
        },
        clock,
    )
    assert best_times(trials, {}, together=4, clock=clock) == {KERNELS: 0.012, EAGER: 0.011}
    assert calls[:6] == [(KERNELS, 1), (EAGER, 1), *[(KERNELS, 1)] * 2, *[(EAGER, 1)] * 2]
    assert calls[6:10] == [(KERNELS, 4), (EAGER, 4), (EAGER, 4), (KERNELS, 4)]


def test_timing_ends_in_time() -> None:
    clock = Clock()
    trials, calls = trials_of({KERNELS: lambda n: 0.012, EAGER: lambda n: 0.016}, clock)
    best_times(trials, {}, together=4, clock=clock)
    spent = 3 * 0.028  # warm-up and single updates
    assert clock.now - spent <= timing.SECONDS
    assert sum(updates == 4 for _, updates in calls) == 2 * 7  # rounds of 0.112 s in 0.8 s
    # An update that takes longer than all of the time is still timed once.
    clock = Clock()
    trials, calls = trials_of({KERNELS: lambda n: 9.0, EAGER: lambda n: 8.0}, clock)
    assert best_times(trials, {}, together=1, clock=clock) == {KERNELS: 9.0, EAGER: 8.0}
    assert len(calls) == 2 * 4
    # And one that takes no time not for ever.
    trials, calls = trials_of({KERNELS: lambda n: 1e-9, EAGER: lambda n: 1e-9}, Clock())
    best_times(trials, {}, together=1, clock=Clock())
    assert len(calls) == 2 * (3 + timing.MOST_ROUNDS)


def test_what_is_hopeless_is_not_timed_on() -> None:
    clock = Clock()
    trials, calls = trials_of({KERNELS: lambda n: 0.01, EAGER: lambda n: 0.021, EAGER16: lambda n: 0.019}, clock)
    found = best_times(trials, {}, together=4, clock=clock)
    assert found == {KERNELS: 0.01, EAGER: 0.021, EAGER16: 0.019}
    assert (EAGER, 4) not in calls
    assert (EAGER16, 4) in calls


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, 4])
def test_a_candidate_whose_work_fails_is_none(fails_at: int) -> None:
    def failing(n: int) -> float:
        if n == fails_at:
            raise RuntimeError("no\nluck")
        return 0.01

    problems: dict[str, str] = {}
    clock = Clock()
    trials, _ = trials_of({KERNELS: failing, EAGER: lambda n: 0.011}, clock)
    # A trial that failed does not count its call, so the script fails again and again.
    assert best_times(trials, problems, together=2, clock=clock) == {EAGER: 0.011}
    assert problems == {"cpu_kernels float32": "no luck"}
    trials, _ = trials_of({KERNELS: failing}, clock)
    assert best_times(trials, {}, together=2, clock=clock) == {}


def states() -> list[Any]:
    return [
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        random.getstate(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    ]


class Known(DQN):
    """Is known to the test until it is freed, and draws from generators that are not its own."""

    made: ClassVar[weakref.WeakSet[DQN]] = weakref.WeakSet()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Known.made.add(self)

    def td_loss_of(self, *arguments: Any) -> Any:
        torch.rand(1)
        np.random.random()  # noqa: NPY002
        random.random()
        return super().td_loss_of(*arguments)


@pytest.mark.parametrize("others", [0.0, 9.0])
def test_timing_leaves_no_trace(others: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cores_of_others", lambda: others)
    torch.set_num_threads(2 if machine.cores() > 1 else 1)
    before = states()
    agents: list[DQN] = []

    def maker(*arguments: Any) -> DQN:  # one that hands out what somebody else uses
        agents.append(Known(*arguments))
        return agents[-1]

    found = measure(open_config(), maker, 4, BOTH)
    assert states() == before
    assert found.busy == (others > 0)
    assert {EAGER, EAGER16} <= set(found.candidates)
    assert tuple(found.seconds) == found.candidates
    assert all(0 < seconds < 60 for seconds in found.seconds.values())
    assert len(agents) == 2
    for agent, precision in zip(agents, BOTH, strict=True):  # worked with were copies
        fresh = DQN(open_config(precision=precision), 4, CPU)
        assert agent.updates == 0
        assert not agent.optimizer.state
        assert torch.equal(agent.generator.get_state(), fresh.generator.get_state())
        weights = fresh.q_network.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in agent.q_network.state_dict().items())
    del agent
    agents.clear()
    gc.collect()
    assert not Known.made


def test_what_does_not_support_the_agent_is_no_candidate() -> None:
    own = type("Own", (DQN,), {"update": lambda self, batch: DQN.update(self, batch)})
    found = measure(open_config(), own, 4, ("float32",))
    assert found.candidates == (EAGER,)
    assert found.seconds == {}
    assert found.problems["cpu_kernels float32"] == "Own overrides update"
    found = measure(open_config(backend="cpu_kernels"), own, 4, BOTH)
    assert found.candidates == ()


def test_an_agent_that_cannot_be_timed_is_none() -> None:
    def broken(self: DQN, batch: object) -> None:
        raise ValueError("not today")

    own = type("Own", (DQN,), {"update": broken})
    found = measure(open_config(backend="eager"), own, 4, BOTH)
    assert (found.candidates, found.seconds) == ((), {})
    assert found.problems["eager float32"] == "not today"
    taken = choose(open_config(backend="eager"), own, precisions=BOTH, updates=10**6)
    assert (taken.backend, taken.precision) == ("eager", "float32")
    assert taken.note == "; nothing could be timed: not today"

    def uncopied(self: DQN, memo: object) -> DQN:
        raise TypeError("one of a kind")

    found = measure(open_config(), type("Own", (DQN,), {"__deepcopy__": uncopied}), 4, BOTH)
    assert (found.candidates, found.seconds) == ((), {})
    assert found.problems["eager bfloat16"] == "one of a kind"


def test_half_of_the_synthetic_frames_is_black() -> None:
    batch = synthetic_replay(3, 4).sample(64)
    blocks = batch.observations.reshape(64, 4, 21, 4, 21, 4).amax((1, 3, 5))
    assert float((blocks == 0).float().mean()) == pytest.approx(10 / 21)
    assert set(batch.actions.tolist()) == {0, 1, 2, 3}
    assert len(synthetic_replay(900, 4)) >= 900


@pytest.mark.slow
def test_timing_takes_less_than_two_seconds() -> None:
    config = resolve_device(resolve(replace(load("quick"), game="breakout", param="wn", device="cpu")))
    measure(config, DQN, 4, BOTH)  # compiles
    found = measure(config, DQN, 4, BOTH)
    print({str(entry): f"{1e3 * seconds:.2f} ms" for entry, seconds in found.seconds.items()}, f"{found.took:.2f} s")
    if found.busy:
        pytest.skip("other processes need the cores")
    assert found.took < 2.0


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def worth_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of any length are timed, on a processor that multiplies in bfloat16."""
    monkeypatch.setattr(choice, "WORTH_TIMING", 0)
    monkeypatch.setattr(machine, "_computes_in_bfloat16", lambda device: True)


def run_config(**changes: Any) -> TrainConfig:
    return open_config(**({"precision": "auto", "frames": 800, "compile": "off"} | changes))


@pytest.mark.usefixtures("worth_timing")
def test_a_run_says_and_keeps_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(timing, "measure", Scripted({KERNELS: 20.0, EAGER: 12.0, EAGER16: 10.0}))
    assert train(run_config(), DQN, run) == 0
    line = (
        "backend eager: the fastest in bfloat16; ms per update: eager bfloat16 10.00, eager "
        "float32 12.00, cpu_kernels float32 20.00; timed in 1.5 s"
    )
    assert line in capsys.readouterr().out.replace("\n", " ")
    kept = recorded(run / "config.yaml")
    assert (kept.backend, kept.precision) == ("eager", "bfloat16")
    assert not {"backend", "precision"} & set(kept.chosen)
    # It goes on with the same arithmetic, whatever would be faster now.
    monkeypatch.setattr(timing, "measure", Refused())
    resumed, saved = open_for_resume(run, {"frames": 1000})
    assert train(resumed, DQN, run, resume=saved) == 0
    out = capsys.readouterr().out
    assert "this run was on" not in out
    assert "backend eager: as asked for" in out
    after = checkpoint.load(run)
    assert (after.config.backend, after.config.precision) == ("eager", "bfloat16")
    # On another machine, too, and that is said.
    for module in ("wn_rl.training.session", "wn_rl.training.run", "agents.backends.timing_cache"):
        monkeypatch.setattr(f"{module}.processor", lambda device: "Abacus +beads")
    resumed, saved = open_for_resume(run, {"frames": 1200})
    assert train(resumed, DQN, run, resume=saved) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"this run was on {machine.processor(CPU)}, here is Abacus +beads: it goes on with eager in bfloat16" in out
    after = checkpoint.load(run)
    assert (after.config.backend, after.config.precision) == ("eager", "bfloat16")
    assert after.versions["processor"] == "Abacus +beads"
    # Unless somebody leaves it open again.
    monkeypatch.setattr(timing, "measure", script := Scripted({KERNELS: 10.0, EAGER: 12.0, EAGER16: 10.0}))
    resumed, saved = open_for_resume(run, {"frames": 1400, "backend": "auto", "precision": "auto"})
    assert train(resumed, DQN, run, resume=saved, quiet=True) == 0
    assert script.asked == [("auto", BOTH)]
    after = checkpoint.load(run)
    assert after.config.precision == "float32"
    assert not {"backend", "precision"} & set(after.config.chosen)


def weights_after(config: TrainConfig, directory: Path) -> dict[str, torch.Tensor]:
    assert train(config, DQN, directory, quiet=True) == 0
    return checkpoint.load(directory).weights


@pytest.mark.usefixtures("worth_timing")
def test_a_run_that_timed_is_the_run_that_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real timings, and one thread or, where there are two cores, two."""
    config = run_config(num_threads=min(machine.cores(), 2))
    timed = weights_after(config, tmp_path / "timed")
    taken = recorded(tmp_path / "timed" / "config.yaml")
    assert taken.backend != "auto"
    monkeypatch.setattr(timing, "measure", Refused())
    told = weights_after(replace(config, backend=taken.backend, precision=taken.precision), tmp_path / "told")
    assert timed.keys() == told.keys()
    assert all(torch.equal(timed[name], told[name]) for name in timed)


def test_a_short_run_times_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "measure", Refused())
    monkeypatch.setattr(machine, "_computes_in_bfloat16", lambda device: True)
    assert train(run_config(), DQN, tmp_path) == 0
    assert "; nothing is timed for 26 updates and float32 stays" in capsys.readouterr().out.replace("\n", " ")
    assert recorded(tmp_path / "config.yaml").precision == "float32"


@pytest.mark.usefixtures("worth_timing")
def test_updates_that_were_made_need_no_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on the updates count that are left."""
    stopped_run(tmp_path, run_config(backend="eager", precision="float32"), after=10)
    seen: list[int] = []

    def chosen(config: TrainConfig, make_agent: Any, *, precisions: Any, updates: int) -> choice.Choice:
        seen.append(updates)
        return choice.Choice("eager", "float32")

    monkeypatch.setattr(choice, "choose", chosen)
    resumed, saved = open_for_resume(tmp_path, {})
    made = int(saved.training["agent"]["updates"])
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0
    assert made >= 10
    assert seen == [int(checkpoint.load(tmp_path).training["agent"]["updates"]) - made]
    assert session.updates_owed(resumed, 1, 200) == made + seen[0]
