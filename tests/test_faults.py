"""Faults of the surroundings, really caused: each is one clear line, exit code 1, and what was saved still is."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.dqn import DQN
from tests.small_runs import small_flags, stopped_run, tiny
from wn_rl.errors import NonFiniteLossError
from wn_rl.replay import Minibatch
from wn_rl.runs import checkpoint
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train

ROOT = Path(__file__).resolve().parents[1]


def train_py(
    *words: str, before: Callable[[], None] = lambda: None, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, str(ROOT / "train.py"), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=before,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def one_clear_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def goes_on(directory: Path) -> None:
    """Assert that the run can be resumed and comes to its end."""
    result = train_py("--resume", str(directory))
    assert result.returncode == 0, result.stderr


def limit_file_size(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(10, marks=pytest.mark.slow),  # the first file
        pytest.param(4_000, marks=pytest.mark.slow),  # config.yaml fits
        20_000,  # TensorBoard's events
        pytest.param(300_000, marks=pytest.mark.slow),  # the checkpoint
    ],
)
def test_a_limit_on_the_size_of_files(tmp_path: Path, size: int) -> None:
    run = tmp_path / "run"
    result = train_py(*small_flags(3000), "--run-dir", str(run), before=limit_file_size(size))
    one_clear_line(result, "cannot write", str(run), "File too large")


@pytest.mark.slow
@pytest.mark.parametrize("size", [60_000, 300_000])
def test_a_limit_that_is_met_after_a_checkpoint_leaves_that_one(tmp_path: Path, size: int) -> None:
    stopped_run(tmp_path / "run", tiny(frames=4000))
    saved = checkpoint.load(tmp_path / "run").agent_steps
    result = train_py("--resume", str(tmp_path / "run"), before=limit_file_size(size))
    one_clear_line(result, "cannot write", "File too large")
    assert checkpoint.load(tmp_path / "run").agent_steps >= saved
    goes_on(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 100_000, 3_000_000])
def test_a_full_disk(small_disk: Path, free: int) -> None:
    run = small_disk / "run"
    stopped_run(run, tiny(frames=4000, hidden_units=4))
    saved = checkpoint.load(run).agent_steps
    used = shutil.disk_usage(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(max(used.free - free, 0)))
    result = train_py("--resume", str(run), "--checkpoint-seconds", "0")
    if free < 3_000_000:
        one_clear_line(result, "cannot write", "No space left on device")
    assert checkpoint.load(run).agent_steps >= saved
    filler.unlink()
    if result.returncode:
        goes_on(run)


def without_override() -> tuple[str, ...]:
    """Return what takes from root the right to write where nobody may."""
    if os.getuid() != 0:
        return ()
    if not shutil.which("setpriv"):
        pytest.skip("root may write everywhere")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_run(run, tiny())
    run.chmod(0o555)
    (run / "checkpoints").chmod(0o555)
    try:
        one_clear_line(train_py("--resume", str(run), prefix=without_override()), "cannot write", "Permission denied")
        result = train_py(*small_flags(1000), "--run-dir", str(run / "inner"), prefix=without_override())
        one_clear_line(result, "cannot write", "Permission denied")
    finally:
        run.chmod(0o755)
        (run / "checkpoints").chmod(0o755)
    assert open_for_resume(run, {})[1].agent_steps > 0


class Poisoned(DQN):
    """Sees a reward that is not a number in its 60th update."""

    def update(self, batch: Minibatch) -> None:
        if self.updates == 59:
            batch.rewards[2] = math.nan
        super().update(batch)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_minibatch(
    tmp_path: Path,
    compile: str,  # noqa: A002
) -> None:
    config = tiny(frames=4000, reward_clip=0.0, compile=compile)
    with pytest.raises(NonFiniteLossError) as stopped:
        train(config, Poisoned, tmp_path, quiet=True)
    message = str(stopped.value)
    assert "the loss of update 60 is nan at frame" in message
    assert "the last good checkpoint is kept" in message
    assert str(tmp_path / "nonfinite") in message
    seen = load_file(tmp_path / "nonfinite" / "minibatch.safetensors")
    assert seen["observations"].shape == (config.batch_size, 4, 84, 84)
    assert seen["actions"].shape == seen["indices"].shape == (config.batch_size,)
    assert seen["q_values"].isfinite().all()  # the weights were not spoiled
    statistics = json.loads((tmp_path / "nonfinite" / "statistics.json").read_text())
    assert statistics["updates"] == 59
    assert not any(statistics["weights_not_finite"].values())
    saved = checkpoint.load(tmp_path)
    assert all(bool(weight.isfinite().all()) for weight in saved.weights.values())
    resumed, saved = open_for_resume(tmp_path, {"frames": 1600})
    assert train(resumed, DQN, tmp_path, resume=saved, quiet=True) == 0


def test_a_minibatch_with_an_infinite_loss_is_kept_on_the_device_where_nothing_may_be_read_back() -> None:
    agent = DQN(tiny(param="standard"), 4, torch.device("cpu"))
    agent.finite.reads_back = False  # as on a GPU
    indices = torch.arange(4)
    agent.finite.check(torch.tensor(1.0), indices)
    assert agent.offending_transitions() is None
    agent.finite.check(torch.tensor(math.inf), indices)
    agent.finite.check(torch.tensor(math.nan), indices + 4)
    found = agent.offending_transitions()
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3]  # the first one
