"""Published curves are those of their files, and agree with each other."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from wn_rl.report import published
from wn_rl.report.experiment_grid import GAMES
from wn_rl.report.published import nnabla_curve, public_curves

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("game", GAMES)
def test_the_public_curve_in_full_agrees_with_its_summary(game: str) -> None:
    full = nnabla_curve(game)
    assert full is not None
    assert full.frames.tolist() == [1e6 * number for number in range(1, 201)]
    (short,) = (curve for curve in public_curves(game) if curve.source.startswith("nnabla"))
    at = np.searchsorted(full.frames, short.frames)
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(getattr(full, name)[at], getattr(short, name), atol=0.006)
    assert nnabla_curve("Pong") is None


def test_the_data_of_the_public_runs_has_three_seeds_each() -> None:
    with open(ROOT / "wn_rl" / "report" / "data" / "nnabla_rl_dqn.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * 3 * 200
    assert {row["seed"] for row in rows} == {"1", "10", "100"}
