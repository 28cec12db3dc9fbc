"""Runs are read from their files, without checkpoints; what is wrong with one is a line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from wn_rl.errors import WnRlError
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
    expected = f"found 3 runs in {tmp_path}; skipped {lost} (it has evaluations.csv but is not a run)"
    assert found.describe("run") == expected
    assert find_runs([str(tmp_path / "a")]).describe("run") == ""
    assert len(find_runs([str(RESULTS)]).paths) == len(list(RESULTS.rglob("config.yaml")))
