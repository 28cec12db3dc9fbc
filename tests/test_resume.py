"""A run that was stopped at any moment and went on is the run that was never stopped."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.backends.cpu_kernels import loader
from agents.dqn import DQN
from tests.small_runs import Interrupted, event_file_clock, small_flags, stopped_run, tiny
from wn_rl.atari.action_log import Mark, read_history
from wn_rl.commands.train import main
from wn_rl.config import TrainConfig, to_yaml
from wn_rl.errors import CheckpointError, UsageError, WnRlError
from wn_rl.parameterizations import names
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory
from wn_rl.training import TrainingLoop
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train

ROOT = Path(__file__).resolve().parents[1]


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


def flat(state: Mapping[str, Any]) -> dict[str, Any]:
    tensors, values = checkpoint.flatten(state)
    return {key: value.tolist() for key, value in tensors.items()} | values


def state_of(directory: Path) -> dict[str, Any]:
    """Return everything that decides how a run goes on, and what it wrote so far."""
    saved = checkpoint.load(directory)
    state = flat(saved.training) | {name: weight.tolist() for name, weight in saved.weights.items()}
    ignored = {
        "run/seconds",
        "run/best/seconds",
        "run/final/seconds",
        "loop/action_log",
    }  # wall times; where chunks end
    return {key: value for key, value in state.items() if key not in ignored} | {
        "evaluations": rows(directory / "evaluations.csv"),
        "episodes": rows(directory / "episodes.csv"),
    }


def points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run as TensorBoard shows them, wall times aside."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def interrupted_run(directory: Path, config: TrainConfig, after: list[int]) -> None:
    """Train, stopped after each of these numbers of updates and resumed."""
    Interrupted.after = list(after)
    stops = 0
    with event_file_clock() as clock:
        code = train(config, Interrupted, directory, quiet=True)
        while code != 0:
            assert code == 143
            stops += 1
            clock.ahead += 1
            resumed, saved = open_for_resume(directory, {})
            code = train(resumed, Interrupted, directory, resume=saved, quiet=True)
    assert stops == len(after)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"param": "wn"}, marks=pytest.mark.slow),
        {"param": "wn", "num_envs": 1},
        {"param": "wn", "num_envs": 16, "precision": "bfloat16"},
        {"param": "wn", "sticky_actions": 0.25, "num_envs": 2, "action_log": "replay", "checkpoint_period": 60},
        pytest.param({"param": "standard", "optimizer": "rmsprop_mnih", "learning_rate": 1e-4}, marks=pytest.mark.slow),
        {"param": "wn", "compile": "on"},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_interrupted_is_as_never_interrupted(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    assert train(config, DQN, tmp_path / "whole", quiet=True) == 0
    interrupted_run(tmp_path / "parts", config, [1, 47, 52, 90])
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")
    whole, parts = points(tmp_path / "whole"), points(tmp_path / "parts")
    assert parts.keys() == whole.keys()
    for tag in whole:
        assert parts[tag] == whole[tag], tag


@pytest.mark.parametrize(
    "param",
    [
        pytest.param(name, marks=() if name in ("bn", "wn_projected") else pytest.mark.slow)
        for name in names()
        if name not in ("standard", "wn")
    ],
)
def test_every_parameterization_goes_on_exactly(tmp_path: Path, param: str) -> None:
    config = tiny(param=param, frames=1600)
    assert train(config, DQN, tmp_path / "whole", quiet=True) == 0
    interrupted_run(tmp_path / "parts", config, [31, 62])
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("ends_at", "changes"),
    [
        (1360, {}),  # 340 agent steps: an evaluation is due, a point is not
        pytest.param(1440, {}, marks=pytest.mark.slow),  # 360: a point is due, an evaluation is not
        (1500, {"checkpoint_period": 50}),  # 375: neither
    ],
)
def test_a_finished_run_that_goes_on_is_the_longer_run(tmp_path: Path, ends_at: int, changes: dict[str, Any]) -> None:
    """What came at the end, whatever the schedule said, is in no file of the longer run: neither rows nor points."""
    config = tiny(param="wn", num_envs=1, **changes)
    assert train(config, DQN, tmp_path / "whole", quiet=True) == 0
    parts = tmp_path / "parts"
    assert train(replace(config, frames=ends_at), DQN, parts, quiet=True) == 0
    first = points(parts)
    assert first["evaluation/return_mean"][-1][0] == first["train/loss"][-1][0] == ends_at
    assert first["summary/best_return_mean"][0][0] == ends_at
    assert all(len({step for step, _ in curve}) == len(curve) for curve in first.values()), "no frame twice"
    assert float(rows(parts / "evaluations.csv")[-1]["frames"]) == ends_at
    resumed, saved = open_for_resume(parts, {"frames": config.frames})
    with event_file_clock() as clock:
        clock.ahead += 1
        assert train(resumed, DQN, parts, resume=saved, quiet=True) == 0
    expected, found = points(tmp_path / "whole"), points(parts)
    assert found.keys() == expected.keys()
    for tag in expected:
        assert found[tag] == expected[tag], tag
    assert state_of(parts) == state_of(tmp_path / "whole")


def command(directory: Path | None, *flags: str) -> subprocess.Popen[str]:
    start = ["--resume", str(directory)] if directory else []
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *start, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def killed_on_the_way(
    directory: Path, flags: list[str], stops: list[tuple[int, float, signal.Signals]], cadence: str
) -> None:
    """Run train.py; at the first checkpoint with so many agent steps, so many seconds later, stop it and resume."""

    def saved_steps() -> int:
        try:
            return int(
                json.loads((directory / "checkpoints" / "latest" / "checkpoint.json").read_text())["agent_steps"]
            )
        except (OSError, ValueError):  # none yet, or it is being replaced
            return -1

    process = command(None, *flags, "--run-dir", str(directory), "--checkpoint-seconds", cadence)
    for steps, seconds, number in stops:
        started_at = saved_steps()
        # A checkpoint of this start comes first, or a fast hand would get nowhere.
        while process.poll() is None and not max(steps, started_at + 1) <= saved_steps():
            time.sleep(0.05)
        time.sleep(seconds)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(number)
        assert process.communicate()[1] == ""
        assert process.returncode in (130, 143, -signal.SIGKILL)
        process = command(directory, "--checkpoint-seconds", cadence)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")


def test_killed_at_random_moments_some_of_them_inside_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a checkpoint after every vector step a kill meets one being written more often than not.
    flags = small_flags(3200)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert main([*flags, "--run-dir", str(tmp_path / "whole"), "--quiet"]) == 0
    rng = random.Random(4)
    stops = [(steps, rng.uniform(0.0, 0.1), signal.SIGKILL) for steps in (150, 300)]
    killed_on_the_way(tmp_path / "parts", flags, stops, "0")
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from wn_rl.runs import checkpoint
from wn_rl.atari.action_log import Mark, read_history
from wn_rl.config import load, resolve
from wn_rl.networks import QNetworkSpec, build_q_network
from dataclasses import asdict, replace

path, fatal = Path(sys.argv[1]), int(sys.argv[2])
spec = QNetworkSpec(4, "wn", hidden_units=8, weight_init="normal")
config = resolve(replace(load("quick"), game="breakout", hidden_units=8))
seen = 0

def hook(event, arguments):
    global seen
    if armed and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

def save(steps):
    weights = build_q_network(spec, seed=steps).state_dict()
    checkpoint.save(path, config=asdict(config), spec=spec, weights=weights, agent_steps=steps,
                    training={"loop": {"vector_steps": steps}}, versions={"wn_rl": "1"}, keep_previous=steps != 2)

armed = False
sys.addaudithook(hook)
save(1)
save(2)
armed = True
save(3)
print(seen)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--num-envs 1 --precision float32",
        "--num-envs 16 --precision float32",
        "--num-envs 16 --precision bfloat16",
        "--num-envs 1 --precision bfloat16",
        "--num-envs 8 --precision bfloat16 --sticky-actions 0.25 --reseed-period 7k",
    ],
)
def test_200k_frames_of_quick_interrupted_ten_times(tmp_path: Path, flags: str) -> None:
    words = (
        "--preset quick --game Breakout --param wn --frames 200k --replay-capacity 10k --evaluation-period 5k "
        f"--evaluation-episodes 3 --num-threads 1 {flags}"
    ).split()
    whole = command(None, *words, "--run-dir", str(tmp_path / "whole"))
    assert whole.communicate()[1] == ""
    rng = random.Random(flags)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    # At any moment of the half second until the next checkpoint, and of the writing of it.
    stops = [(int(rng.uniform(0, 45_000)), rng.uniform(0.0, 0.7), numbers[index % 4]) for index in range(12)]
    killed_on_the_way(tmp_path / "parts", words, sorted(stops), "0.5")
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_at_each_step_of_writing_a_checkpoint_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    def run(place: Path, fatal: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", KILLED_WHILE_SAVING, str(place / "latest"), str(fatal)]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)

    steps = int(run(tmp_path / "count", 0).stdout)
    assert steps >= 10
    found = []
    for fatal in range(1, steps + 1):
        place = tmp_path / str(fatal)
        assert run(place, fatal).returncode == -signal.SIGKILL
        saved = checkpoint.load(place / "latest")
        assert saved.training["loop"]["vector_steps"] == saved.agent_steps
        saved.q_network()
        found.append(saved.agent_steps)
    assert set(found) == {2, 3}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    stopped_run(directory, tiny())
    return directory


class TestRefusals:
    @pytest.fixture
    def run(self, stopped: Path, tmp_path: Path) -> Path:
        subprocess.run(["cp", "-r", str(stopped), str(tmp_path / "run")], check=True)
        return tmp_path / "run"

    def resume(self, directory: Path, **changes: object) -> int:
        config, saved = open_for_resume(directory, changes)
        return train(config, DQN, directory, resume=saved, quiet=True)

    def files(self, directory: Path) -> dict[str, bytes]:
        return {
            str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file() and file.name != ".lock"
        }

    def refused(self, directory: Path, message: str) -> None:
        before = self.files(directory)
        with pytest.raises(WnRlError, match=message):
            self.resume(directory)
        assert self.files(directory) == before

    def test_what_may_change_may_change(self, run: Path) -> None:
        assert self.resume(run, frames=2000, emulator_threads=1, evaluation_period=100, checkpoint_seconds=5.0) == 0

    def test_a_second_process_on_the_same_run(self, run: Path) -> None:
        config, saved = open_for_resume(run, {})
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, time; from pathlib import Path; from wn_rl.runs.directory import RunDirectory\n"
                "with RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)",
                str(run),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            with pytest.raises(WnRlError, match=rf"process {holder.pid} is training in"):
                train(config, DQN, run, resume=saved, quiet=True)
        finally:
            holder.kill()
            holder.wait()
        assert train(config, DQN, run, resume=saved, quiet=True) == 0  # a killed process holds no lock

    def test_a_run_that_went_on_in_the_meantime(self, run: Path) -> None:
        config, saved = open_for_resume(run, {})
        assert self.resume(run, frames=1600) == 0  # another process, between reading the checkpoint and the lock
        before = self.files(run)
        with pytest.raises(WnRlError, match="written to by another process in the meantime: --resume it again"):
            train(config, DQN, run, resume=saved, quiet=True)
        assert self.files(run) == before

    def test_a_damaged_action_log(self, run: Path) -> None:
        data = bytearray((run / "action_log.bin").read_bytes())
        data[len(data) // 2] ^= 1
        (run / "action_log.bin").write_bytes(data)
        self.refused(run, r"action_log\.bin is damaged")

    def test_no_action_log(self, run: Path) -> None:
        (run / "action_log.bin").unlink()
        self.refused(run, r"cannot read .*action_log\.bin")

    def test_the_action_log_of_another_run(self, run: Path, tmp_path: Path) -> None:
        stopped_run(tmp_path / "other", tiny(seed=2))
        (run / "action_log.bin").write_bytes((tmp_path / "other" / "action_log.bin").read_bytes())
        self.refused(run, "is not the action log that belongs to the checkpoint|ends before the checkpoint")

    def change(self, run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
        file = run / "checkpoints" / "latest" / "checkpoint.json"
        values = json.loads(file.read_text())
        edit(values)
        file.write_text(json.dumps(checkpoint.seal(values)))

    def test_emulators_that_do_something_else(self, run: Path) -> None:
        # As another version of ale-py might: here with other no-ops at the start of an episode.
        self.change(run, lambda values: values["config"].update(noop_max=3))
        self.refused(run, "differs from that of the run|other episodes end than in the run")

    def test_another_version_of_ale_py(self, run: Path) -> None:
        self.change(run, lambda values: values["versions"].update({"ale-py": "0.9.9"}))
        self.refused(run, r"made with ale-py 0\.9\.9, .* pip install ale-py==0\.9\.9")

    def test_a_checkpoint_without_an_action_log(self, run: Path) -> None:
        self.change(run, lambda values: (values.update(format=2), values["training"].pop("loop/vector_steps")))
        self.refused(run, "without an action log: it can be evaluated, not resumed")

    def test_a_checkpoint_of_a_later_version(self, run: Path) -> None:
        self.change(run, lambda values: values.update(format=99))
        self.refused(run, "has format 99; this version of wn_rl reads formats 1 to 4")

    def test_a_run_that_began_on_a_gpu(self, run: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        self.change(run, lambda values: values["config"].update(device="cuda"))
        self.refused(run, "--device cpu")
        assert self.resume(run, device="cpu") == 0

    def test_a_run_that_moves_to_another_device_decides_anew_what_is_compiled(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def compiles(**changes: str) -> str:
            return open_for_resume(run, changes)[0].compile

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        self.change(run, lambda values: values["config"].update(device="cpu", compile="on"))
        assert compiles() == compiles(device="cpu") == "on"
        assert compiles(device="cuda") == compiles(device="auto") == "auto", "on a GPU nothing is compiled: no error"
        assert compiles(device="cuda", compile="off") == "off"
        self.change(run, lambda values: values["config"].update(device="cuda", compile="off"))
        assert compiles(device="cpu") == "auto", "on a CPU it may pay"
        assert compiles(device="auto") == "off"

    def test_stopped_while_the_replay_is_filled(self, run: Path) -> None:
        config, saved = open_for_resume(run, {})
        before = self.files(run)

        class Sooner(DQN):
            def load_state_dict(self, *arguments: Any) -> None:
                super().load_state_dict(*arguments)
                os.kill(os.getpid(), signal.SIGTERM)

        assert train(config, Sooner, run, resume=saved, quiet=True) == 143
        assert self.files(run) == before

    def test_a_damaged_checkpoint_falls_back_to_the_one_before(self, run: Path) -> None:
        assert self.resume(run, frames=1600) == 0
        latest = run / "checkpoints" / "latest"
        expected = checkpoint.load(latest.with_name("latest.previous")).agent_steps
        os.truncate(latest / "training.safetensors", 100)
        config, saved = open_for_resume(run, {"frames": 2400})
        assert saved.agent_steps == expected
        assert saved.notice is not None
        assert train(config, DQN, run, resume=saved, quiet=True) == 0
        whole = run.with_name("whole")
        assert train(tiny(), DQN, whole, quiet=True) == 0
        found, wanted = state_of(run), state_of(whole)
        assert found["episodes"] == wanted["episodes"]
        assert found["replay/checksum"] == wanted["replay/checksum"]


def test_a_trimmed_action_log_keeps_what_the_checkpoint_before_needs(tmp_path: Path) -> None:
    config = tiny(
        param="standard",
        frames=9000,
        action_log="replay",
        checkpoint_period=200,
        evaluation_period=10**6,
        max_frames_per_episode=200,
    )
    stopped_run(tmp_path, config, after=270)
    mark = checkpoint.load(tmp_path).training["loop"]
    history = read_history(tmp_path / "action_log.bin", 3, 0, Mark(mark["vector_steps"], mark["action_log"]))
    assert history.first_row > 0  # it was trimmed
    os.truncate(tmp_path / "checkpoints" / "latest" / "training.safetensors", 100)
    resumed, saved = open_for_resume(tmp_path, {"frames": 4400})
    assert saved.notice is not None
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    config = tiny()
    RunDirectory(tmp_path).create(to_yaml(config))
    with pytest.raises(UsageError, match=r"has no checkpoint yet: name another --run-dir; --config .* repeats it"):
        train(config, DQN, tmp_path, quiet=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_for_resume(tmp_path, {})


def test_stopped_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = TrainingLoop.start

    def stopped_start(loop: TrainingLoop) -> None:
        start(loop)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "start", stopped_start)
        assert train(tiny(frames=1200), DQN, tmp_path / "parts", quiet=True) == 143
    resumed, saved = open_for_resume(tmp_path / "parts", {})
    assert saved.agent_steps == 0
    assert train(resumed, DQN, tmp_path / "parts", resume=saved, quiet=True) == 0
    assert train(tiny(frames=1200), DQN, tmp_path / "whole", quiet=True) == 0
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


@pytest.mark.parametrize(("first", "then"), [("compiled", "fused"), ("fused", "compiled"), ("compiled", "off")])
def test_a_step_that_is_compiled_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, then: str
) -> None:
    load = loader.load
    monkeypatch.setattr(loader, "load", load if first == "fused" else lambda: "there is no C compiler")
    stopped_run(tmp_path, tiny(param="wn", hidden_units=512, compile="on"), after=5)
    monkeypatch.setattr(loader, "load", load if then == "fused" else lambda: "there is no C compiler")
    saved = checkpoint.load(tmp_path)
    changes = {"compile": "off"} if then == "off" else {}
    resumed, saved = open_for_resume(tmp_path, {"frames": saved.agent_steps * 4 + 40} | changes)
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0


def test_a_missing_previous_checkpoint_is_said(tmp_path: Path) -> None:
    stopped_run(tmp_path, tiny(evaluation_period=10**6))
    os.truncate(tmp_path / "checkpoints" / "latest" / "training.safetensors", 100)
    with pytest.raises(CheckpointError, match="damaged"):
        open_for_resume(tmp_path, {})


def test_saving_pauses_training_for_less_than_a_second(tmp_path: Path) -> None:
    config = tiny(hidden_units=512)
    took: list[float] = []
    save = checkpoint.save

    def timed(*arguments: Any, **named: Any) -> None:
        started = time.monotonic()
        save(*arguments, **named)
        took.append(time.monotonic() - started)

    checkpoint.save = timed
    try:
        stopped_run(tmp_path, config)
    finally:
        checkpoint.save = save
    assert took
    assert min(took) < 1.0
