"""The figure of the documentation is drawn from the runs' own files; what is no run is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from wn_rl.report import curves

QUICK = sorted((Path(__file__).parents[1] / "docs" / "results" / "quick").iterdir())


def test_a_curve_is_what_the_csv_says_and_is_smoothed_over_what_came_before() -> None:
    curve = curves.read_curve(QUICK[0])
    rows = (QUICK[0] / "evaluations.csv").read_text().splitlines()[1:]
    assert curve.frames.tolist() == [float(row.split(",")[0]) for row in rows]
    means = [float(row.split(",")[2]) for row in rows]
    assert curve.means.tolist() == means
    assert curve.smoothed()[0] == means[0]
    assert curve.smoothed()[9] == pytest.approx(sum(means[5:10]) / 5)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_of_the_documentation_is_drawn_by_one_command(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"quick.{ending}"
    assert curves.main([*map(str, QUICK), "--out", str(out), "--by", "seed"]) == 0
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere", "--out", "x.png"], 1, "nowhere is not a run"),
        ([str(QUICK[0]), "--out", "x.jpeg"], 2, "name a .png, .svg or .pdf file"),
        ([str(QUICK[0]), "--out", "no/such/x.png"], 1, "cannot write"),
        ([str(QUICK[0]), "--out", "x.png", "--by", "parm"], 2, "Did you mean 'param'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert curves.main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_without_evaluations_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("game: Pong\n")
    (tmp_path / "evaluations.csv").write_text("frames,episodes,mean,std,min,max,mean_length,seconds\n")
    with pytest.raises(curves.WnRlError, match="has no evaluation yet"):
        curves.read_curve(tmp_path)
