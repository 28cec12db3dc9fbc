"""The public DQN reproduction whose protocol is nearest to the paper's: nnabla-rl's three seeds, every 1M frames."""

from __future__ import annotations

import csv

import numpy as np

from wn_rl.report.references import DATA, ReferenceCurve

SOURCE = "sony/nnabla-rl, reproductions/algorithms/atari/dqn: mean of its seeds 1, 10 and 100, and their range"


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
        SOURCE, "nnabla-rl", game, np.array(frames, np.float64), scores.mean(1), scores.min(1), scores.max(1)
    )
