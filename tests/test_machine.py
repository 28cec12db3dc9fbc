"""A run that does not fit is refused before anything is allocated or written."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.dqn import DQN
from wn_rl import machine
from wn_rl.config import load, resolve
from wn_rl.errors import UsageError, WnRlError
from wn_rl.machine import (
    MemoryPlan,
    check_memory,
    free_bytes,
    place_replay,
    plan_memory,
    resolve_device,
    set_float32_precision,
)
from wn_rl.networks import QNetworkSpec
from wn_rl.replay import Replay
from wn_rl.training.session import train


def test_free_memory_is_a_plausible_number_or_unknown() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**26 < free < 2**50


def test_a_replay_that_does_not_fit_is_refused_with_a_capacity_that_would(tmp_path: Path) -> None:
    if free_bytes(torch.device("cpu")) is None:
        pytest.skip("this system does not tell its free memory")
    config = resolve(replace(load("quick"), game="breakout", replay_capacity=10**9))
    with pytest.raises(
        WnRlError,
        match=r"is 7071\.0 GB for replay_capacity 1,000,000,000.*lower --replay-capacity \(about [\d,]+ would fit\)",
    ):
        train(config, DQN, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_what_a_run_allocates() -> None:
    config = replace(resolve(replace(load("quick"), game="breakout", param="wn")), device="cpu", precision="float32")
    agent = DQN(config, 4, torch.device("cpu"))
    parameters = QNetworkSpec(4).count_parameters()
    # w of each layer becomes v of the same size and one g per unit.
    units = 32 + 64 + 64 + 512 + 4
    assert sum(parameter.numel() for parameter in agent.q_network.parameters()) == parameters + units
    replay_bytes = Replay.expected_bytes(config.replay_capacity, config.num_envs)
    plan = plan_memory(config, replay_bytes, parameters)
    assert plan.on_device["replay_capacity"] == replay_bytes
    assert plan.on_device["hidden_units"] > 4 * sum(p.numel() for p in agent.q_network.parameters()) * 4
    assert plan.working_bytes == sum(plan.on_device.values()) + sum(plan.on_host.values()) - replay_bytes
    if free_bytes(torch.device("cpu")) is not None:
        check_memory(replace(config, replay_capacity=1000), plan_memory(config, 7_056_000, 1000), torch.device("cpu"))


GB = 10**9


@pytest.mark.parametrize(
    ("free", "on_host"),
    [
        # The replay takes 7 GB, the rest 1 GB and CUDA's context 0.6 GB.
        (8.7 * GB, False),
        (8.6 * GB, False),
        (8.5 * GB, True),
        (1.6 * GB, True),
        (1.5 * GB, False),  # nor does the rest fit: the check that follows says so
        (None, False),
    ],
)
def test_a_replay_that_is_too_much_for_the_gpu_goes_to_the_host(free: float | None, on_host: bool) -> None:
    plan = MemoryPlan({"replay_capacity": 7 * GB, "batch_size": GB // 2, "hidden_units": GB // 2}, {"num_envs": 30})
    placed = place_replay(plan, None if free is None else int(free))
    assert placed.replay_on_host == on_host
    assert placed.working_bytes == plan.working_bytes == GB + 30
    assert sum(placed.on_device.values()) == (GB if on_host else 8 * GB)
    assert sum(placed.on_host.values()) == (7 * GB + 30 if on_host else 30)


def test_what_does_not_fit_on_the_host_either_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(replace(load("paper"), game="breakout"))
    plan = MemoryPlan({"replay_capacity": 7 * GB, "batch_size": GB}, {"num_envs": 30})
    monkeypatch.setattr(machine, "free_bytes", lambda device: 4 * GB)
    placed = place_replay(plan, 4 * GB)
    expected = (
        "this run needs 7.8 GB of memory on cpu, and 4.0 GB are free; its largest part is 7.0 GB for "
        "replay_capacity 1,000,000, and 800.0 MB are for Python and its libraries: lower --replay-capacity (about "
        "457,142 would fit), or free some memory"
    )
    with pytest.raises(WnRlError, match=re.escape(expected)):
        check_memory(config, placed, torch.device("cuda"))


def test_where_another_program_holds_the_memory_the_units_show_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(replace(load("quick"), game="breakout", init_samples=16))
    plan = MemoryPlan({"init_samples": 6_400_000, "batch_size": 400_000}, {"num_envs": 30})
    monkeypatch.setattr(machine, "free_bytes", lambda device: 3_600_000)
    expected = (
        "this run needs 806.8 MB of memory on cpu, and 3.6 MB are free; its largest part is 6.4 MB for "
        "init_samples 16, and 800.0 MB are for Python and its libraries: no init_samples would fit; free some "
        "memory, or wait"
    )
    with pytest.raises(WnRlError, match=re.escape(expected)):
        check_memory(config, plan, torch.device("cpu"))
    assert [machine.amount(size) for size in (7.1e9, 0.96e9, 4e5, 12)] == ["7.1 GB", "1.0 GB", "400 kB", "0 kB"]


def test_on_a_cpu_bfloat16_has_to_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(replace(load("quick"), game="breakout", device="cpu"))
    for computes, expected in ((True, ("float32", "bfloat16")), (False, ("float32",))):
        monkeypatch.setattr(machine, "_computes_in_bfloat16", lambda device, answer=computes: answer)
        assert machine.precisions(config, "cpu") == expected
        assert machine.precisions(config, "cuda") == expected[-1:]
        assert resolve_device(config).precision == "float32"
        assert machine.precisions(replace(config, precision="bfloat16"), "cpu") == ("bfloat16",)
        assert resolve_device(replace(config, precision="bfloat16")).precision == "bfloat16"


def test_a_processor_is_its_name_and_what_it_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "processor\t: 0\nmodel name\t: Abacus 9\nflags\t\t: fpu avx2 avx512_bf16 avx512f vme\n\nmodel name\t: Other\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: lines)
    assert machine.processor(torch.device("cpu")) == "Abacus 9 +avx2 +avx512f +avx512_bf16"
    assert machine.device_name(torch.device("cpu")) == f"Abacus 9, {os.cpu_count()} cores"


def test_cores_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks of user, nice, system, idle, iowait, irq, softirq, steal, and guest time, which user holds already."""
    before = "cpu 9 9 9 9\ncpu0 100 0 0 900 0 0 0 0 0 0\ncpu1 50 0 0 800 50 0 0 0 7 0\ncpu7 0 0 0 0 0 0 0 0 0 0\n"
    after = "cpu 9 9 9 9\ncpu0 106 1 1 901 0 0 0 1 0 0\ncpu1 52 0 0 804 54 0 0 0 9 0\ncpu7 9 0 0 0 0 0 0 0 0 0\n"
    seen = iter([before, after, "", ""])
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: next(seen))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert machine.cores_of_others(0.0) == pytest.approx(2 * (9 + 2) / (10 + 10))
    assert machine.cores_of_others(0.0) == 0.0


