"""What an output cannot encode is replaced, and an output that goes away costs no run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents.dqn import DQN
from tests.small_runs import small_flags, tiny
from wn_rl.evaluation.episodes import Episode, EvaluationResult
from wn_rl.output import readable
from wn_rl.training.session import train
from wn_rl.training.telemetry import Progress

ROOT = Path(__file__).parents[1]


def stream(encoding: str) -> tuple[io.TextIOWrapper, io.BytesIO]:
    raw = io.BytesIO()
    return io.TextIOWrapper(raw, encoding=encoding), raw


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"2 +- 1, epsilon >= 0, ? -\n"), ("latin-1", b"2 \xb1 1, epsilon >= 0, ? -\n")]
)
def test_letters_that_an_output_lacks_are_written_in_others(encoding: str, expected: bytes) -> None:
    text, raw = stream(encoding)
    print("2 ± 1, ε ≥ 0, 漢 –", file=readable(text), flush=True)
    assert raw.getvalue() == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_whole_run_prints_to_an_output_that_is_not_utf_8(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, raw = stream(encoding)
    monkeypatch.setattr(sys, "stdout", text)
    assert train(tiny(frames=800), DQN, tmp_path / "run") == 0
    assert b"evaluation" in raw.getvalue()


def program(*words: str, encoding: str = "ascii", **options: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_in_ascii(script: str) -> None:
    out, errors = program(script, "--help").communicate()
    assert errors == b""
    assert b"--param" in out


def test_a_reader_that_goes_away_costs_no_run(tmp_path: Path) -> None:
    """As ``train.py … | head -1``: the run goes on to its end, and says nothing more."""
    run = tmp_path / "run"
    process = program("train.py", *small_flags(1200), "--run-dir", str(run), encoding="utf-8")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"Breakout, wn")
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, b"")
    assert '"finished": true' in (run / "summary.json").read_text()


def test_a_full_disk_behind_the_output_costs_no_run() -> None:
    refused = []

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            refused.append(text)
            raise OSError(28, "No space left on device")

    progress = Progress(100, stream=Full())
    progress.evaluation(4, EvaluationResult((Episode(1.0, 2),), 0.1))
    progress.say("more")
    progress.close()
    assert refused  # it was written to, and each of these calls came back
