"""Damage checkpoints in many ways and load each in a process of its own: used by test_untrusted.py.

``python tests/mutated_checkpoints.py FIRST COUNT CHECKPOINT …`` prints a line of JSON per mutant: its number, what
was done to it, the outcome, the CPU seconds of loading and the memory above an idle process. Mutant K is a function of
K and of the checkpoints. Outcomes: ``error`` (one clear line), ``same`` (the content of the checkpoint it was made
from), ``as written`` (sums were recomputed, and what was loaded is what the files hold); all others are failures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from agents.dqn import DQN
from wn_rl.errors import WnRlError
from wn_rl.runs import checkpoint

JSON, MODEL, TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 65_536, 2**63, 10**30, -0.0, 0.5, -1e9, 1e308, "", "x", "nan", "1e999",
    "../../etc/passwd", "a\nb\x1b[2J", "9" * 5000, "y" * 100_000, [], [[]], [1, 2, 3], {}, {"a": 1}, [0] * 1000,
    [[4096, 1, 1]] * 64, "os:system", "wn", "bn", "standard",
]  # fmt: skip
"""Values that take the place of others."""
TOKENS = [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"[" * 30_000, b'{"a":' * 5000, b"9" * 5000, b'"\xff\xfe"', b""]
"""Bytes that take the place of a value and need not be JSON."""


def mutate(directory: Path, number: int) -> str:
    """Damage the checkpoint in ``directory``; returns what was done."""
    rng = random.Random(number)
    done = [rng.choice(MUTATIONS)(directory, rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    if number // 2 % 2:
        done.append(recompute(directory))
    return "; ".join(done)


def bits_flipped(directory: Path, rng: random.Random) -> str:
    file = some_file(directory, rng)
    data = bytearray(file.read_bytes())
    count = min(rng.choice([1, 1, 2, 8]), 8 * len(data))
    head = rng.random() < 0.5  # where names and sizes stand
    for _ in range(count):
        place = rng.randrange(min(len(data), 600) if head else len(data))
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{count} bits of {file.name} flipped"


def cut(directory: Path, rng: random.Random) -> str:
    file = some_file(directory, rng)
    data = file.read_bytes()
    length = rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data) + 1)])
    file.write_bytes(data[:length])
    return f"{file.name} cut to {length}"


def bytes_moved(directory: Path, rng: random.Random) -> str:
    file = some_file(directory, rng)
    data = bytearray(file.read_bytes())
    start, size = rng.randrange(len(data) + 1), rng.randrange(1, 200)
    kind = rng.choice(["removed", "repeated", "zeroed", "appended"])
    if kind == "removed":
        del data[start : start + size]
    elif kind == "repeated":
        data[start:start] = data[start : start + size]
    elif kind == "zeroed":
        data[start : start + size] = bytes(len(data[start : start + size]))
    else:
        data += rng.randbytes(size)
    file.write_bytes(data)
    return f"{size} bytes of {file.name} {kind}"


def no_file(directory: Path, rng: random.Random) -> str:
    file = some_file(directory, rng)
    others = sorted(other for other in directory.iterdir() if other != file and other.is_file())
    kind = rng.choice(["missing", "directory", "pipe", "device", "circle", "huge", "another", "link"])
    moved = directory.with_name(f"{directory.name}-{file.name}")
    shutil.copy(file, moved)
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to(rng.choice(["/dev/zero", "/dev/full", "/dev/stdin"]))
    elif kind == "circle":
        file.symlink_to(file)
    elif kind == "huge":  # a file of zeros that takes no room on disk, behind what was there
        shutil.copy(moved, file)
        os.truncate(file, rng.choice([2**27, 2**33, 2**40]))
    elif kind == "another" and others:
        shutil.copy(rng.choice(others), file)
    elif kind == "link":
        file.symlink_to(moved)
    return f"{file.name}: {kind}"


def json_changed(directory: Path, rng: random.Random) -> str:
    try:
        content = described(directory)
    except ValueError:
        return "nothing"
    places = list(nodes(content))
    if not places:
        return "nothing"
    inside, key = rng.choice(places)
    kind = rng.choice(["deleted", "renamed", "replaced", "replaced", "token", "swapped", "added", "twice", "scaled"])
    if kind == "deleted":
        del inside[key]
    elif kind == "renamed" and isinstance(inside, dict):
        inside[rng.choice([f"{key}x", "", f"{key}/a", "a/" * 50, "agent", "é\n"])] = inside.pop(key)
    elif kind == "replaced":
        inside[key] = rng.choice(ODD_VALUES)
    elif kind == "swapped":
        other, its_key = rng.choice(places)
        inside[key], other[its_key] = json.loads(json.dumps([other[its_key], inside[key]]))
    elif kind == "added" and isinstance(inside, dict):
        inside[rng.choice(["extra", "agent/x", "agent/optimizer/0/step", "a/b/c", "sha256"])] = rng.choice(ODD_VALUES)
    elif kind == "scaled" and type(inside[key]) in (int, float):
        inside[key] *= rng.choice([-1, 2, 1000, 10**9, 0.5])
    elif kind in ("token", "twice"):
        inside[key] = "MARKED"
        raw = json.dumps(content).encode()
        token = rng.choice(TOKENS) if kind == "token" else b'1, "twice": 1, "twice": 2'
        (directory / JSON).write_bytes(raw.replace(b'"MARKED"', token))
        return f"checkpoint.json {key}: {kind} {token[:20]!r}"
    (directory / JSON).write_text(json.dumps(content))
    return f"checkpoint.json {str(key)[:40]}: {kind}"


def small(file: Path) -> bytes:
    """Return the bytes of a file that is one still, and of no claimed size."""
    if not file.is_file() or file.stat().st_size >= 2**24:
        raise ValueError(f"{file} was made something else")
    return file.read_bytes()


def described(directory: Path) -> Any:
    """Return the content of checkpoint.json; a ValueError where it is none any more."""
    try:
        return json.loads(small(directory / JSON))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def nodes(content: Any) -> Any:
    """Yield (container, key) of everything in nested JSON."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def huge_network(directory: Path, rng: random.Random) -> str:
    """Claim a larger network in the spec, or in spec and configuration."""
    try:
        content = described(directory)
        units = rng.choice([65_536, 20_000, 9, 2**40])
        content["network"]["hidden_units"] = units
        if rng.random() < 0.7:
            content["config"]["hidden_units"] = units
        if rng.random() < 0.3:
            content["network"]["convolutions"] = [[rng.choice([4096, 512]), 1, 1]] * rng.choice([1, 3, 64])
    except (ValueError, KeyError, TypeError):
        return "nothing"
    (directory / JSON).write_text(json.dumps(content))
    return f"checkpoint.json: {units} hidden units"


