"""The page of the reproduction says what the runs' files say, digit for digit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from wn_rl import cli
from wn_rl.config import TrainConfig
from wn_rl.errors import WnRlError
from wn_rl.report import reproduction, reproduction_tables
from wn_rl.report.experiment_grid import (
    BUDGETS,
    CONFIGURATIONS,
    OTHER_CONFIGURATIONS,
    SEEDS,
    Configuration,
    read_grid,
)
from wn_rl.report.reproduction import differing, fill

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FRAMES = [1_000_004, 2_000_016, 3_000_000, 4_000_008]


def add_run(
    results: Path,
    configuration: Configuration,
    seed: int,
    scores: list[float],
    commit: str | None = "0123abc",
    **changes: object,
) -> Path:
    """A run of preset paper with these scores after each epoch, in the files of a real one."""
    directory = results / "r1" / configuration.run_name(seed)
    shutil.copytree(DOCS / "results" / "quick" / "Breakout-wn-quick-s1", directory)
    frames = [1_000_000 * number + 4 * (number % 3) for number in range(1, len(scores) + 1)]
    keys = {
        "preset": "paper",
        "game": configuration.game,
        "param": configuration.param,
        "batch_size": configuration.batch_size,
        "seed": seed,
        "frames": frames[-1],
        "num_threads": 1,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(keys | changes))
    rows = [f"{count},30,{score},1,0,9,700,10" for count, score in zip(frames, scores, strict=True)]
    (directory / "evaluations.csv").write_text(
        "\n".join(["frames,episodes,mean,std,min,max,mean_length,seconds", *rows]) + "\n"
    )
    summary = json.loads((directory / "summary.json").read_text())
    summary |= {"frames": frames[-1], "seed": seed, "wall_seconds": 5400.0, "num_threads": 1}
    (directory / "summary.json").write_text(json.dumps(summary))
    if commit is not None:
        (directory / "provenance.json").write_text(json.dumps({"commit": commit}))
    return directory


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of one configuration, one of another, batch normalization, other settings, and runs of quick."""
    found = tmp_path / "results"
    shutil.copytree(DOCS / "results" / "quick" / "Pong-wn-quick-s1", found / "quick" / "Pong-wn-quick-s1")
    wn = Configuration("SpaceInvaders", "wn")
    add_run(found, wn, 1, [150.0, 260.5, 240.0, 300.0])
    add_run(found, wn, 2, [140.0, 200.0, 350.0, 330.0])
    add_run(found, wn, 3, [100.0, 210.0, 220.0, 270.0], commit=None)
    add_run(found, Configuration("Breakout", "standard"), 1, [1.25, 4.5, 9.75, 20.06, 31.0])
    add_run(found, Configuration("SpaceInvaders", "bn", 256), 1, [100.0, 110.0, 120.0, 130.0])
    add_run(found, Configuration("Enduro", "wn"), 1, [0.0, 0.0, 1.0, 2.0], num_envs=8)
    return found


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    out = tmp_path / "docs"
    out.mkdir()
    shutil.copy(DOCS / "reproduction.md", out)
    return out


def rows_of(block: str, first: str) -> list[list[str]]:
    """Rows of a table whose first configuration begins so."""
    rows = [
        [configuration.strip() for configuration in line.strip("|").split("|")]
        for line in block.splitlines()
        if line[:1] == "|"
    ]
    return [row for row in rows if row[0].startswith(first)]


def test_the_page_of_this_project_is_that_of_its_files() -> None:
    reproduction.check(DOCS / "results", DOCS)


