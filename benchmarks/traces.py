"""What short runs compute, recorded and compared: a change of structure must change no result.

``python benchmarks/traces.py --record FILE`` before the change, ``--compare FILE`` after it, on one machine, since the
hashes of weights differ between processors. It runs in any checkout that has ``train.py``, so the earlier code can be
recorded with this file from a second work tree.

Each run is a real one through ``train.py``: every parameterization, in float32 and bfloat16, with 1 and 8 emulators,
with the fastest backend and with plain torch. Kept are SHA-256 of every weight, of every tensor of the training state
(optimizer, target network, generators), and the rows of the CSV files. What no processor changes (which event when,
what is drawn and logged) is in the tests, ``tests/traces``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path.cwd()))

from wn_rl import cli
from wn_rl.config import TrainConfig
from wn_rl.errors import UsageError

PARAMETERIZATIONS = ("standard", "wn", "mean_only_bn", "wn_mean_only_bn", "bn", "ln", "sn", "wn_projected")
SHORT = {
    "game": "Breakout",
    "preset": "quick",
    "frames": 3600,
    "learning-starts": 400,
    "target-period": 200,
    "replay-capacity": 600,
    "evaluation-period": 450,
    "evaluation-episodes": 1,
    "evaluation-envs": 1,
    "max-frames-per-episode": 400,
    "log-period": 150,
    "init-samples": 64,
    "num-threads": 1,
    "epsilon-decay-steps": 300,
}
FLAGS = [word for flag, value in SHORT.items() for word in (f"--{flag}", str(value))]


def variants(quick: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield each run's name and flags."""
    has_backends = any(entry.name == "backend" for entry in fields(TrainConfig))
    plain = ["--backend", "eager", "--compile", "off"] if has_backends else ["--compile", "off"]
    for param in PARAMETERIZATIONS if not quick else ("standard", "wn", "bn"):
        for precision in ("float32", "bfloat16"):
            for num_envs in (1, 8):
                for backend, flags in (("fast", ["--compile", "on"]), ("eager", plain)):
                    shape = ["--precision", precision, "--num-envs", str(num_envs)]
                    yield f"{param} {precision} N={num_envs} {backend}", ["--param", param, *shape, *flags]


def sha(data: bytes) -> str:
    """Return the first 16 digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def trace(directory: Path) -> dict[str, Any]:
    """Return what a finished run left: hashes and the rows of its CSV files."""
    found: dict[str, Any] = {}
    tensors: list[str] = []
    for path in sorted((directory / "checkpoints" / "latest").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name).contiguous()
                digest = sha(bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes()))
                if path.name.startswith("model"):
                    found[f"weights {name}"] = digest
                elif value.numel() > 1 and "digest" not in name and "journal" not in name and "action_log" not in name:
                    tensors.append(f"{str(value.dtype)[6:]} {tuple(value.shape)} {digest}")
    found["training tensors"] = sorted(tensors)
    for name in ("episodes.csv", "evaluations.csv"):
        with (directory / name).open(newline="", encoding="utf-8") as file:
            rows = [{k: v for k, v in row.items() if k not in ("seconds",)} for row in csv.DictReader(file)]
        found[name] = rows
    return found


def collect(only: str, quick: bool) -> dict[str, Any]:
    """Make all runs; returns their traces by name."""
    import train

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in variants(quick):
            if only not in name:
                continue
            directory = Path(scratch) / name.replace(" ", "_")
            code = train.main([*FLAGS, *flags, "--run-dir", str(directory), "--quiet"])
            if code:
                raise SystemExit(f"{name}: exit code {code}")
            found[name] = trace(directory)
            print(name, flush=True)
    return found


@dataclass(frozen=True)
class Arguments:
    """Record what short runs compute, or compare it with a record."""

    record: str | None = None
    """Write the record to this file."""
    compare: str | None = None
    """Compare with the record in this file."""
    only: str = ""
    """Runs whose name holds this text, e.g. "wn bfloat16"."""
    quick: bool = False
    """standard, wn and bn alone."""


def main(words: Sequence[str]) -> int:
    """Run the command line; returns 1 where something differs."""
    arguments = cli.parse(Arguments, words)
    if (arguments.record is None) == (arguments.compare is None):
        raise UsageError("name one of --record FILE and --compare FILE")
    traces = collect(arguments.only, arguments.quick)
    if arguments.record is not None:
        Path(arguments.record).write_text(json.dumps(traces, indent=1), encoding="utf-8")
        return 0
    assert arguments.compare is not None
    before = json.loads(Path(arguments.compare).read_text(encoding="utf-8"))
    differ = 0
    for name, now in traces.items():
        keys = [key for key in sorted({*before[name], *now}) if before[name].get(key) != now.get(key)]
        if keys:
            differ += 1
            print(f"DIFFERS {name}: {', '.join(keys)[:300]}")
    print(f"{len(traces) - differ} of {len(traces)} runs are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    cli.run(main)
