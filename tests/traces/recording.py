"""Runs of the real loop on real emulators whose actions are scripted, so that nothing depends on floating point."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.backends import make_backend
from wn_rl.atari.action_log import Mark, read_history
from wn_rl.atari.env import AtariVector
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.diagnostics import OVERESTIMATION
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.replay import Minibatch, Replay
from wn_rl.report.run_data import read_scalars
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, read_rows
from wn_rl.training import Agent, Statistics
from wn_rl.training.run import Run
from wn_rl.training.session import train

EXPECTED = Path(__file__).with_name("expected.json")
ALL_RUNS: dict[str, Any] = {
    "param": "standard",
    "device": "cpu",
    "num_threads": 1,
    "hidden_units": 4,
    "precision": "float32",
    "learning_starts": 60,
    "update_period": 4,
    "target_period": 50,
    "replay_capacity": 100,
    "epsilon_decay_steps": 150,
    "batch_size": 4,
    "init_samples": 8,
    "log_period": 70,
    "evaluation_period": 130,
    "evaluation_episodes": 1,
    "evaluation_envs": 1,
    "max_frames_per_episode": 800,
    "checkpoint_period": 90,
    "checkpoint_seconds": 1e9,
}
RUNS: dict[str, dict[str, Any]] = {
    "Breakout, 1 emulator": {"game": "Breakout", "num_envs": 1, "frames": 1440},
    "Breakout, 8 emulators": {
        "game": "Breakout",
        "num_envs": 8,
        "frames": 4800,
        "target_period": 30,
        "replay_capacity": 330,
        "evaluation_period": 800,
        "checkpoint_period": 350,
        "log_period": 250,
    },
    "Asterix, 2 emulators, sticky and all actions, truncated episodes, a lost life is no terminal": {
        "game": "Asterix",
        "num_envs": 2,
        "frames": 1800,
        "sticky_actions": 0.25,
        "full_action_set": True,
        "reseed_period": 300,
        "life_loss_terminal": False,
        "max_frames_per_episode": 360,
        "evaluation_period": 240,
    },
    "Pong, 2 emulators, FIRE at the start, an update at every agent step": {
        "game": "Pong",
        "num_envs": 2,
        "frames": 1000,
        "fire_reset": True,
        "update_period": 1,
        "target_period": 7,
        "replay_capacity": 160,
        "max_frames_per_episode": 360,
    },
}
"""Configuration keys by the run's name, beside :data:`ALL_RUNS`."""

Trace = dict[str, Any]


def configured(name: str) -> TrainConfig:
    """Return the configuration of a run of :data:`RUNS`."""
    return resolve(replace(load("quick"), **(ALL_RUNS | RUNS[name])))


def scripted_action(call: int, slot: int, num_actions: int) -> int:
    """Return the action of an emulator in the ``call``-th forward pass for acting: mixed, the same everywhere."""
    return zlib.crc32(f"{call} {slot}".encode()) % num_actions


