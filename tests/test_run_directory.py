"""A run directory belongs to one run: made at once, under a name that no other has, and written under a lock."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.dqn import DQN
from tests.small_runs import tiny
from wn_rl.errors import UsageError, WnRlError
from wn_rl.runs import directory
from wn_rl.runs.directory import RunDirectory, new_directory
from wn_rl.training.session import train

ROOT = Path(__file__).parents[1]
RACE = """
import sys, time
sys.path.insert(0, {root!r})
from wn_rl.runs import directory
directory.time.strftime = lambda *_: "20261125-080000"
print("ready", flush=True)
sys.stdin.readline()
made = []
for _ in range(40):
    with directory.new_directory("Breakout", "wn", "quick", 1) as path:
        (path / "config.yaml").write_text(sys.argv[1])
        made.append(str(path))
print(" ".join(made))
"""


def test_runs_of_the_same_second_never_share_a_directory(tmp_path: Path) -> None:
    """Three processes make forty each in what they take for one second; each finds its own file in its own."""
    code = RACE.format(root=str(ROOT))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, name], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "abc"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    made = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process, name in zip(processes, "abc", strict=True):
        paths = process.communicate(timeout=60)[0].split()
        assert len(paths) == 40
        assert all((tmp_path / path / "config.yaml").read_text() == name for path in paths)
        made += paths
    assert Counter(made).most_common(1)[0][1] == 1
    assert "runs/Breakout-wn-quick-s1-20261125-080000" in made
    assert "runs/Breakout-wn-quick-s1-20261125-080000-120" in made


def test_two_runs_with_one_directory_by_name_the_second_is_refused(tmp_path: Path) -> None:
    """Started together: one trains, with its own config.yaml, the other says who has the directory."""
    rates = (1e-4, 2e-4)
    outcomes: dict[float, Any] = {}

    def start(rate: float) -> None:
        try:
            outcomes[rate] = train(tiny(frames=800, learning_rate=rate), DQN, tmp_path / "run", quiet=True)
        except WnRlError as error:
            outcomes[rate] = str(error)

    threads = [threading.Thread(target=start, args=(rate,)) for rate in rates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (trained,) = [rate for rate in rates if outcomes[rate] == 0]
    (refused,) = [outcomes[rate] for rate in rates if rate != trained]
    assert "is training in" in refused or "already holds a run" in refused
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learning_rate"] == trained


def test_a_directory_in_which_nothing_was_written_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_directory("Pong", "mine:Own", "quick", 3) as path:
        assert path.is_dir()
        assert path.name.startswith("Pong-Own-quick-s3-")
    assert not path.exists()
    with pytest.raises(UsageError, match="--backend cuda_graphs"), new_directory("Pong", "wn", "quick", 3) as path:
        train(replace(tiny(), device="cpu", backend="cuda_graphs"), DQN, path, quiet=True)
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        train(replace(tiny(), device="cpu", backend="cuda_graphs"), DQN, tmp_path / "empty", quiet=True)
    assert (tmp_path / "empty").is_dir(), "somebody else made it"


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="a file is in the way"), RunDirectory(path).claimed():
            pass


def test_a_lock_on_a_directory_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    flock = directory.fcntl.flock

    def removed_first(*arguments: Any) -> None:
        (run.path / ".lock").unlink()
        flock(*arguments)

    monkeypatch.setattr(directory.fcntl, "flock", removed_first)
    with pytest.raises(WnRlError, match="was removed by another process"), run.locked():
        pass
