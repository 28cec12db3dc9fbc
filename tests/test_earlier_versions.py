"""Runs and checkpoints of earlier versions evaluate and go on. tests/data holds what those versions wrote.

``format_3_*.tar.xz``: small runs of Breakout, 1,200 frames, that commit 26ac1ed trained with
``python train.py --game Breakout --preset quick --param wn|bn --seed 7 --num-envs 2 --num-threads 1 …`` (their
config.yaml has the rest); the latest checkpoint is kept.
"""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from agents.dqn import DQN
from evaluate import main as evaluate
from wn_rl.runs import checkpoint
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train

DATA = Path(__file__).parent / "data"


def unpacked(name: str, where: Path) -> Path:
    with tarfile.open(DATA / f"format_3_{name}.tar.xz") as archive:
        archive.extractall(where, filter="data")
    return where / name


@pytest.mark.parametrize(("name", "backends"), [("wn", ("cpu_kernels", "eager")), ("bn", ("eager",))])
def test_a_run_of_format_3_goes_on_and_evaluates(
    name: str, backends: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its replay is filled by playing its actions again and has the content of then, or the resume would be refused."""
    run = unpacked(name, tmp_path)
    before = {key: value.clone() for key, value in checkpoint.load(run).weights.items()}
    resumed, saved = open_for_resume(run, {"frames": 1800})
    assert resumed.backend == "auto"
    updates = int(saved.training["agent"]["updates"])
    assert train(resumed, DQN, run, resume=saved, quiet=True) == 0
    after = checkpoint.load(run)
    assert after.config.backend in backends
    assert int(after.training["agent"]["updates"]) == updates + 150 // resumed.update_period
    assert all(bool(value.isfinite().all()) for value in after.weights.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.weights.items())
    with (run / "evaluations.csv").open(encoding="utf-8") as file:
        assert [row["frames"] for row in csv.DictReader(file)] == ["600", "1200", "1800"]
    assert evaluate([str(run), "--episodes", "1", "--max-frames-per-episode", "100", "--device", "cpu"]) == 0
    assert "Breakout" in capsys.readouterr().out


def test_a_run_of_format_3_is_told_its_keys_new_names_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unpacked("wn", tmp_path)
    assert yaml.safe_load((run / "config.yaml").read_text())["journal"] == "whole"
    assert (run / "journal.bin").exists()
    told = "a run of an earlier version: 'journal: whole' is now 'action_log: full'\n"
    for frames, times in ((1260, 1), (1320, 0)):
        resumed, saved = open_for_resume(run, {"frames": frames})
        assert train(resumed, DQN, run, resume=saved) == 0
        assert capsys.readouterr().out.count(told) == times
        written = yaml.safe_load((run / "config.yaml").read_text())
        assert (written["action_log"], "journal" in written) == ("full", False)
    assert set(checkpoint.load(run).training["loop"]) == {"agent_steps", "vector_steps", "action_log"}
    assert not (run / "action_log.bin").exists()  # the file keeps its name
