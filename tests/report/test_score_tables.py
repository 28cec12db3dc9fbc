"""Many networks at a time: tables, files, groups, and what fails beside what does not."""

from __future__ import annotations

import csv
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.evaluate_command import run
from wn_rl.errors import CheckpointError, WnRlError
from wn_rl.evaluation import policies as trained
from wn_rl.evaluation import scoring
from wn_rl.evaluation.scoring import How, Score
from wn_rl.report import score_tables
from wn_rl.runs import checkpoint

SHORT = ["--episodes", "2", "--max-frames-per-episode", "40", "--num-threads", "1"]


def test_seeds_and_groups_of_a_directory(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for game in ("Breakout", "SpaceInvaders"):
        for param in ("standard", "wn"):
            for seed in (1, 2):
                save_checkpoint(tmp_path / "runs" / f"{game}-{param}-s{seed}", game, param, seed=seed)
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    files = ["--json", str(tmp_path / "scores.json"), "--csv", str(tmp_path / "scores.csv")]
    protocol = ["--protocol", "nature", "--epsilon", "0.5"]
    code, out, err = run([str(tmp_path / "runs"), *protocol, *SHORT, *files], capsys, monkeypatch)
    assert (code, err) == (0, "")
    assert "protocol nature with epsilon, episodes, max frames per episode changed: 2 episodes, ε 0.5" in out
    assert "N = 2 emulators, seed 0; trained with N = 8" in out
    assert "Probability that a run of wn beats one of standard on 2 games" in out
    assert "wn and standard differ in more than param: learning_rate" in out
    assert "Salimans & Kingma 2016" in out

    written = json.loads((tmp_path / "scores.json").read_text())
    assert len(written["scores"]) == 8
    assert written["failed"] == written["problems"] == []
    first = written["scores"][0]
    assert first["protocol"]["name"] == "nature"
    assert first["protocol"]["changed"] == ["epsilon", "episodes", "max_frames_per_episode"]
    assert first["protocol"]["num_envs"] == 2
    assert first["references"]["mnih"] == 401.2
    means = {
        seed: next(
            s["mean"]
            for s in written["scores"]
            if (s["game"], s["param"], s["training_seed"]) == ("SpaceInvaders", "wn", seed)
        )
        for seed in (1, 2)
    }
    (found,) = (s for s in written["statistics"] if (s["group"], s["game"]) == ("wn", "SpaceInvaders"))
    assert (found["runs"], found["unit"]) == (2, "points")
    assert found["mean"] == {"value": sum(means.values()) / 2, "low": None, "high": None, "n": [2]}
    assert "(n = 4 and 4" in out
    (over,) = (s for s in written["statistics"] if (s["group"], s["game"]) == ("wn", None))
    assert (over["games"], over["runs"], over["unit"]) == (["Breakout", "SpaceInvaders"], 4, "human-normalized")
    (improvement,) = written["probability_of_improvement"]
    assert (improvement["better"], improvement["than"]) == ("wn", "standard")

    with open(tmp_path / "scores.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == score_tables.CSV_COLUMNS
    assert [float(row["mean"]) for row in rows] == [score["mean"] for score in written["scores"]]
    assert {row["protocol_changed"] for row in rows} == {"epsilon episodes max_frames_per_episode"}


def test_one_failure_does_not_keep_the_others_from_being_scored(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_checkpoint(tmp_path / "a", seed=1)
    damaged = save_checkpoint(tmp_path / "b", seed=2) / "checkpoints" / "latest" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("")
    (tmp_path / "d.zip").write_text("no zip")
    save_checkpoint(tmp_path / "e", seed=3)
    out_file = tmp_path / "scores.json"
    code, out, err = run([f"{tmp_path}/*", *SHORT, "--json", str(out_file)], capsys, monkeypatch)
    assert code == 1
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 3
    for message in ("its checksum does not match", "holds no checkpoint", "no zip file"):
        assert err.count(message) == 1
    written = json.loads(out_file.read_text())
    assert [score["training_seed"] for score in written["scores"]] == [1, 3]
    assert [Path(failed["path"]).name for failed in written["failed"]] == ["b", "c", "d.zip"]
    assert "│" in out

    code, out, err = run([str(tmp_path / "c"), *SHORT], capsys, monkeypatch)
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_where_every_checkpoint_fails_the_json_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out_file = tmp_path / "scores.json"
    for names in (["a.zip"], ["a.zip", "b.zip"]):
        for name in names:
            (tmp_path / name).write_text("no zip")
        paths = [str(tmp_path / name) for name in names]
        code, out, err = run([*paths, *SHORT, "--game", "Pong", "--json", str(out_file)], capsys, monkeypatch)
        assert (code, out, err.count("\n")) == (1, "", len(names))
        written = json.loads(out_file.read_text())
        assert written["scores"] == written["statistics"] == []
        assert [Path(failed["path"]).name for failed in written["failed"]] == names
        assert "no zip file" in written["failed"][0]["message"]


def test_different_numbers_of_runs_are_noted(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for game, param, seeds in (("Breakout", "wn", 2), ("Pong", "wn", 1), ("Breakout", "standard", 1)):
        for seed in range(seeds):
            save_checkpoint(tmp_path / f"{game}-{param}-{seed}", game, param, seed=seed)
    wn = [str(path) for path in tmp_path.glob("*-wn-*")]
    _, out, _ = run([*wn, *SHORT], capsys, monkeypatch)
    assert "the games of wn have different numbers of runs (Breakout 2, Pong 1)" in out
    assert "treats Pong as exact" in " ".join(out.split())
    _, out, _ = run([str(tmp_path / "Breakout-*"), *SHORT], capsys, monkeypatch)
    assert "wn and standard have a single run against several on Breakout" in out
    assert "different numbers of runs" not in out


def test_what_cannot_be_compared_is_named_and_the_scores_stand(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breakout = save_checkpoint(tmp_path / "a", "Breakout", "standard")
    pong = save_checkpoint(tmp_path / "b", "Pong", "wn")
    other = save_checkpoint(tmp_path / "c", "Breakout", "wn", noop_max=0)
    copied = tmp_path / "d"
    shutil.copytree(breakout, copied)
    adventure = save_checkpoint(tmp_path / "e", "Adventure", "standard")
    cases = [
        ([breakout, pong], "are not compared: their games differ: Pong (only wn), Breakout (only standard)"),
        ([breakout, other], "different protocols (noop max: 30 and 0)"),
        ([breakout, copied], "are of the same run, which counts once"),
    ]
    for paths, message in cases:
        code, out, err = run([*map(str, paths), *SHORT], capsys, monkeypatch)
        assert (code, err.count("\n")) == (1, 1), err
        assert message in err
        assert out.count("Breakout") >= 1
    code, out, err = run([str(breakout), str(adventure), *SHORT], capsys, monkeypatch)
    assert (code, err) == (0, "")
    assert "no human score is known for Adventure" in out
    # One named protocol makes them comparable.
    code, out, err = run([str(breakout), str(other), *SHORT, "--protocol", "nature"], capsys, monkeypatch)
    assert (code, err) == (0, "")


def test_files_that_cannot_be_written(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(save_checkpoint(tmp_path / "a"))
    for flag in ("--json", "--csv"):
        code, out, err = run([path, *SHORT, flag, "/proc/scores"], capsys, monkeypatch)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "cannot write there" in err
    for target in ("/proc/network.zip", str(tmp_path / "no" / "network.zip")):
        code, out, err = run([path, "--export", "sb3", target], capsys, monkeypatch)
        assert (code, out, err.count("\n")) == (2, "", 1)

    def full(*_: object) -> None:
        raise WnRlError("cannot write scores.json: No space left on device")

    monkeypatch.setattr(score_tables, "write_json", full)
    code, out, err = run([path, path, *SHORT, "--json", str(tmp_path / "scores.json")], capsys, monkeypatch)
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left" in err
    assert "Breakout" in out  # the score was not lost


def test_an_interruption_shows_what_was_scored(
    tmp_path: Path,
    save_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [str(save_checkpoint(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    real = scoring.score

    def interrupted(path: Path, how: How) -> Score:
        if path.name == "b":
            raise KeyboardInterrupt
        return real(path, how)

    monkeypatch.setattr(scoring, "score", interrupted)
    files = ["--json", str(tmp_path / "scores.json")]
    code, out, _ = run([*paths, *SHORT, *files], capsys, monkeypatch)
    assert code == 130
    assert "Breakout" in out
    assert len(json.loads((tmp_path / "scores.json").read_text())["scores"]) == 1


def test_a_checkpoint_that_is_being_written_is_waited_for(
    tmp_path: Path, save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_checkpoint(tmp_path / "run") / "checkpoints"
    (directory / "latest").rename(directory / "latest.writing")

    def finish() -> None:
        time.sleep(0.6)
        (directory / "latest.writing").rename(directory / "latest")

    thread = threading.Thread(target=finish)
    thread.start()
    assert trained.load(tmp_path / "run").game == "Breakout"
    thread.join()

    (directory / "latest").rename(directory / "latest.writing")
    monkeypatch.setattr(trained.time, "sleep", lambda _: None)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*one is being written there: try again"):
        trained.load(tmp_path / "run")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(tmp_path / "run")
    real, calls = checkpoint.read_tensors, []

    def replaced(file: Path, **named: Any) -> object:
        calls.append(file)
        if len(calls) == 1:  # another process saves between the description and the weights
            save_checkpoint(tmp_path / "run", seed=9)
        return real(file, **named)

    monkeypatch.setattr(checkpoint, "read_tensors", replaced)
    assert trained.load(path).seed == 9
    assert len(calls) == 2


def test_names_become_paths(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> None:
    a, b = save_checkpoint(tmp_path / "runs" / "a"), save_checkpoint(tmp_path / "runs" / "b")
    latest = a / "checkpoints" / "latest"
    assert scoring.expand([str(a), str(latest), str(a)]) == [a, latest]
    assert scoring.expand([str(tmp_path / "runs")]) == [a, b]
    assert scoring.expand([str(tmp_path / "runs" / "*")]) == [a, b]
    assert scoring.expand([str(tmp_path)]) == [a, b]
    (tmp_path / "nothing").mkdir()
    assert scoring.expand([str(tmp_path / "nothing")]) == [tmp_path / "nothing"]  # load() says what is missing
    with pytest.raises(WnRlError, match="matches no run"):
        scoring.expand([str(tmp_path / "z*")])