def test_precision_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(replace(load("quick"), game="breakout"))
    with pytest.raises(UsageError, match="--precision tf32 needs a GPU"):
        resolve_device(replace(config, precision="tf32", device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for computes, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=computes: answer)
        assert resolve_device(replace(config, device="cuda")).precision == expected
    assert resolve_device(replace(config, precision="tf32", device="cuda")).precision == "tf32"
    assert resolve_device(replace(config, device="cuda")).compile == "off"


def test_an_update_is_compiled_on_a_gpu_where_it_can_be_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = resolve(replace(load("paper"), game="breakout", device="cuda"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    long, short = replace(config, frames=20_000_000), replace(config, frames=19_999_999)
    assert resolve_device(long).compile == "on"
    assert resolve_device(short).compile == "off"
    assert resolve_device(replace(long, compile="off")).compile == "off"
    for optimizer in ("adamax", "adam", "rmsprop_mnih"):
        assert resolve_device(replace(short, compile="on", optimizer=optimizer)).compile == "on"
    with monkeypatch.context() as lacking:
        lacking.setattr(machine.importlib.util, "find_spec", lambda name: None)
        assert resolve_device(long).compile == "off"
        with pytest.raises(UsageError, match="on a GPU it needs the package triton and a C compiler"):
            resolve_device(replace(short, compile="on"))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert resolve_device(long).compile == "off"


def test_tf32_is_on_where_it_was_asked_for_and_nowhere_else() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for precision, expected in (("tf32", True), ("float32", False), ("bfloat16", False)):
            set_float32_precision(precision)
            assert torch.backends.cuda.matmul.allow_tf32 is expected
            assert torch.backends.cudnn.allow_tf32 is expected
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_setting_tf32_gives_no_advice_to_users_and_hides_no_other_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 warns so, once a process; other versions do not."""
    advice = "Please use the new API settings to control TF32 behavior, such as torch.backends.…"
    said = [advice, "something else"]

    class Advising:
        def __setattr__(self, name: str, value: object) -> None:
            if said:
                warnings.warn(said.pop(0), UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.backends.cuda, "matmul", Advising())
    monkeypatch.setattr(torch.backends, "cudnn", Advising())
    with pytest.warns(UserWarning, match="something else") as seen:
        set_float32_precision("float32")
    assert [str(warning.message) for warning in seen] == ["something else"]