def sha(*tensors: Tensor | NDArray[Any]) -> str:
    """Return the first 16 digits of SHA-256 of all values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()[:16]


def rounded(value: float) -> float:
    """Return a scalar as a float32 has it, to six digits."""
    return float(f"{np.float32(value):.6g}")


class Recorder:
    """Notes what happens in a run, in order, each event with the number of agent steps sent to the emulators so far."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.events: list[str] = []
        self.epsilon: dict[int, float] = {}
        self.minibatches: list[dict[str, list[Any]]] = []
        self.acted_on: list[str] = []
        self.initialized_from: list[str] = []
        self.learned_from: list[str] = []
        self.replay: Replay | None = None
        self._steps = 0
        self._ended: NDArray[np.bool_] | None = None
        self._evaluating = False

    def note(self, event: str) -> None:
        """Note an event."""
        self.events.append(f"{event} at agent step {self._steps:,}")

    def acts(self, observations: Tensor, epsilon: NDArray[np.float32]) -> None:
        """Note a choice of actions: what was seen, and ε of each emulator that plays."""
        self.note("act")
        self.acted_on.append(sha(observations))
        plays = np.ones(len(epsilon), bool) if self._ended is None else ~self._ended
        for number, value in enumerate(epsilon[plays], self._steps + 1):
            self.epsilon[number] = rounded(value)

    def updates(self, batch: Minibatch) -> None:
        """Note an update and its minibatch."""
        assert batch.indices is not None
        self.note("update")
        self.learned_from.append(sha(batch.observations, batch.next_observations))
        self.minibatches.append(
            {
                "indices": batch.indices.tolist(),
                "actions": batch.actions.tolist(),
                "rewards": batch.rewards.tolist(),
                "terminals": batch.terminals.int().tolist(),
            }
        )

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note what an agent is not told: emulators, replay, evaluations, checkpoints."""
        recorder = self
        send, receive, store = AtariVector.send, AtariVector.recv, Replay.add
        evaluate, save = Run.evaluate, checkpoint.save

        def noted_send(self: AtariVector, actions: NDArray[Any]) -> None:
            if not recorder._evaluating:
                recorder._steps += self.num_envs if recorder._ended is None else int((~recorder._ended).sum())
                recorder.note("send")
            send(self, actions)

        def noted_receive(self: AtariVector) -> Any:
            found = receive(self)
            if not recorder._evaluating:
                recorder.note("receive")
                recorder._ended = found[2] | found[3]
            return found

        def noted_store(self: Replay, *arguments: Any) -> None:
            recorder.note("store")
            store(self, *arguments)

        def noted_evaluate(self: Run, *arguments: Any) -> Any:
            recorder.note("evaluate")
            recorder._evaluating = True
            try:
                return evaluate(self, *arguments)
            finally:
                recorder._evaluating = False

        def noted_save(path: Path, **parts: Any) -> None:
            recorder.note(f"checkpoint {path.name}")
            save(path, **parts)

        with contextlib.ExitStack() as stack:
            for owner, name, noted in (
                (AtariVector, "send", noted_send),
                (AtariVector, "recv", noted_receive),
                (Replay, "add", noted_store),
                (Run, "evaluate", noted_evaluate),
                (checkpoint, "save", noted_save),
            ):
                stack.enter_context(mock.patch.object(owner, name, noted))
            yield


class ScriptedAgent:
    """An agent from scratch that plays a script and learns nothing; what it reports is made of whole numbers.

    The loss is the mean raw reward in the minibatches, the TD error the share of terminals, the Q-value the mean
    action; a greedy action has the Q-value 1 + updates, and the norm of the gradient is the number of updates since the
    last target copy.
    """

    def __init__(self, config: TrainConfig, num_actions: int, device: torch.device, recorder: Recorder) -> None:
        """Join the script and the recorder."""
        self.config, self.device, self.recorder = config, device, recorder
        assert config.weight_init is not None
        spec = QNetworkSpec(num_actions, hidden_units=config.hidden_units, weight_init=config.weight_init)
        self.q_network = build_q_network(spec, seed=0)
        self.num_actions = num_actions
        self.updates = self.updates_at_copy = self.acted = self.asked = 0
        self._unread: list[Tensor] = []

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        self.recorder.acts(observations, epsilon)
        self.acted += 1
        return torch.tensor([scripted_action(self.acted, i, self.num_actions) for i in range(len(observations))])

    def q_values(self, observations: Tensor) -> Tensor:
        self.asked += 1
        found = torch.zeros(len(observations), self.num_actions)
        for slot, row in enumerate(found):
            row[scripted_action(self.asked, slot, self.num_actions)] = 1 + self.updates
        return found

    def initialize(self, observations: Tensor) -> None:
        self.recorder.note("initialize")
        self.recorder.initialized_from.append(sha(observations))

    def update(self, batch: Minibatch) -> None:
        self.recorder.updates(batch)
        self._unread.append(torch.stack([batch.rewards, batch.terminals, batch.actions]).double())
        self.updates += 1

    def copy_target(self) -> None:
        self.recorder.note("target copy")
        self.updates_at_copy = self.updates

    def is_finite(self) -> bool:
        return True

    def offending_transitions(self) -> Tensor | None:
        return None

    def gradient_norm(self) -> float:
        return float(self.updates - self.updates_at_copy) if self.updates else math.nan

    def read_statistics(self) -> Statistics:
        self.recorder.note("log")
        unread, self._unread = self._unread, []
        if not unread:
            return Statistics(0, math.nan, math.nan, math.nan)
        return Statistics(len(unread), *torch.cat(unread, 1).mean(1).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "acted": self.acted, "asked": self.asked}

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def record(config: TrainConfig, directory: Path) -> Trace:
    """Train with the script in a new ``directory`` and return what happened."""
    recorder = Recorder()

    def backend(agent: Agent, replay: Replay) -> Any:
        recorder.replay = replay
        return make_backend(agent, replay)

    with recorder.listening():
        code = train(
            config,
            lambda *arguments: ScriptedAgent(*arguments, recorder),
            directory,
            quiet=True,
            make_backend=backend,
        )
    assert code == 0
    assert recorder.replay is not None
    first, end = recorder.replay.index_range
    held = recorder.replay.transitions(torch.arange(first, end))
    saved = checkpoint.load(directory)
    files = RunDirectory(directory)
    mark = Mark.of(saved.training["loop"], config.num_envs)
    reseed_period = config.reseed_period if config.sticky_actions else 0
    rows = read_history(files.action_log, config.num_envs, reseed_period, mark).rows
    summary = json.loads(files.summary.read_text(encoding="utf-8"))
    scalars = {
        tag: {int(x): rounded(y) for x, y in zip(curve.frames, curve.values, strict=True)}
        for tag, curve in sorted(read_scalars(directory).items())
        if tag.startswith(("train/", "evaluation/", "summary/")) or tag == OVERESTIMATION
    }
    return {
        "events": recorder.events,
        "epsilon": recorder.epsilon,
        "action log": rows.tolist(),
        "minibatches": recorder.minibatches,
        "replay": {
            "first index": first,
            "end": end,
            "actions": held.actions.tolist(),
            "rewards": held.rewards.tolist(),
            "terminals": held.terminals.int().tolist(),
        },
        "frames": {
            "acted on": recorder.acted_on,
            "initialized from": recorder.initialized_from,
            "learned from": recorder.learned_from,
            "in replay": sha(held.observations, held.next_observations),
            "checksum of the replay": saved.training["replay"]["checksum"][:16],
        },
        "episodes.csv": numbers(read_rows(files.episodes)),
        "evaluations.csv": numbers(read_rows(files.evaluations)),
        "tensorboard": scalars,
        "summary": {key: summary[key] for key in ("frames", "agent_steps", "updates", "finished")},
    }


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the rows of a CSV file without wall times."""
    return [{key: rounded(float(value)) for key, value in row.items() if key != "seconds"} for row in rows]


