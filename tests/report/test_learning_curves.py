"""The figure of learning curves is drawn from the runs' own files; what cannot be drawn is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.report.evaluate_command import run
from wn_rl.report import figures, learning_curves, run_data, statistics

ROOT = Path(__file__).parents[2]
QUICK = sorted((ROOT / "docs" / "results" / "quick").iterdir())
LITERAL = sorted((ROOT / "docs" / "results" / "output_init").iterdir())


def words(svg: Path) -> str:
    return " ".join(element.text or "" for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"))


def test_a_curve_is_what_the_csv_says_and_is_smoothed_over_what_came_before() -> None:
    curve = learning_curves.score_curve(run_data.read_run(QUICK[0]))
    rows = (QUICK[0] / "evaluations.csv").read_text().splitlines()[1:]
    assert curve.frames.tolist() == [float(row.split(",")[0]) for row in rows]
    means = [float(row.split(",")[2]) for row in rows]
    assert curve.values.tolist() == means
    assert curve.smoothed(5).values[0] == means[0]
    assert len(means) == 40
    assert curve.smoothed(5).values[9] == pytest.approx(sum(means[6:10]) / 4), "a tenth of the curve"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_figure_of_the_documentation_is_drawn_by_one_command(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"quick.{ending}"
    assert run([*map(str, QUICK), "--curves", str(out), "--by", "seed"], capsys, monkeypatch)[0] == 0
    assert out.stat().st_size > 10_000
    assert out.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_the_caption_says_seeds_band_and_how_was_tested(tmp_path: Path) -> None:
    runs, _ = run_data.read_runs(LITERAL)
    out = tmp_path / "figure.svg"
    learning_curves.write_curves(runs, out, "output_init")
    said = words(out)
    for part in (
        "n = 3 seeds per curve",
        "95% Student's t interval over seeds",
        "running mean over 2 evaluations, a tenth of a curve at most; its last point: that of the mean of the last 2",
        "unit-variance (n = 3)",
        "emulator frames (millions)",
        "10 episodes, ε 0.05",
        "random play",
        "evaluation return (points)",
    ):
        assert part in said, part
    assert "paper" not in said  # its curve is of another game
    panel = learning_curves.evaluation_panel("Breakout", runs, "output_init", 1)
    unit_variance = [run for run in runs if run.config.output_init == "unit-variance"]
    assert panel.series[1].band.mean[-1] == pytest.approx(sum(run.final for run in unit_variance) / 3, abs=0.1)
    learning_curves.write_curves(runs[:2], out, "output_init", window=1)
    said = words(out)
    assert "range of the two seeds" in said
    assert "running mean" not in said
    first = out.read_bytes()
    learning_curves.write_curves(runs[:2], out, "output_init", window=1)
    assert out.read_bytes() == first


def test_space_invaders_stands_beside_the_papers_curve_as_far_as_ours_goes(tmp_path: Path) -> None:
    runs, _ = run_data.read_runs([path for path in QUICK if "SpaceInvaders" in path.name])
    learning_curves.write_curves(runs, tmp_path / "figure.svg")
    said = words(tmp_path / "figure.svg")
    assert "paper, weight norm" in said
    assert "digitized from the figure (±10 points)" in said
    assert "one run each" in said


def test_groups_differ_without_colour() -> None:
    styles = figures.styles_of(["standard", "wn", *map(str, range(10))])
    looks = [(style.dashes, style.marker) for style in styles.values()]
    assert len(set(map(str, looks))) == len(looks)
    assert (styles["standard"].colour, styles["wn"].colour) == ("#D55E00", "#0072B2")
    assert len({style.colour for style in list(styles.values())[:7]}) == 7
    assert run_data.in_order({"wn", "bn", "standard"}) == ["standard", "bn", "wn"]
    assert run_data.in_order({"10", "9", "1e-05", "None", "nan"}) == ["1e-05", "9", "10", "None", "nan"]


@pytest.mark.parametrize("group", ["wn_mean_only_bn", "x" * 40])
def test_a_long_legend_is_neither_cut_off_nor_under_the_caption(group: str) -> None:
    groups = ["standard", *(f"{group[: 25 - len(str(i))]}{i}" for i in range(9))]
    curve = statistics.Curve(np.array([1e6, 2e6]), np.array([-20.5, 10_000.0]))
    series = tuple(figures.Series(name, (curve, curve)) for name in groups)
    panel = figures.Panel("Pong", "evaluation return (points)", series, ("random play", -20.7))
    drawing = figures.draw([panel], figures.styles_of(groups), "A caption.", width=3.7, height=2.6)
    figure = drawing.figure
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    assert legend is not None
    place = legend.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.axes[0].get_window_extent().x1 <= figure.bbox.width
    assert place.y0 >= drawing.caption_height * figure.dpi
    assert place.y1 <= figure.axes[0].xaxis.get_tightbbox().y0  # below the axis's label


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere", "--curves", "x.png"], 1, "nowhere is not a run"),
        ([str(QUICK[0]), "--curves", "x.jpeg"], 2, "name a .png, .svg or .pdf file"),
        ([str(QUICK[0]), "--curves", "no/such/x.png"], 2, "not a file in an existing directory"),
        ([str(QUICK[0]), "--curves", "/proc/x.png"], 2, "cannot write there"),
        ([str(QUICK[0]), "--curves", "x.png", "--by", "parm"], 2, "Did you mean 'param'"),
        ([str(QUICK[0]), "--curves", "x.png", "--smooth", "0"], 2, "--smooth must be from 1"),
        ([str(QUICK[0]), "--curves", "x.png", "--episodes", "3", "--seed=1"], 2, "leave out --episodes, --seed"),
        ([str(QUICK[0]), "--smooth", "3"], 2, "--smooth belongs to --curves and --report"),
        (["--curves", "x.png"], 2, "nothing"),
        (["runs/*-wn-*", "--curves", "x.png"], 1, "matches no run"),
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
    found, out, error = run(words, capsys, monkeypatch)
    assert (found, out) == (code, "")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_without_evaluations_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("game: Pong\n")
    (tmp_path / "evaluations.csv").write_text("frames,episodes,mean,std,min,max,mean_length,seconds\n")
    with pytest.raises(run_data.WnRlError, match="has no evaluation yet"):
        run_data.read_run(tmp_path)


def test_one_run_that_cannot_be_read_costs_no_other_its_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figure.svg"
    code, said, error = run([str(QUICK[0]), str(tmp_path), "--curves", str(out)], capsys, monkeypatch)
    assert (code, error.count("\n")) == (1, 1)
    assert said == f"wrote {out}: 1 run\n"
    assert "standard (n = 1)" in words(out)


def test_without_matplotlib_a_line_says_what_to_install_and_nothing_is_written(tmp_path: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import evaluate, wn_rl.cli; wn_rl.cli.run(evaluate.main)"
    for flag, out in (("--curves", tmp_path / "x.png"), ("--report", tmp_path / "report")):
        command = [sys.executable, "-c", program, str(QUICK[0]), flag, str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: figures need matplotlib, which is not installed: pip install matplotlib\n"
    assert not list(tmp_path.iterdir())


def test_help_and_figures_need_no_torch(tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    program = (
        "import sys, evaluate\n"
        f"for arguments in (['--help'], {[str(QUICK[0]), '--curves', str(out)]}):\n"
        "  try: evaluate.main(arguments)\n"
        "  except SystemExit: pass\n"
        "  assert 'torch' not in sys.modules and 'gymnasium' not in sys.modules\n"
        "  assert ('matplotlib' in sys.modules) == ('--curves' in arguments)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    assert out.exists()
