"""Properties of this machine: device, precision, memory, and settings that use its memory well."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from wn_rl.config import TrainConfig, is_auto, network_spec, validate
from wn_rl.errors import UsageError, WnRlError

LIBRARY_BYTES = 800_000_000
"""Host memory of a run before its own data: Python, torch, ale-py (a run of `quick` was seen to take 1.1 GB)."""
CONTEXT_BYTES = 600_000_000
"""GPU memory of CUDA and its libraries."""
EMULATOR_BYTES = 1_600_000
"""Host memory of one emulator (16 took 29 MB, 256 took 400 MB)."""
TRANSITION_BYTES = 700_000
"""Memory of one transition of a minibatch in an update: both observations gathered and widened, activations and
gradients (measured: 490 kB in float32, without the gathering)."""
INIT_SAMPLE_BYTES = 400_000
"""Memory of one observation in the data-dependent initialization (measured: 275 kB, without the gathering)."""
WORTH_COMPILING = 500_000
"""Number of parameters from which a compiled optimizer step is worth its compilation."""
WORTH_COMPILING_FRAMES = 20_000_000
"""Frames from which a run on a GPU compiles its update, which takes as long as about a million frames there."""
MOST_ENVS = {"cpu": 64, "cuda": 512}
"""Most emulators that ``num_envs: auto`` chooses."""
ENVS_PER_CORE = {"cpu": 8, "cuda": 16}
"""Emulators per core that ``num_envs: auto`` chooses: enough that the emulators' threads rarely wait for the slowest,
and on a GPU that the wait for its actions, which hardly grows with N, is short compared with a step."""
COPIES_OF_WEIGHTS = 8
"""Network, target network, gradient, two moments, and copies while a checkpoint is written."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Features of a processor, in Linux's words, that decide how fast each precision is."""