def test_a_changed_digit_anywhere_in_the_tables_is_found(results: Path, docs: Path) -> None:
    reproduction.rebuild(results, docs)
    reproduction.check(results, docs)
    page = docs / "reproduction.md"
    text = page.read_text()
    inside = re.compile(r"<!-- generated: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
    changed = 0
    for part in inside.finditer(text):
        digits = [found.start() for found in re.finditer(r"\d", part[2])]
        for place in digits[:: max(len(digits) // 3, 1)]:
            at = part.start(2) + place
            page.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
            with pytest.raises(WnRlError, match=rf"does not say what the files in .* say \({part[1]}\)"):
                reproduction.check(results, docs)
            changed += 1
    assert changed > 15
    page.write_text(text)
    evaluations = results / "r1" / "Breakout-standard-paper-s1" / "evaluations.csv"
    evaluations.write_text(evaluations.read_text().replace(",20.06,", ",20.16,"))
    with pytest.raises(WnRlError, match=r"\(paper-table, configurations, references\)"):
        reproduction.check(results, docs)


def test_cells_by_hand(results: Path) -> None:
    """Best of three seeds: 300, 350, 270; final: 300, 330, 270, whose t interval is 300 ± 4.303 · 30/√3."""
    blocks = reproduction_tables.blocks(read_grid(results))
    configurations = {row[1]: row for row in rows_of(blocks["configurations"], "R1")}
    row = configurations["Space Invaders, `wn`"]
    best = np.array([300.0, 350.0, 270.0])
    half = 4.302653 * best.std(ddof=1) / 3**0.5
    assert row[2] == "1, 2, 3"
    assert row[3] == f"306.7 [{best.mean() - half:.1f}, {best.mean() + half:.1f}] (n = 3)"
    assert row[4] == "300.0 [225.5, 374.5] (n = 3)"
    assert row[5:8] == ["95% Student's t interval over seeds", "4M", "16"]
    assert row[8] == "1.50 h"
    assert row[9] == "AMD EPYC, 2 cores, bfloat16, 1 thread"
    assert row[10] == "`0123abc`; not recorded"
    longer = configurations["Breakout, `standard`"]  # 5M frames: cut at 4M, and its wall time is not that of 4M
    assert longer[2:9] == ["1", "20.1", "20.1", "one seed: no band", "5M", "16", "part of a longer run"]
    assert configurations["Space Invaders, `bn`, minibatch 256"][3:5] == ["130.0", "130.0"]
    assert configurations["Enduro, `wn`"][2:] == ["*not run*", *[""] * 8]
    assert len(configurations) == len(CONFIGURATIONS) + len(OTHER_CONFIGURATIONS)
    table = {row[0]: row for row in rows_of(blocks["paper-table"], "")}
    assert table["Space Invaders"][4:6] == ["2,179", f"{row[3]} (4M frames, n = 3)"]
    assert table["Breakout"][1:3] == ["410", "20.1 (4M frames, n = 1)"]
    assert table["Enduro"][5:7] == ["*not run*", "*not run*"]
    runs = {row[0]: row for row in rows_of(blocks["runs"], "`")}
    assert runs["`SpaceInvaders-wn-paper-s2`"][1:9] == [
        *("2", "350.0", "3,000,000", "330.0", "4,000,004", "1.50 h", "`0123abc`", "")
    ]
    assert runs["`Enduro-wn-paper-s1`"][-1] == "`num_envs` 8"
    assert not any("Pong" in name for name in runs)


def test_equal_frames_by_hand(results: Path) -> None:
    block = reproduction_tables.blocks(read_grid(results))["references"]
    assert rows_of(block, "ours, `wn`")[0] == [
        "ours, `wn`",
        *("130.0 (100.0 to 150.0, n = 3)", "223.5 (200.0 to 260.5, n = 3)"),
        *("270.0 (220.0 to 350.0, n = 3)", "300.0 (270.0 to 330.0, n = 3)"),
    ]
    breakout = next(part for part in block.split("\n\n") if part.startswith("| Breakout"))
    assert rows_of(breakout, "ours, `standard`") == [["ours, `standard`", "1.25", "4.50", "9.75", "20.1", "31.0"]]
    # Seeds 1, 10 and 100 after 1M agent steps in sony/nnabla-rl's files: 17.662, 19.967, 22.488.
    assert rows_of(breakout, "nnabla-rl")[0][4] == "20.0 (17.7 to 22.5)"
    assert rows_of(breakout, "dopamine DQN (RMSProp")[0][4] == ""  # nothing published at 4M


def test_the_grid_says_what_is_next(results: Path) -> None:
    grid = read_grid(results)
    following = grid.next_missing(BUDGETS[0])
    assert following is not None
    assert (following.configuration, following.seed) == (Configuration("SpaceInvaders", "standard"), 1)
    assert following.command == (
        "python train.py --preset paper --game SpaceInvaders --param standard --frames 4M --seed 1 "
        "--run-dir runs/r1/SpaceInvaders-standard-paper-s1"
    )
    other = grid.next_missing(BUDGETS[0], OTHER_CONFIGURATIONS, (1,))
    assert other is not None
    assert other.configuration == Configuration("SpaceInvaders", "bn", 64)
    states = {row[0]: row[1:] for row in rows_of(reproduction_tables.blocks(grid)["grid"], "")}
    assert states["Space Invaders, `wn`"] == ["3 of 3 seeds", "not run, **next**", "not run, **next**"]
    assert states["Space Invaders, `standard`"] == ["not run, **next**", "not run", "not run"]
    assert states["Breakout, `standard`"] == ["1 of 3 seeds", "not run", "not run"]
    for configuration in CONFIGURATIONS:
        for seed in SEEDS:
            if not (results / "r1" / configuration.run_name(seed)).exists() and configuration.game != "Enduro":
                add_run(results, configuration, seed, [1.0] * 4)
    assert (
        read_grid(results).next_missing(
            BUDGETS[0], [configuration for configuration in CONFIGURATIONS if configuration.game != "Enduro"]
        )
        is None
    )


@pytest.mark.parametrize(
    "wanted", [*CONFIGURATIONS, *OTHER_CONFIGURATIONS], ids=lambda configuration: configuration.run_name(1)
)
def test_every_command_trains_its_configuration(wanted: Configuration, tmp_path: Path) -> None:
    """Its flags are those of train.py, and the run that they make fills the configuration."""
    words = wanted.command(BUDGETS[0], 2).split()[2:]
    preset, rest = cli.take_option(words, "--preset")
    from wn_rl.config import load, resolve, to_yaml

    config = resolve(cli.parse(TrainConfig, rest, default=load(preset)))
    assert (config.frames, config.seed) == (4_000_000, 2)
    directory = add_run(tmp_path, wanted, 2, [1.0] * 4)
    (directory / "config.yaml").write_text(to_yaml(config))
    assert [run.path for run in read_grid(tmp_path).runs(wanted, BUDGETS[0])] == [directory]


def test_figures_are_drawn_for_games_with_runs(results: Path, docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduction.main([str(results), "--out", str(docs)]) == 0
    assert reproduction.main([str(results), "--out", str(docs), "--check"]) == 0
    written = {path.name for path in docs.iterdir()}
    assert written == {"reproduction.md", "reproduction-SpaceInvaders.png", "reproduction-Breakout.png"}
    with Image.open(docs / "reproduction-SpaceInvaders.png") as picture:
        assert picture.width > 800
    text = (docs / "reproduction.md").read_text()
    shown = set(re.findall(r"\((reproduction-\w+\.png)\)", text))
    assert shown == written - {"reproduction.md"}
    assert "because there is no run: Seaquest, Enduro." in text
    (docs / "reproduction-Breakout.png").unlink()
    capsys.readouterr()
    assert reproduction.main([str(results), "--out", str(docs), "--check"]) == 1
    assert "reproduction-Breakout.png is missing" in capsys.readouterr().err


def test_a_run_that_later_code_resumed_names_both(results: Path, docs: Path) -> None:
    run = results / "r1" / "SpaceInvaders-wn-paper-s2"
    (run / "provenance.json").write_text('{"commit": ["0123abc", "4567def"]}')
    assert reproduction.main([str(results), "--out", str(docs)]) == 0
    assert "| 1.50 h | `0123abc`, `4567def` |" in (docs / "reproduction.md").read_text()


def test_what_cannot_be_read_is_one_line_and_leaves_the_page(
    results: Path, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = docs / "reproduction.md"
    before = page.read_bytes()

    def fails(message: str) -> None:
        assert reproduction.main([str(results), "--out", str(docs)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert message in said
        assert page.read_bytes() == before

    run = results / "r1" / "SpaceInvaders-wn-paper-s2"
    good = (run / "evaluations.csv").read_text()
    (run / "evaluations.csv").write_text(good.replace("350.0", "many"))
    fails("evaluations.csv is damaged")
    (run / "evaluations.csv").write_text(good)
    for told in ("| x |", [], [7], ["0123abc", "| x |"], None):
        (run / "provenance.json").write_text(json.dumps({"commit": told}))
        fails("provenance.json must hold")
    (run / "provenance.json").write_text("{")
    fails("provenance.json is damaged")
    (run / "provenance.json").unlink()
    before = page.read_bytes().replace(b"<!-- generated: configurations -->", b"<!-- generated: settings -->")
    page.write_bytes(before)
    fails("there is no part 'settings'")
    page.unlink()
    assert reproduction.main([str(results), "--out", str(docs)]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert reproduction.main([str(tmp_path / "nowhere"), "--out", str(docs)]) == 1
    assert "no directory of results" in capsys.readouterr().err


def test_markers() -> None:
    page = "a\n<!-- generated: x -->\nold\n<!-- end -->\nb\n<!-- generated: y-z -->\n<!-- end -->\n"
    new = fill(page, {"x": "1\n2", "y-z": "3"})
    assert new == (
        "a\n<!-- generated: x -->\n\n1\n2\n\n<!-- end -->\nb\n<!-- generated: y-z -->\n\n3\n\n<!-- end -->\n"
    )
    assert fill(new, {"x": "1\n2", "y-z": "3"}) == new
    assert differing(page, new) == ["x", "y-z"]
    assert differing(new, fill(new, {"x": "1\n2", "y-z": "4"})) == ["y-z"]
    for damaged, message in (
        (page.replace("old\n<!-- end -->\n", ""), "inside another part"),
        (page.removesuffix("<!-- end -->\n"), "'y-z' has no end"),
        (page.replace("y-z", "x"), "a second time"),
        ("<!-- end -->\n" + page, "without a generated part before it"),
        ("", "the page has no part 'x'"),
    ):
        with pytest.raises(WnRlError, match=message):
            fill(damaged, {"x": "", "y-z": ""})
