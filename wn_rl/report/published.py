"""Published scores and learning curves that are shown beside ours, each with its source.

For scores, the source says how well they are known: read in the paper, or from memory of it, not re-read. For curves,
``data/README.md`` says where each number comes from: the paper's digitized figure, and public reproductions of DQN.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Published:
    """Scores of one game in points; the columns of :data:`SOURCES`."""

    paper_normal: float
    paper_wn: float
    mnih: float


SOURCES = {
    "paper normal": "Salimans & Kingma 2016, normal parameterization: highest evaluation return of all epochs, one "
    "run (from memory, not re-read; protocol paper)",
    "paper wn": "the same with weight normalization (from memory, not re-read)",
    "Mnih 2015": "Mnih et al. 2015, extended data table 2: DQN (read in the paper; protocol nature)",
}
PUBLISHED = {
    "Breakout": Published(410, 403, 401.2),
    "Enduro": Published(1250, 1448, 301.8),
    "Seaquest": Published(7188, 7375, 5286),
    "SpaceInvaders": Published(1779, 2179, 1976),
}
"""The games of the paper's table."""


DATA = Path(__file__).parent / "data"
PAPER_EPOCH_FRAMES = 1_000_000
"""An epoch of the paper: 250,000 agent steps of 4 emulator frames."""
PAPER_GAME = "SpaceInvaders"
"""The only game whose curve the paper shows."""
PAPER_SOURCE = "Salimans & Kingma 2016, digitized from the figure (±10 points), one run each"


@dataclass(frozen=True)
class ReferenceCurve:
    """A published learning curve.

    Attributes:
        source: who published it, and how it was measured.
        label: short name for a legend.
        game: its name, as in :mod:`wn_rl.atari.games`.
        frames: emulator frames, float64, shape (n,), increasing.
        mean: score in raw points, float64, shape (n,): over seeds, or of the one run that there was.
        low: lowest seed, or lower edge of a digitized line; shape (n,).
        high: highest seed, or upper edge of the line; shape (n,).
    """

    source: str
    label: str
    game: str
    frames: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def paper_curves() -> tuple[ReferenceCurve, ...]:
    """Return the paper's two curves of Space Invaders: normal parameterization, weight normalization.

    ``mean`` is the middle of the drawn line. Points where the other line hides it are left out.
    """
    rows = _rows("wn_paper_space_invaders_curve.csv")
    curves = []
    for column, label in (("normal", "paper, normal"), ("wn", "paper, weight norm")):
        seen = [row for row in rows if row[f"{column}_lo"] and row[f"{column}_hi"]]
        low = np.array([float(row[f"{column}_lo"]) for row in seen])
        high = np.array([float(row[f"{column}_hi"]) for row in seen])
        frames = np.array([float(row["epoch"]) for row in seen]) * PAPER_EPOCH_FRAMES
        curves.append(ReferenceCurve(PAPER_SOURCE, label, PAPER_GAME, frames, (low + high) / 2, low, high))
    return tuple(curves)


def public_curves(game: str) -> tuple[ReferenceCurve, ...]:
    """Return the public reproductions' curves of a game, one per source; none where the game is not among them.

    Args:
        game: its name, e.g. ``SpaceInvaders``.
    """
    by_source: dict[str, list[dict[str, str]]] = {}
    for row in _rows("dqn_reference_curves.csv"):
        if row["game"] == game:
            by_source.setdefault(row["source"], []).append(row)
    curves = []
    for source, rows in by_source.items():
        frames, mean, low, high = (
            np.array([float(row[column]) for row in rows]) for column in ("frames_M", "mean_over_seeds", "min", "max")
        )
        curves.append(ReferenceCurve(source, source, game, frames * 1e6, mean, low, high))
    return tuple(curves)


def _rows(name: str) -> list[dict[str, str]]:
    with open(DATA / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


NNABLA_SOURCE = "sony/nnabla-rl, reproductions/algorithms/atari/dqn: mean of its seeds 1, 10 and 100, and their range"


def nnabla_curve(game: str) -> ReferenceCurve | None:
    """Return the curve of one of the paper's games over three seeds, or None for another game.

    Args:
        game: its name, e.g. ``SpaceInvaders``.
    """
    by_frames: dict[int, list[float]] = {}
    with open(DATA / "nnabla_rl_dqn.csv", newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["game"] == game:
                by_frames.setdefault(int(row["frames"]), []).append(float(row["mean"]))
    if not by_frames:
        return None
    frames = sorted(by_frames)
    scores = np.array([by_frames[count] for count in frames])
    return ReferenceCurve(
        NNABLA_SOURCE, "nnabla-rl", game, np.array(frames, np.float64), scores.mean(1), scores.min(1), scores.max(1)
    )
