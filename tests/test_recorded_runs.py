"""Whole runs on the CPU in the way that runs take on a GPU: recorded updates and acting, one upload a vector step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from agents.backends.cuda_graphs import CudaGraphs
from agents.dqn import DQN
from tests.small_runs import tiny
from tests.tape import TapeRecorder
from tests.test_resume import rows, state_of
from wn_rl.replay import Replay
from wn_rl.replay.host import HostReplay
from wn_rl.runs import checkpoint
from wn_rl.training import Agent
from wn_rl.training import run as trainer
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train


class Staged(Replay):
    """A replay that keeps what changes on the device, as on a GPU."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named, staged=True)


class Recorded(DQN):
    """Sends this process a signal after so many updates."""

    after: list[int]
    recordings: list[CudaGraphs]

    def count_updates(self, count: int) -> None:
        super().count_updates(count)
        if self.after and self.updates == self.after[0]:
            self.after.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)


def recorded(agent: Agent, replay: Replay) -> CudaGraphs:
    assert type(replay) is not Replay, "the run's replay is the test's"
    made = CudaGraphs(agent, replay, recorder=TapeRecorder())
    Recorded.recordings.append(made)
    return made


@pytest.mark.parametrize(
    ("replay", "changes"),
    [
        (Staged, {"param": "wn", "precision": "bfloat16"}),
        pytest.param(Staged, {"param": "bn", "num_envs": 16}, marks=pytest.mark.slow),
        pytest.param(HostReplay, {"param": "wn"}, marks=pytest.mark.slow),
    ],
    ids=["wn in bfloat16", "bn with 16 emulators", "wn from host memory"],
)
def test_a_recorded_run_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: type[Replay], changes: dict[str, Any]
) -> None:
    """Stopped before, during and after the recordings, it is the run that was never stopped, evaluations included."""
    monkeypatch.setattr(trainer, "Replay", replay)
    config = tiny(frames=1200, **changes)
    Recorded.recordings, Recorded.after = [], []
    assert train(config, Recorded, tmp_path / "whole", quiet=True, make_backend=recorded) == 0
    assert Recorded.recordings[0].updating.recorded
    assert Recorded.recordings[0].acting.recorded
    Recorded.after = [2, 30]
    code = train(config, Recorded, tmp_path / "parts", quiet=True, make_backend=recorded)
    while code != 0:
        assert code == 143
        resumed, saved = open_for_resume(tmp_path / "parts", {})
        code = train(resumed, Recorded, tmp_path / "parts", resume=saved, quiet=True, make_backend=recorded)
    assert len(Recorded.recordings) == 4
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert parts == whole
    assert len(rows(tmp_path / "whole" / "evaluations.csv")) > 1
    assert checkpoint.load(tmp_path / "whole").training["agent"]["updates"] > 40
