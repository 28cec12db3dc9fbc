"""Published scores that are printed beside ours, each with its source and with how well it is known.

The marks: C read in a primary source, M from memory of the paper, not re-read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Scores of one game in points; the columns of :data:`SOURCES`."""

    paper_normal: float
    paper_wn: float
    mnih: float


SOURCES = {
    "paper normal": "Salimans & Kingma 2016, normal parameterization: highest test score of all epochs, one run (M; "
    "protocol paper)",
    "paper wn": "the same with weight normalization (M)",
    "Mnih 2015": "Mnih et al. 2015, extended data table 2: DQN (C; protocol nature)",
}
PUBLISHED = {
    "Breakout": Published(410, 403, 401.2),
    "Enduro": Published(1250, 1448, 301.8),
    "Seaquest": Published(7188, 7375, 5286),
    "SpaceInvaders": Published(1779, 2179, 1976),
}
"""The games of the paper's table."""