def header_changed(directory: Path, rng: random.Random) -> str:
    file = directory / rng.choice([MODEL, TRAINING])
    try:
        data = small(file)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        name = rng.choice([key for key in header if key != "__metadata__"])
    except (OSError, ValueError, struct.error, IndexError):
        return "nothing"
    body = bytearray(data[8 + length :])
    entry = header[name]
    kind = rng.choice(["renamed", "deleted", "dtype", "shape", "huge", "offsets", "length", "values", "swapped", "odd"])
    if kind == "renamed":
        header[rng.choice([f"{name}x", "", "agent", f"{name}/a", "agent/updates", "a/" * 50, "\n"])] = header.pop(name)
    elif kind == "deleted":
        del header[name]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "nonsense", 5])
    elif kind == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], [0], [-1], "x"])
    elif kind == "huge":
        size = rng.choice([2**20, 2**32, 2**62, 2**64])
        entry["shape"], entry["data_offsets"] = [size], [0, rng.choice([4 * size, len(body)])]
    elif kind == "offsets":
        entry["data_offsets"] = [offset + rng.choice([-4, 4, 2**40]) for offset in entry["data_offsets"]]
    elif kind == "values" and body:
        place = rng.randrange(len(body) // 4) * 4
        body[place : place + 4] = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\0\0"])
    elif kind == "swapped":
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == "odd":
        header[name] = rng.choice(ODD_VALUES)
    new = json.dumps(header).encode()
    claimed = rng.choice([0, 1, 2**20, 2**40, 2**63]) if kind == "length" else len(new)
    file.write_bytes(struct.pack("<Q", claimed) + new + body)
    return f"header of {file.name}, {name[:40]}: {kind}"


def recompute(directory: Path) -> str:
    """Make every checksum right again, so that the checks behind are reached."""
    try:
        content = described(directory)
        for name in (MODEL, TRAINING):
            with contextlib.suppress(ValueError):
                content["sha256"][name] = hashlib.sha256(small(directory / name)).hexdigest()
        (directory / JSON).write_text(json.dumps(checkpoint.seal(content)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "sums left"
    return "sums recomputed"


def some_file(directory: Path, rng: random.Random) -> Path:
    there = sorted(file for file in directory.iterdir() if file.is_file() and 0 < file.stat().st_size < 2**24)
    if not there:
        (directory / JSON).unlink(missing_ok=True) if not (directory / JSON).is_dir() else None
        (directory / "x").write_text("x")
        return directory / "x"
    return rng.choice(there)


MUTATIONS: list[Callable[[Path, random.Random], str]] = [
    bits_flipped, bits_flipped, cut, bytes_moved, no_file, json_changed, json_changed, json_changed, huge_network,
    header_changed, header_changed, header_changed,
]  # fmt: skip


def outcome(directory: Path, original: checkpoint.Checkpoint, recomputed: bool) -> tuple[str, str]:
    """Load, build and restore; returns the outcome and the error's line."""
    try:
        saved = checkpoint.load(directory)
        network = saved.q_network()
        with torch.no_grad():
            network(torch.zeros(1, *saved.spec.observation_shape, dtype=torch.uint8))
        agent = DQN(saved.config, saved.spec.num_actions, torch.device("cpu"))
        parameters = list(agent.q_network.parameters())
        checkpoint.check_state(saved.training, {**saved.training, "agent": agent.state_dict()}, parameters)
        agent.load_state_dict(saved.weights, saved.training["agent"])
    except WnRlError as error:
        line = str(error)
        clear = "\n" not in line and line.isprintable() and len(line) < 1000
        return ("error" if clear else "unclear"), line
    if same(saved, original):
        return "same", ""
    return ("as written" if recomputed and as_written(directory, saved) else "different"), ""


def same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> bool:
    return (
        one.config == other.config
        and one.spec == other.spec
        and one.agent_steps == other.agent_steps
        and equal(one.weights, other.weights)
        and equal(one.training, other.training)
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def as_written(directory: Path, saved: checkpoint.Checkpoint) -> bool:
    """Whether what was loaded is what json and safetensors' numpy reader find in the files."""
    content = json.loads((directory / JSON).read_text())
    config = asdict(saved.config)
    for key, value in content["config"].items():
        mine = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if mine != value and not (isinstance(value, str) and float(value) == mine):
            return False
    tensors, values = checkpoint.flatten(saved.training)
    for name, found in ((MODEL, saved.weights), (TRAINING, tensors)):
        written = load_file(directory / name)
        if written.keys() != found.keys() or not all(np.array_equal(written[k], found[k].numpy()) for k in found):
            return False
    return values == content["training"] and saved.agent_steps == content["agent_steps"]


def in_child(work: Callable[[], tuple[str, str]]) -> dict[str, Any]:
    """Do ``work`` in a fork of this process; returns outcome, message, CPU and wall seconds, and its peak memory."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            room = pages * resource.getpagesize() + 2**30
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            try:
                found, message = work()
            except BaseException:  # noqa: BLE001 - anything but a clean error is a failure to report
                found, message = "crash", traceback.format_exc()
            os.write(writer, json.dumps([found, message[-3000:]]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    found, message = json.loads(answer) if answer else ("killed", f"by signal {status & 127}")
    return {
        "outcome": found,
        "message": message,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - started,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def main(first: int, count: int, originals: list[Path]) -> None:
    torch.set_num_threads(1)
    loaded = [checkpoint.load(path) for path in originals]
    idle = in_child(lambda: ("idle", ""))["peak_bytes"]
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory(prefix="mutant") as place:
            directory = Path(place) / "c"
            base = number % len(originals)
            shutil.copytree(originals[base], directory)
            done = mutate(directory, number)
            recomputed = done.endswith("sums recomputed")
            report = in_child(lambda: outcome(directory, loaded[base], recomputed))  # noqa: B023 - called at once
        report["extra_bytes"] = report.pop("peak_bytes") - idle
        print(json.dumps({"number": number, "done": done, **report}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
