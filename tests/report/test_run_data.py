"""Runs are read from their files, without checkpoints; what is wrong with one is a line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from wn_rl.errors import WnRlError
from wn_rl.report import published
from wn_rl.report.learning_curves import binned
from wn_rl.report.run_data import find_runs, names_of, read_run, read_runs

RESULTS = Path(__file__).parents[2] / "docs" / "results"
WN = RESULTS / "quick" / "Breakout-wn-quick-s1"


def test_a_run_is_what_its_files_say() -> None:
    run = read_run(WN)
    rows = [line.split(",") for line in (WN / "evaluations.csv").read_text().splitlines()[1:]]
    means = [float(row[2]) for row in rows]
    assert run.scores.tolist() == means
    assert run.frames.tolist() == [float(row[0]) for row in rows]
    assert (run.best, run.final) == (max(means), means[-1])
    assert run.best_frames == float(rows[means.index(max(means))][0])
    summary = json.loads((WN / "summary.json").read_text())
    assert (run.best, run.final) == (summary["best_evaluation"]["mean"], summary["final_evaluation"]["mean"])
    assert run.trained_frames == summary["frames"]
    assert run.number("wall_seconds") == summary["wall_seconds"]
    assert run.text("device") == "AMD EPYC, 2 cores"
    assert run.finished
    assert run.evaluation_protocol == "10 episodes, ε 0.05, cap 108,000 frames"
    assert not run.evaluated_as_the_paper


def test_directories_patterns_and_names() -> None:
    assert len(find_runs([str(RESULTS / "quick")]).paths) == 6
    twice = find_runs([str(RESULTS / "quick" / "*-wn-*"), str(WN)])
    assert twice.paths == find_runs([str(RESULTS / "quick" / "*-wn-*")]).paths
    with pytest.raises(WnRlError, match="matches no run"):
        find_runs([str(RESULTS / "nothing*")])
    runs, _ = read_runs(find_runs([str(RESULTS / "quick")]).paths)
    assert names_of(runs)[1] == "Breakout-wn-quick-s1"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "game: Brekout\n", "is not a run: unknown game 'Brekout'. Did you mean 'Breakout'"),
        ("config.yaml", "gme: Breakout\n", "unknown key 'gme'"),
        ("config.yaml", None, "is not a run: cannot read"),
        ("evaluations.csv", None, "cannot read"),
        ("evaluations.csv", "frames,episodes,mean,std,min,max,mean_length,seconds\n", "has no evaluation yet"),
        ("evaluations.csv", "frames,mean\n1,2\n", "it has no column 'episodes'"),
        ("evaluations.csv", "frames,episodes,mean,std,min,max,mean_length,seconds\n1,1,nan,0,0,0,0,0\n", "not finite"),
        (
            "evaluations.csv",
            "frames,episodes,mean,std,min,max,mean_length,seconds\n2,1,1,0,0,0,0,0\n2,1,1,0,0,0,0,0\n",
            "its frames do not increase",
        ),
        (
            "evaluations.csv",
            "frames,episodes,mean,std,min,max,mean_length,seconds\n1,1,1e300,0,0,0,0,0\n",
            "mean is not finite or not plausible",
        ),
        (
            "evaluations.csv",
            "frames,episodes,mean,std,min,max,mean_length,seconds\n-5,1,1,0,0,0,0,0\n",
            "its frames do not increase from 0 on",
        ),
        ("summary.json", "{", "summary.json is damaged: it is no JSON"),
        ("summary.json", "[1]", "summary.json is damaged: it holds no object"),
    ],
)
def test_what_is_wrong_with_a_run_is_one_line(file: str, content: str | None, message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(WN, run)
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    good, failures = read_runs([run, WN])
    assert [one.path for one in good] == [WN]
    (failure,) = failures
    assert message in failure.message
    assert str(run) in failure.message


def test_a_run_that_still_goes_on_has_no_summary_and_maybe_no_games(tmp_path: Path) -> None:
    shutil.copytree(WN, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "episodes.csv").unlink()
    run = read_run(tmp_path / "run")
    assert run.trained_frames == run.frames[-1]
    assert not run.finished
    assert run.number("wall_seconds") is run.text("device") is None
    assert run.episodes["return"].size == 0


def test_strange_values_of_a_summary_are_not_known(tmp_path: Path) -> None:
    shutil.copytree(WN, tmp_path / "run")
    strange = '{"frames": "many", "wall_seconds": 1e999, "device": {"a": 1}, "finished": 1, "frames_per_second": true}'
    (tmp_path / "run" / "summary.json").write_text(strange)
    run = read_run(tmp_path / "run")
    assert run.trained_frames == run.frames[-1]
    assert run.number("wall_seconds") is run.number("frames_per_second") is run.text("device") is None
    assert not run.finished


@pytest.mark.parametrize("number", ["1" + 400 * "0", "1e300", "-3", "NaN", "-Infinity"])
def test_numbers_of_a_summary_that_no_run_has_are_not_known(number: str, tmp_path: Path) -> None:
    shutil.copytree(WN, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(f'{{"frames": {number}, "wall_seconds": {number}}}')
    run = read_run(tmp_path / "run")
    assert run.number("wall_seconds") is None
    assert run.trained_frames == run.frames[-1]


def test_the_same_run_twice_is_no_second_seed(tmp_path: Path) -> None:
    shutil.copytree(WN, tmp_path / "copy")
    runs, failures = read_runs([WN, tmp_path / "copy"])
    assert len(runs) == 1
    assert failures[0].message == f"{tmp_path / 'copy'} is the same run as {WN}: left out"


def test_training_games_are_averaged_by_stretches_of_frames() -> None:
    curve = binned(np.array([0.0, 9.0, 11.0, 35.0, 40.0]), np.array([2.0, 4.0, 7.0, 1.0, 2.0]), 40.0, 4)
    assert curve is not None
    assert curve.frames.tolist() == [5, 15, 35]
    assert curve.values.tolist() == [3, 7, 1.5]
    assert binned(np.empty(0), np.empty(0), 40.0, 4) is None
    for longest in (2_000_004.0, 1_000_008.0, 200_000_016.0):  # the last game is no stretch of its own
        curve = binned(np.array([longest * 0.999, longest]), np.array([1.0, 3.0]), longest, 40)
        assert curve is not None
        assert curve.values.tolist() == [2]


def test_the_papers_curve_and_the_public_ones() -> None:
    normal, wn = published.paper_curves()
    # Row "1.0,123.5,154.3,179.0,277.8": one epoch is a million emulator frames, the score the middle of the line.
    at = normal.frames.tolist().index(1e6)
    assert (normal.low[at], normal.high[at], normal.mean[at]) == (123.5, 154.3, pytest.approx(138.9))
    assert wn.mean[wn.frames.tolist().index(1e6)] == pytest.approx((179.0 + 277.8) / 2)
    # The table's 1779 and 2179 are the peaks of these curves (reading error 10 points).
    assert normal.high.max() == pytest.approx(1779, abs=15)
    assert wn.high.max() == pytest.approx(2179, abs=15)
    assert normal.frames[-1] <= 200e6
    nnabla = published.public_curves("Breakout")[0]
    assert nnabla.label.startswith("nnabla-rl")
    assert (nnabla.frames[1], nnabla.mean[1], nnabla.low[1], nnabla.high[1]) == (2e6, 3.73, 1.29, 5.64)
    assert published.public_curves("Tetris") == ()
    for game in ("Breakout", "SpaceInvaders", "Seaquest", "Enduro", "Pong"):
        for curve in published.public_curves(game):
            assert (np.diff(curve.frames) > 0).all()
            assert ((curve.low <= curve.mean) & (curve.mean <= curve.high)).all()


def test_directories_are_searched_with_all_that_they_hold_and_what_was_found_is_said(tmp_path: Path) -> None:
    """Runs at any depth, beside each other or not; links that lead in a circle; what was a run and lost its file."""
    for place in ("a", "runs/r1/b", "runs/c"):
        shutil.copytree(WN, tmp_path / place)
    (tmp_path / "runs" / "r1" / "lost").mkdir()
    (tmp_path / "runs" / "r1" / "lost" / "evaluations.csv").write_text("")
    (tmp_path / "runs" / "r1" / "round").symlink_to(tmp_path / "runs")
    found = find_runs([str(tmp_path)])
    names = [str(path.relative_to(tmp_path)) for path in found.paths]
    assert names == ["a", "runs/c", "runs/r1/b"]
    lost = tmp_path / "runs" / "r1" / "lost"
    expected = f"found 3 runs in {tmp_path}; skipped {lost} (it has evaluations.csv and is no run)"
    assert found.describe("run") == expected
    assert find_runs([str(tmp_path / "a")]).describe("run") == ""
    assert len(find_runs([str(RESULTS)]).paths) == len(list(RESULTS.rglob("config.yaml")))
