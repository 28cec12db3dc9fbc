"""TensorBoard shows a real run's tags in a real browser; progress is a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.dqn import DQN
from wn_rl.config import load, resolve
from wn_rl.evaluation.episodes import Episode, EvaluationResult
from wn_rl.training.session import duration, train
from wn_rl.training.telemetry import LAYOUT, TAGS, Dashboard, Progress

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = (  # noqa: SIM905 - reads like a command line
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,2600 --virtual-time-budget=30000"
).split()


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Train a tiny run for real and serve it; yields TensorBoard's address."""
    runs = tmp_path_factory.mktemp("runs")
    tiny = {
        "game": "pong", "frames": 1200, "num_envs": 2, "num_threads": 1, "hidden_units": 8, "batch_size": 4,
        "learning_starts": 60, "replay_capacity": 200, "init_samples": 16, "evaluation_period": 200,
        "evaluation_episodes": 1, "evaluation_envs": 1, "max_frames_per_episode": 200, "log_period": 50,
    }  # fmt: skip
    train(resolve(replace(load("quick"), **tiny)), DQN, runs / "tiny", quiet=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                if "tiny" in json.loads(urllib.request.urlopen(f"{address}/data/runs", timeout=5).read()):
                    break
            except OSError:
                pass
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="browser: there is no Chromium here")
def test_a_browser_shows_every_scalar_tag_of_a_real_run(tensorboard: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path}", "--dump-dom", f"{tensorboard}/#timeseries"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    groups = {tag.split("/")[0] for tag in TAGS}
    assert all(group in page for group in groups)
    assert "evaluation/return_mean" in page
    assert "tiny" in page


def test_tensorboard_serves_scalars_histograms_text_hparams_and_the_layout(tensorboard: str) -> None:
    def get(path: str) -> str:
        return str(urllib.request.urlopen(f"{tensorboard}/data/{path}", timeout=20).read().decode())

    assert set(TAGS) <= json.loads(get("plugin/scalars/tags"))["tiny"].keys()
    assert "q_values/held_out" in get("plugin/histograms/tags")
    assert "config" in get("plugin/text/tags")
    layout = get("plugin/custom_scalars/layout")
    assert all(title in layout for title in LAYOUT)
    request = urllib.request.Request(
        f"{tensorboard}/data/plugin/hparams/experiment", data=b"{}", headers={"Content-Type": "application/json"}
    )
    experiment = urllib.request.urlopen(request, timeout=20).read().decode()
    assert "output_init_std" in experiment
    assert "summary/best_return_mean" in experiment


def test_a_tag_without_documentation_is_refused(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path)
    with pytest.raises(KeyError):
        dashboard.scalars(0, {"train/secret": 1.0})
    dashboard.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RESULT = EvaluationResult((Episode(3.0, 10), Episode(5.0, 20)), 1.5)


def test_a_pipe_gets_plain_lines_and_no_more_than_one_a_minute() -> None:
    stream = io.StringIO()
    progress = Progress(1000, stream=stream)
    progress.update(100, 0.5)
    assert stream.getvalue() == ""
    progress._last_line -= Progress.LINE_SECONDS
    progress.episode(7.0)
    progress.update(200, 0.5)
    progress.update(201, 0.5)
    progress.evaluation(200, RESULT)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "frames 200 of 1,000" in lines[0]
    assert "return 7.0 (last 1)" in lines[0]
    assert lines[1] == "frames 200: evaluation 4.00 ± 1.41 over 2 episodes (2 s)"
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_and_quiet_gets_nothing() -> None:
    terminal, silence = Terminal(), Terminal()
    for stream, quiet in ((terminal, False), (silence, True)):
        progress = Progress(1000, stream=stream, quiet=quiet)
        progress.episode(7.0)
        progress.evaluation(200, RESULT)
        progress.update(200, 0.5)
        progress.close()
    assert "ε 0.50" in terminal.getvalue()
    assert "evaluation 4.0" in terminal.getvalue()
    assert silence.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12_600, "3.5 h"), (181_440, "2.1 days")])
def test_durations_are_said_as_a_person_would(seconds: float, text: str) -> None:
    assert duration(seconds) == text
