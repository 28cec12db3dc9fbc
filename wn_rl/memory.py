"""How much memory this machine has left, so that a run can refuse before it allocates."""

from __future__ import annotations

from pathlib import Path

import torch

from wn_rl.errors import WnRlError

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