Precision = Literal["float32", "tf32", "bfloat16"]


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [value for value in (_meminfo(), _cgroup()) if value is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _cgroup() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return None if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class MemoryPlan:
    """The most bytes that a run will need, by the configuration key on which they depend."""

    on_device: dict[str, int]
    on_host: dict[str, int]

    @property
    def replay_on_host(self) -> bool:
        """Whether the replay was moved to host memory, see :func:`place_replay`."""
        return "replay_capacity" in self.on_host

    @property
    def working_bytes(self) -> int:
        """Everything but the replay."""
        replay = (self.on_host if self.replay_on_host else self.on_device)["replay_capacity"]
        return sum(self.on_device.values()) + sum(self.on_host.values()) - replay


def plan_memory(config: TrainConfig, replay_bytes: int, parameters: int) -> MemoryPlan:
    """Estimate the memory of a run.

    Args:
        config: of the run.
        replay_bytes: of its replay.
        parameters: approximate number of its network.
    """
    on_device = {
        "replay_capacity": replay_bytes,
        "batch_size": config.batch_size * TRANSITION_BYTES,
        "init_samples": config.init_samples * INIT_SAMPLE_BYTES if config.data_dependent_init else 0,
        "hidden_units": parameters * 4 * COPIES_OF_WEIGHTS,
    }
    on_host = {
        "num_envs": config.num_envs * EMULATOR_BYTES,
        "evaluation_envs": config.evaluation_envs * EMULATOR_BYTES,
    }
    return MemoryPlan(on_device, on_host)


def place_replay(plan: MemoryPlan, free: int | None) -> MemoryPlan:
    """Return the plan of a run on a GPU with the replay in host memory, if only the replay does not fit on the GPU.

    Args:
        plan: with the replay on the device.
        free: bytes that can still be allocated on the GPU; None: not known, so nothing is moved.
    """
    needed = sum(plan.on_device.values()) + CONTEXT_BYTES
    replay = plan.on_device["replay_capacity"]
    if free is None or needed <= free or needed - replay > free:
        return plan
    on_device = {key: value for key, value in plan.on_device.items() if key != "replay_capacity"}
    return MemoryPlan(on_device, plan.on_host | {"replay_capacity": replay})


def check_memory(config: TrainConfig, plan: MemoryPlan, device: torch.device) -> None:
    """Refuse a run that does not fit in memory.

    Raises:
        WnRlError: it needs more than is free; the message names the key that needs most, and what would fit.
    """
    if device.type == "cuda":
        _check_fits(config, plan.on_device, device, CONTEXT_BYTES)
        _check_fits(config, plan.on_host, torch.device("cpu"), LIBRARY_BYTES)
    else:
        _check_fits(config, plan.on_device | plan.on_host, device, LIBRARY_BYTES)


def _check_fits(config: TrainConfig, needs: dict[str, int], device: torch.device, fixed: int) -> None:
    free = free_bytes(device)
    if free is None or sum(needs.values()) + fixed <= free:
        return
    key = max(needs, key=lambda name: needs[name])
    value = int(getattr(config, key))
    whole = sum(needs.values()) + fixed
    room = free - whole + needs[key]
    told = (
        f"this run needs {amount(whole)} of memory on {device.type}, and {amount(free)} are free; its largest part is "
        f"{amount(needs[key])} for {key} {value:,}, and {amount(fixed)} are for Python and its libraries"
    )
    if room <= 0:
        raise WnRlError(f"{told}: no {key} would fit; free some memory, or wait until it is free")
    flag = f"--{key.replace('_', '-')}"
    raise WnRlError(f"{told}: lower {flag} (about {int(room / needs[key] * value):,} would fit), or free some memory")


def amount(size: float) -> str:
    """Return a number of bytes in a readable unit: ``7.1 GB``, ``12.8 MB``, ``400 kB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.95 * scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def pick_device(wanted: str) -> Literal["cpu", "cuda"]:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        UsageError: a GPU was requested and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu or auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_device(config: TrainConfig) -> TrainConfig:
    """Return the configuration with ``device``, ``precision``, ``compile`` and ``num_envs`` decided by this machine.

    ``precision: auto`` becomes the first of :func:`precisions`; whether another one is faster is known when it was
    timed, see ``agents.backends.choice``.

    Raises:
        UsageError: a GPU, TF32 or a compiled step was asked for and cannot be had here, or a key does not fit the
            number of emulators.
    """
    device = pick_device(config.device)
    precision = precisions(config, device)[0]
    if precision == "tf32" and device == "cpu":
        raise UsageError("--precision tf32 needs a GPU; use --precision float32 or auto")
    num_envs = choose_num_envs(config, cores(), device) if is_auto(config.num_envs) else config.num_envs
    compiles = _resolve_compile(config, device)
    resolved = replace(config, device=device, precision=precision, compile=compiles, num_envs=num_envs)
    validate(resolved)  # the values of auto must fit the other keys
    return resolved


def precisions(config: TrainConfig, device: str) -> tuple[Precision, ...]:
    """Return what the key ``precision`` may stand for on ``device``, the one that is taken without timing first.

    ``auto`` is bfloat16 on a GPU that computes in it. On a CPU it is float32, or bfloat16 where the processor
    multiplies in it: what that brings differs too much between processors to be known without timing.
    """
    if config.precision != "auto":
        return (config.precision,)
    if device == "cuda":
        return ("bfloat16",) if _computes_in_bfloat16(device) else ("float32",)
    return ("float32", "bfloat16") if _computes_in_bfloat16(device) else ("float32",)


def _computes_in_bfloat16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_num_envs(config: TrainConfig, usable_cores: int, device: Literal["cpu", "cuda"]) -> int:
    """Return the value of ``num_envs: auto``: :data:`ENVS_PER_CORE` for each core, at most :data:`MOST_ENVS`.

    Fewer if the replay or the random play before the first update would be shorter than one vector step.

    Args:
        config: its replay and ``learning_starts``.
        usable_cores: that may step emulators.
        device: where the network is.
    """
    wanted = min(ENVS_PER_CORE[device] * usable_cores, MOST_ENVS[device])
    return max(min(wanted, config.replay_capacity, config.learning_starts - 1), 1)


def describe_num_envs(config: TrainConfig) -> str:
    """Return one line on what ``num_envs: auto`` chose and why; ``config`` is resolved."""
    each, most = ENVS_PER_CORE[config.device], MOST_ENVS[config.device]
    return (
        f"num_envs auto: {config.num_envs} emulators, since there are {cores()} cores ({each} a core with the network "
        f"on {config.device}, {most} at most, and fewer than learning_starts); --num-envs {config.num_envs} repeats it"
    )


def set_float32_precision(precision: str) -> None:
    """Allow TF32 on GPUs if ``precision`` is ``tf32``, and only then.

    By default torch allows it in convolutions and not in matrix products. The setting is global in the process.
    """
    with warnings.catch_warnings():
        # Some versions from torch 2.9 on, on a CPU too, advise another way of setting it, which 2.8 does not have.
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _resolve_compile(config: TrainConfig, device: str) -> Literal["on", "off"]:
    if device == "cuda":
        # Compilers as triton looks for them.
        can = importlib.util.find_spec("triton") is not None and _found("CC", "gcc", "clang")
        needs, pays = "on a GPU it needs the package triton and a C compiler", config.frames >= WORTH_COMPILING_FRAMES
    else:
        can = config.optimizer == "adamax" and _found("CXX", "g++", "clang++")
        needs = "on a CPU it needs --optimizer adamax and a C++ compiler"
        pays = network_spec(config, 1).count_parameters() >= WORTH_COMPILING
    if config.compile == "on" and not can:
        raise UsageError(f"--compile on: {needs}; use --compile auto")
    return "on" if config.compile == "on" or (config.compile == "auto" and can and pays) else "off"


def _found(variable: str, *commands: str) -> bool:
    """Return whether one of the compilers, or the one that the environment names, is installed."""
    return any(shutil.which(name) for name in (os.environ.get(variable, ""), *commands) if name)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_others(seconds: float = 0.1) -> float:
    """Return how many of :func:`cores` other processes use, looking for so long; 0.0 where the system does not tell.

    This process must do nothing meanwhile.
    """
    before = _busy_and_all()
    time.sleep(seconds)
    after = _busy_and_all()
    busy, whole = after[0] - before[0], after[1] - before[1]
    return cores() * busy / whole if whole > 0 else 0.0


def _busy_and_all() -> tuple[int, int]:
    """Return the clock ticks in which the cores that this process may use were busy, and all of their ticks."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    busy = whole = 0
    try:
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            name, *words = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in usable:
                ticks = [int(word) for word in words[:8]]  # user, nice, system, idle, iowait, irq, softirq, steal
                whole += sum(ticks)
                busy += sum(ticks) - ticks[3] - ticks[4]
    except (OSError, ValueError, IndexError):
        return 0, 0
    return busy, whole


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next allocation; returns whether this C library can.

    By default it returns them to the kernel, and the page faults of allocating them again, hundreds of times an update,
    took a fifth to a third of an update on a CPU in measurements.
    """
    largest_block, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(largest_block, 32 << 20)) and bool(mallopt(trim_threshold, 2**31 - 1))


def device_name(device: torch.device) -> str:
    """Return the name of the hardware, for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpuinfo('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def processor(device: torch.device) -> str:
    """Return what computes: the GPU's name, or the processor's with those of :data:`FEATURES` that it has.

    Where it changes, so may the rounding of a run's arithmetic, and the speed of each precision.
    """
    if device.type == "cuda":
        return device_name(device)
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return " ".join([name, *(f"+{feature}" for feature in FEATURES if feature in flags)])


def _cpuinfo(key: str) -> str:
    """Return the first value of ``key`` in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
