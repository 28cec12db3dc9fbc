"""The page of a set of runs: its numbers are those of the files, other people's text does no harm, nothing is lost."""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import evaluate
from wn_rl import cli
from wn_rl.report import page, report_directory, run_data
from wn_rl.report.run_data import read_scalars
from wn_rl.report.run_tables import group_rows, warnings
from wn_rl.video.writer import write_video

ROOT = Path(__file__).parents[2]
QUICK = ROOT / "docs" / "results" / "quick"
LITERAL = ROOT / "docs" / "results" / "output_init"


def run(
    arguments: Sequence[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate.main)
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its tables' cells, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.text = ""
        self._rows: list[list[tuple[str, str | None]]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self._rows = self.tables[str(found["aria-label"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", found.get("data-value")))
            self._cell = True
        elif tag == "small":
            self._cell = False

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            text, value = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, value)

    def table(self, label: str) -> list[dict[str, tuple[str, str | None]]]:
        head, *rows = self.tables[label]
        return [dict(zip((name for name, _ in head), row, strict=True)) for row in rows]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the output layer's runs: two groups of three seeds."""
    out = tmp_path_factory.mktemp("report") / "out"
    assert report_directory.report_command([str(LITERAL)], report=out, by="output_init") == 0
    return out


def read_csv(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_numbers_of_the_page_and_of_its_csv_are_those_of_the_runs_files(report: Path) -> None:
    means = {
        path.name: [float(row["mean"]) for row in read_csv(path / "evaluations.csv")] for path in LITERAL.iterdir()
    }
    shown = Page((report / "index.html").read_text(encoding="utf-8"))
    rows = shown.table("Scores by game and group")
    assert [row["output_init"][0] for row in rows] == ["scaled", "unit-variance"]
    for row, stored in zip(rows, read_csv(report / "data" / "scores.csv"), strict=True):
        group = row["output_init"][0]
        name = "literal" if group == "unit-variance" else group  # what the value was called when these were run
        seeds = [means[f"Breakout-wn-{name}-s{seed}"] for seed in (1, 2, 3)]
        for column, key, values in (
            ("best", "best", [max(seed) for seed in seeds]),
            ("final", "final", [seed[-1] for seed in seeds]),
            ("last 5", "last_5", [np.mean(seed[-5:]) for seed in seeds]),
        ):
            text, value = row[column]
            assert float(value or "nan") == pytest.approx(np.mean(values))
            assert text == f"{np.mean(values):.1f}"
            half = 4.302652729911275 * np.std(values, ddof=1) / 3**0.5
            assert float(stored[key]) == pytest.approx(np.mean(values))
            assert float(stored[f"{key}_low"]) == pytest.approx(np.mean(values) - half)
            assert float(stored[f"{key}_high"]) == pytest.approx(np.mean(values) + half)
        assert (row["seeds"], row["paper wn"], row["Mnih 2015"]) == (("3", "3.0"), ("403", "403.0"), ("401.2", "401.2"))
        human = (np.mean([seed[-1] for seed in seeds]) - 1.7) / (30.5 - 1.7)
        assert row["human-normalized score"][0] == f"{100 * human:.1f}%"
        assert (row["random"][0], row["human"][0], row["N"][0]) == ("1.7", "30.5", "8")
    for row in shown.table("Every run"):
        seed = means[row["run"][0]]
        summary = json.loads((LITERAL / row["run"][0] / "summary.json").read_text())
        assert (row["best"][1], row["final"][1]) == (repr(max(seed)), repr(seed[-1]))
        assert float(row["wall time"][1] or "nan") == summary["wall_seconds"]
        assert row["hardware"][0] == "AMD EPYC, 2 cores"
    evaluations = read_csv(report / "data" / "evaluations.csv")
    assert [float(row["mean"]) for row in evaluations] == [mean for name in sorted(means) for mean in means[name]]


def test_the_page_carries_everything_and_a_browser_may_fetch_nothing(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    shown = Page(text)
    policy = next(meta["content"] for meta in shown.attributes("meta") if meta.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")
    assert len(shown.attributes("svg")) == 3  # evaluation return, training return, length of evaluation episodes
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in shown.attributes("svg"))
    named = [attributes["id"] for _, attributes in shown.elements if attributes.get("id")]
    assert len(set(named)) == len(named)
    for _, attributes in shown.elements:
        for name in ("href", "src", "poster", "data"):
            address = attributes.get(name)
            assert address is None or address[:1] == "#" or address[:5] == "data:" or (report / address).is_file()
    assert "url(http" not in text
    assert "@import" not in text
    assert "TensorBoard events, so there are no Q-values, losses and gradients" in shown.text
    assert "var(--green)" in text
    assert "prefers-color-scheme: dark" in text


def test_each_figure_is_there_as_png_and_svg_beside_the_page(report: Path) -> None:
    listed = json.loads((report / "files.json").read_text())["files"]
    there = {str(file.relative_to(report)) for file in report.rglob("*") if file.is_file()}
    assert there == {*listed, "index.html", "files.json"}
    pictures = {name for name in listed if name.startswith("figures/")}
    assert {name.removesuffix(".svg") for name in pictures if name.endswith(".svg")} == {
        name.removesuffix(".png") for name in pictures if name.endswith(".png")
    }
    assert "figures/scores-Breakout.svg" in pictures
    rows = [row for row in read_csv(report / "data" / "curves.csv") if row["quantity"] == "evaluation_return"]
    assert {row["band"] for row in rows} == {"95% Student's t interval over seeds"}
    last = [row for row in rows if row["output_init"] == "scaled"][-1]
    assert float(last["low"]) < float(last["mean"]) < float(last["high"])


def test_every_file_and_column_has_its_place_in_the_documentation(report: Path) -> None:
    documented = (ROOT / "docs" / "report.md").read_text(encoding="utf-8").splitlines()
    for file in (report / "data").iterdir():
        (line,) = (line for line in documented if line.startswith(f"| `data/{file.name}` |"))
        header = file.read_text(encoding="utf-8").splitlines()[0].split(",")
        for column in header:
            name = column.removesuffix("_low").removesuffix("_high")
            assert f"`{name}`" in line or name == "output_init", (file.name, column)


HOSTILE = "_</script><img src=x onerror=alert(1)>$\\frac{\x07\"'&"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose directory, configuration and summary hold what a page or a figure could trip over."""
    path = tmp_path / "runs" / "</script><b onmouseover=alert(1)>\udcff\n".replace("/", "\\")
    shutil.copytree(QUICK / "Breakout-wn-quick-s1", path)
    config = (path / "config.yaml").read_text().replace("param: wn\n", f"param: {json.dumps(HOSTILE)}\n")
    (path / "config.yaml").write_text(config)
    summary = json.loads((path / "summary.json").read_text())
    summary |= {"device": "<img src=http://example.com/x>", "precision": "</table>"}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_other_peoples_names_and_values_are_text(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run([hostile, QUICK / "Breakout-wn-quick-s1", "--report", out], capsys, monkeypatch)[0] == 0
    text = (out / "index.html").read_text(encoding="utf-8")
    shown = Page(text)
    assert len(shown.attributes("script")) == text.count("</script>") == 1
    assert not shown.attributes("img")
    assert not shown.attributes("b")
    for _, attributes in shown.elements:
        assert not any(name.startswith("on") for name in attributes)
    told = "_</script><img src=x onerror=alert(1)>$\\frac{\N{REPLACEMENT CHARACTER}\"'&"
    assert told in [row["param"][0] for row in shown.table("Scores by game and group")]
    assert "<\\script><b onmouseover=alert(1)>" in shown.table("Every run")[0]["run"][0]
    assert shown.table("Every run")[0]["hardware"][0] == "<img src=http://example.com/x>"
    for file in out.rglob("*.csv"):
        assert "\x07" not in file.read_text(encoding="utf-8")


def test_tensorboards_events_become_diagnostics_and_damaged_ones_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        path = tmp_path / "runs" / f"s{seed}"
        shutil.copytree(QUICK / "Pong-wn-quick-s1", path)
        config = (path / "config.yaml").read_text().replace("\nseed: 1\n", f"\nseed: {seed}\n")
        (path / "config.yaml").write_text(config)
    with SummaryWriter(tmp_path / "runs" / "s1") as writer:
        for frames, value in ((8000, 0.5), (16_000, float("nan")), (24_000, 0.25), (24_000, 0.75)):
            writer.add_scalar("train/loss", value, frames)
        writer.add_scalar("train/somebody_elses", 1.0, 8000)
    loss = read_scalars(tmp_path / "runs" / "s1")["train/loss"]
    assert (loss.frames.tolist(), loss.values.tolist()) == ([8000, 24_000], [0.5, 0.75])
    assert read_scalars(tmp_path / "runs" / "s2") == {}
    out = tmp_path / "out"
    assert run([tmp_path / "runs", "--report", out], capsys, monkeypatch)[0] == 0
    shown = Page((out / "index.html").read_text(encoding="utf-8"))
    assert "Without TensorBoard events, and so missing in some figures: s2." in shown.text
    assert (out / "figures" / "Pong-train-loss.png").exists()
    stored = [row for row in read_csv(out / "data" / "diagnostics.csv") if row["quantity"] == "train/loss"]
    assert [(row["run"], row["frames"], row["value"]) for row in stored] == [
        ("s1", "8000", "0.5"),
        ("s1", "24000", "0.75"),
    ]

    next((tmp_path / "runs" / "s1").glob("*tfevents*")).unlink()
    (tmp_path / "runs" / "s2" / "events.out.tfevents.1").write_bytes(b"no events" * 20)
    assert run([tmp_path / "runs", "--report", out], capsys, monkeypatch)[0] == 0
    assert not (out / "figures" / "Pong-train-loss.png").exists()  # of the report before
    assert "no readable TensorBoard events" in Page((out / "index.html").read_text(encoding="utf-8")).text


def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wn = QUICK / "Breakout-wn-quick-s1"
    mine, file = tmp_path / "mine", tmp_path / "file"
    mine.mkdir()
    (mine / "index.html").write_text("my own page")
    file.write_text("")
    sealed = tmp_path / "linked"
    sealed.symlink_to("/proc")
    for target, message in (
        (mine, "it is not empty and holds no report"),
        (file, "a file is in the way"),
        (file / "below", "is a file"),
        ("/proc/report", "cannot write there"),
        (sealed / "report", "cannot write there"),
    ):
        code, out, err = run([wn, "--report", target], capsys, monkeypatch)
        assert (code, out, err.count("\n")) == (2, "", 1), target
        assert message in err
    assert [path.name for path in mine.iterdir()] == ["index.html"]
    assert (mine / "index.html").read_text() == "my own page"

    ours = tmp_path / "deep" / "ours"
    assert run([wn, "--report", ours], capsys, monkeypatch)[0] == 0
    before = (ours / "index.html").read_bytes()
    (ours / "notes.txt").write_text("mine")
    (ours / "data" / "mine.csv").write_text("mine")
    assert run([QUICK / "Pong-wn-quick-s1", "--report", ours], capsys, monkeypatch)[0] == 0
    assert not list(ours.glob("figures/*Breakout*"))
    assert (ours / "notes.txt").read_text() == (ours / "data" / "mine.csv").read_text() == "mine"
    assert run([wn, "--report", ours], capsys, monkeypatch)[0] == 0
    assert (ours / "index.html").read_bytes() == before  # the same files make the same page

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wn_rl.runs.directory.write_atomically", full)
    code, out, err = run([QUICK / "Pong-wn-quick-s1", "--report", ours], capsys, monkeypatch)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "No space left" in err
    assert (ours / "index.html").read_bytes() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [0, 1, 8])
def test_a_first_report_that_does_not_end_leaves_nothing(
    error: BaseException,
    after: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep").mkdir()
    replaced = os.replace
    count = 0

    def replace_some(source: Path, target: Path) -> None:
        nonlocal count
        if count == after:
            raise error
        count += 1
        replaced(source, target)

    monkeypatch.setattr("wn_rl.runs.directory.os.replace", replace_some)
    code, _, err = run([QUICK / "Pong-wn-quick-s1", "--report", out], capsys, monkeypatch)
    assert (code, err.count("\n")) == ((130, 0) if isinstance(error, KeyboardInterrupt) else (1, 1))
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_report_that_was_killed_is_begun_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run([QUICK / "Pong-wn-quick-s1", "--report", out], capsys, monkeypatch)[0] == 0
    (out / "index.html").unlink()  # it is written last, so this is what a kill leaves
    assert run([QUICK / "Breakout-wn-quick-s1", "--report", out], capsys, monkeypatch)[0] == 0
    assert not list(out.glob("figures/*Pong*"))
    (out / "index.html").unlink()
    (out / "files.json").write_text('{"files": []}')  # somebody else's
    assert run([QUICK / "Pong-wn-quick-s1", "--report", out], capsys, monkeypatch)[0] == 2


def test_a_row_of_many_runs_stays_narrow(tmp_path: Path) -> None:
    runs = []
    for seed in range(1, 9):
        path = tmp_path / f"s{seed}"
        shutil.copytree(QUICK / "Breakout-wn-quick-s1", path)
        lines = (path / "config.yaml").read_text().splitlines()
        changes = {"seed:": f"seed: {seed}", "frames:": "frames: 1000000" if seed == 3 else "frames: 2000000"}
        changed = [changes.get(line.split(" ")[0], line) for line in lines]
        (path / "config.yaml").write_text("\n".join(changed) + "\n")
        if seed == 3:
            rows = (path / "evaluations.csv").read_text().splitlines()
            (path / "evaluations.csv").write_text("\n".join(rows[:21]) + "\n")
            (path / "summary.json").unlink()
        runs.append(run_data.read_run(path))
    text = page.render(page.Content(runs, "param"))
    row = Page(text).table("Scores by game and group")[0]
    assert (row["seeds"], row["frames"][0]) == (("8", "8.0"), "1M to 2M")
    assert "<small>seeds 1, 2, 3, 4, …, 8</small>" in text


def test_what_cannot_be_read_is_said_on_the_page_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code, _, err = run([QUICK / "Pong-wn-quick-s1", tmp_path / "none", "--report", out], capsys, monkeypatch)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path / 'none'} is not a run" in Page((out / "index.html").read_text(encoding="utf-8")).text
    code, said, err = run([tmp_path / "none", "--report", tmp_path / "other"], capsys, monkeypatch)
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert not (tmp_path / "other").exists()


def video_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video([np.full((16, 16, 3), shade, np.uint8) for shade in (250, 10)], path, scale=1)


def test_videos_are_part_of_the_page_unless_they_are_too_large_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(QUICK / "Pong-wn-quick-s1", path)
    video_file(path / "best.mp4")
    video_file(path / "videos" / "x <b>.mp4")
    (path / "no.mp4").write_bytes(b"no video, really")
    secret = tmp_path / "secret.mp4"
    shutil.copy(path / "best.mp4", secret)
    (path / "link.mp4").symlink_to(secret)
    found, left_out = run_data.find_videos([run_data.read_run(path)])
    assert [one.path.name for one in found] == ["best.mp4", "x <b>.mp4"]
    assert left_out == ["run/no.mp4: no MP4 file"]
    poster = found[0].poster
    assert poster is not None
    assert poster[:4] == b"\x89PNG"
    shown = Page(page.render(page.Content([run_data.read_run(path)], "param", videos=found, videos_left_out=left_out)))
    videos = shown.attributes("video")
    assert [str(video["poster"])[:22] for video in videos] == ["data:image/png;base64,"] * 2
    data = str(videos[0]["src"]).removeprefix("data:video/mp4;base64,")
    assert base64.b64decode(data) == (path / "best.mp4").read_bytes()
    assert "Left out: run/no.mp4: no MP4 file" in shown.text

    size = (path / "best.mp4").stat().st_size
    monkeypatch.setattr(run_data, "LARGEST_VIDEOS", size + 1)
    assert [line for line in run_data.find_videos([run_data.read_run(path)])[1] if "together" in line]
    monkeypatch.setattr(run_data, "LARGEST_VIDEO", size - 1)
    found, left_out = run_data.find_videos([run_data.read_run(path)])
    assert not found
    assert "more than the" in left_out[0]


def test_what_keeps_groups_from_being_compared_is_said(tmp_path: Path) -> None:
    def copy(source: Path, name: str, **changes: Any) -> run_data.RunResult:
        shutil.copytree(source, tmp_path / name)
        config = (tmp_path / name / "config.yaml").read_text()
        for key, value in changes.items():
            lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in config.splitlines()]
            config = "\n".join(lines) + "\n"
        (tmp_path / name / "config.yaml").write_text(config)
        return run_data.read_run(tmp_path / name)

    wn, standard = QUICK / "Breakout-wn-quick-s1", QUICK / "Breakout-standard-quick-s1"
    one, two = copy(wn, "a"), copy(wn, "b", batch_size=64)
    three = copy(standard, "c", evaluation_episodes=30)
    (tmp_path / "c" / "summary.json").unlink()
    (tmp_path / "c" / "evaluations.csv").write_text(
        "".join((tmp_path / "c" / "evaluations.csv").read_text().splitlines(keepends=True)[:4])
    )
    three = run_data.read_run(tmp_path / "c")
    found = warnings(group_rows([one, two, three], "param"))
    assert found == [
        "Breakout, standard: 1 of 1 runs not finished.",
        "Breakout, wn: the runs differ in more than the seed: batch_size.",
        "Breakout, wn: a seed occurs more than once, so not all of these runs are independent.",
        "Breakout: the groups have different numbers of seeds (standard 1, wn 2).",
        "Breakout: the groups were trained for different numbers of frames.",
        "Breakout: the runs were evaluated under different protocols.",
        "One seed in some groups: a difference between single runs is no evidence about a method.",
        "No run here was evaluated under the paper's protocol (125,000 agent steps at ε 0.05, no frame cap): the "
        "published scores give the scale only; they cannot be compared directly.",
    ]
    shown = Page(page.render(page.Content([one, two, three], "param")))
    differing = {row["key"][0]: (row["standard"][0], row["wn"][0]) for row in shown.table(
        "Configuration keys that differ, by group")}  # fmt: skip
    assert differing["batch_size"] == ("32", "32; 64")
    assert differing["learning_rate"] == ("0.0001", "0.0003")
    assert not {"seed", "game", "gamma"} & differing.keys()
    rows = {row["param"][0]: row for row in shown.table("Scores by game and group")}
    assert rows["standard"]["each evaluation"][0] == "30 episodes, ε 0.05, cap 108,000 frames"


@pytest.mark.parametrize(
    ("value", "text"), [(12.34, "12.3"), (-20.7, "−20.7"), (1779.0, "1,779"), (-17098.1, "−17,098"), (0.0, "0.0")]
)
def test_scores_are_written_as_a_person_would(value: float, text: str) -> None:
    assert page.points(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(100, "2 min"), (4476, "75 min"), (7200, "2.0 h"), (259_200, "3.0 days")]
)
def test_wall_times_are_written_as_a_person_would(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text
