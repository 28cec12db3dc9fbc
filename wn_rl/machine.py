"""What this machine has: device, precision, memory, and how to use its memory well."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from wn_rl.config import TrainConfig
from wn_rl.errors import UsageError, WnRlError

WORKING_BYTES = 1_500_000_000
"""Host memory beside the replay: libraries, emulators, network, optimizer (1.1 GB was seen with 16 emulators)."""


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``; None where the system does not tell."""
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


def check_replay_fits(replay_bytes: int, capacity: int, device: torch.device) -> None:
    """Refuse a replay that does not fit.

    Raises:
        WnRlError: it needs more than is free; the message says which capacity would fit.
    """
    free = free_bytes(device)
    if free is None:
        return
    room = free - (WORKING_BYTES if device.type == "cpu" else WORKING_BYTES // 3)
    if replay_bytes > room:
        fits = max(int(room / replay_bytes * capacity), 0)
        raise WnRlError(
            f"the replay of {capacity:,} agent steps needs {replay_bytes / 1e9:.1f} GB, and "
            f"{max(room, 0) / 1e9:.1f} GB are left for it on {device.type}: "
            f"lower --replay-capacity (about {fits:,} would fit)"
        )


def pick_device(wanted: str) -> Literal["cpu", "cuda"]:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        UsageError: a GPU was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu or auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_device(config: TrainConfig) -> TrainConfig:
    """Return the configuration with ``device`` and ``precision`` decided by this machine.

    Raises:
        UsageError: a GPU was asked for and there is none.
    """
    device = pick_device(config.device)
    precision = config.precision
    if precision == "auto":
        fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        precision = "bfloat16" if fast else "float32"
    return replace(config, device=device, precision=precision)


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next allocation; returns whether this C library can.

    By default it hands them back to the kernel, and the page faults of fetching them anew, hundreds of times an update,
    were seen to cost a fifth to a third of an update on a CPU.
    """
    largest_block, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(largest_block, 32 << 20)) and bool(mallopt(trim_threshold, 2**31 - 1))


def device_name(device: torch.device) -> str:
    """Return what the hardware calls itself, for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