def record_named(name: str) -> Trace:
    """Return the trace of a run of :data:`RUNS`."""
    with tempfile.TemporaryDirectory() as scratch:
        return record(configured(name), Path(scratch) / "run")


# --- what is kept ----------------------------------------------------------------------------------


def shortened(trace: Trace) -> Trace:
    """Return a trace as it is kept: long lists as their hash and a few values that a reader can check."""
    found = {"vector steps": list(vector_steps(trace["events"]))} | trace
    del found["events"]
    epsilon, last = trace["epsilon"], max(trace["epsilon"])
    found["epsilon"] = {"sha256": sha_of(epsilon)} | {
        f"{step:,}": epsilon[step] for step in (1, *range(30, 241, 30), last)
    }
    rows = trace["action log"]
    found["action log"] = {
        "vector steps": len(rows),
        "sha256": sha(np.array(rows, np.uint8)),
        "first": rows[:3],
        "auto-resets (vector step, emulator)": [[i, j] for i, row in enumerate(rows) for j in where(row, 255)],
        "re-seeded (vector step, emulator)": [[i, j] for i, row in enumerate(rows) for j in where(row, 254)],
    }
    found["minibatches"] = {
        "sha256": sha_of(trace["minibatches"]),
        "first": trace["minibatches"][0],
        "last": trace["minibatches"][-1],
    }
    replay = trace["replay"]
    points = [[index, reward] for index, reward in enumerate(replay["rewards"], replay["first index"]) if reward]
    found["replay"] = {
        "first index": replay["first index"],
        "end": replay["end"],
        "actions, sha256": sha_of(replay["actions"]),
        "rewards that are not 0 (index, points)": points,
        "terminals (indices)": [replay["first index"] + i for i in where(replay["terminals"], 1)],
    }
    found["frames"] = {
        key: value if isinstance(value, str) else sha_of(value) for key, value in trace["frames"].items()
    }
    return json.loads(json.dumps(found))


def where(values: Sequence[int], wanted: int) -> list[int]:
    """Return where in ``values`` ``wanted`` stands."""
    return [index for index, value in enumerate(values) if value == wanted]


def sha_of(values: Any) -> str:
    """Return the first 16 digits of SHA-256 of what JSON can write."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def vector_steps(events: Sequence[str]) -> Iterator[str]:
    """Yield a line per vector step, or per several that follow each other and hold the same events.

    ``61–63 (3): act, send, receive, store``: three vector steps, up to the last agent step of each.
    """
    lines: list[tuple[list[str], list[str]]] = []
    for event in events:
        kind, _, step = event.partition(" at agent step ")
        if kind == "act" or not lines:
            lines.append(([], []))
        lines[-1][0].append(kind)
        lines[-1][1].append(step)
    index = 0
    while index < len(lines):
        kinds, first = lines[index][0], lines[index][1][-1]
        count = 1
        while index + count < len(lines) and lines[index + count][0] == kinds:
            count += 1
        index += count
        label = first if count == 1 else f"{first}–{lines[index - 1][1][-1]} ({count})"
        yield f"{label}: {', '.join(kinds)}"


def where_recorded() -> dict[str, str]:
    """Return what frames depend on beside the script: the emulators, and how a processor rounds when it resizes."""
    return {"ale-py": metadata.version("ale-py"), "machine": platform.machine()}


# --- what differs -------------------------------------------------------------------------------------------------


def first_difference(found: Any, expected: Any, place: str = "") -> str:
    """Return in words what differs first between two traces, an empty text if nothing does."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            here = f"{place}, {key}" if place else str(key)
            if key not in found or key not in expected:
                return f"{here}: {'missing' if key in expected else 'nothing like it was expected'}"
            if told := first_difference(found[key], expected[key], here):
                return told
        return ""
    if isinstance(found, list) and isinstance(expected, list):
        names = {"events": "event", "vector steps": "vector steps, line", "action log": "action log, vector step"}
        one = names.get(place, f"{place}, number")
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
            if told := first_difference(ours, theirs, f"{one} {index:,}"):
                return told
        if len(found) != len(expected):
            shorter, longer = sorted((found, expected), key=len)
            more = "found, and nothing expected" if longer is found else "expected, and nothing found"
            return f"{one} {len(shorter):,}: {longer[len(shorter)]!r} {more}"
        return ""
    return "" if found == expected else f"{place}: {found}, expected {expected}"
