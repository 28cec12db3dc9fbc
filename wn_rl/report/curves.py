"""Learning curves of runs as a picture: ``python -m wn_rl.report.curves RUN… --out FILE.png``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig, load
from wn_rl.errors import UsageError, WnRlError, closest, one_line
from wn_rl.runs import RunDirectory, read_rows

COLOURS = {"standard": "#D55E00", "wn": "#0072B2"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""
WINDOW = 5
"""Evaluations in the running mean."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run.

    Attributes:
        config: of the run.
        frames: emulator frames of each evaluation, shape (n,).
        means: mean raw score of each, shape (n,).
    """

    config: TrainConfig
    frames: NDArray[np.float64]
    means: NDArray[np.float64]

    def smoothed(self) -> NDArray[np.float64]:
        """Return the mean of each evaluation and up to ``WINDOW − 1`` before it, shape (n,)."""
        return np.array([self.means[max(0, i - WINDOW + 1) : i + 1].mean() for i in range(len(self.means))])


def read_curve(directory: Path) -> Curve:
    """Return the evaluation curve of a run directory.

    Raises:
        WnRlError: it is no run, or has no evaluation yet.
    """
    run = RunDirectory(directory)
    try:
        config = load(None, run.config)
    except UsageError as error:
        raise WnRlError(f"{directory} is not a run: {error}") from None
    rows = read_rows(run.evaluations)
    if not rows:
        raise WnRlError(f"{directory} has no evaluation yet")
    return Curve(
        config, np.array([float(row["frames"]) for row in rows]), np.array([float(row["mean"]) for row in rows])
    )


def draw(curves: Sequence[Curve], out: Path, by: str = "param") -> None:
    """Draw one panel per game, one line per run, into a PNG, SVG or PDF file.

    Args:
        curves: of the runs.
        out: the file.
        by: the configuration key that the colours stand for.

    Raises:
        UsageError: the file's ending is not one of these, or there is no such key.
        WnRlError: matplotlib is missing, or the file cannot be written.
    """
    if by not in {entry.name for entry in fields(TrainConfig)}:
        raise UsageError(f"--by {by}: no such configuration key.{closest(by, [e.name for e in fields(TrainConfig)])}")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{out}: name a .png, .svg or .pdf file")
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise WnRlError("drawing needs matplotlib: pip install matplotlib") from None
    games = sorted({curve.config.game for curve in curves})
    values = sorted({str(getattr(curve.config, by)) for curve in curves})
    others = iter(OTHER_COLOURS)
    colours = {value: COLOURS.get(value) or next(others, "#777777") for value in values}
    figure, axes = plt.subplots(
        1, len(games), figsize=(1.0 + 4.6 * len(games), 3.8), squeeze=False, layout="constrained"
    )
    for panel, game in zip(axes[0], games, strict=True):
        for value in values:
            alike = [c for c in curves if (c.config.game, str(getattr(c.config, by))) == (game, value)]
            for index, curve in enumerate(alike):
                label = f"{value} (n = {len(alike)})" if index == 0 else None
                panel.plot(curve.frames / 1e6, curve.means, ".", color=colours[value], alpha=0.35, markersize=4)
                panel.plot(curve.frames / 1e6, curve.smoothed(), color=colours[value], linewidth=1.8, label=label)
        if (random_score := find_game(game).random_score) is not None:
            panel.axhline(random_score, color="#999999", linewidth=0.8, linestyle=":", label="random play")
        panel.set_title(game)
        panel.set_xlabel("emulator frames (millions)")
        panel.set_ylim(bottom=min(0.0, *(curve.means.min() for curve in curves if curve.config.game == game)))
        panel.set_ylabel("test score (raw points)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    presets = ", ".join(sorted({curve.config.preset for curve in curves}))
    figure.supxlabel(
        f"Preset {presets}. Dots: one evaluation; lines: mean of the last {WINDOW} evaluations of one run (one seed).",
        fontsize=8,
        color="#555555",
    )
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise WnRlError(f"cannot write {out}: {error.strerror}") from None
    finally:
        plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wn_rl.report.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf file")
    parser.add_argument("--by", default="param", metavar="KEY", help="configuration key for the colours (param)")
    wanted = parser.parse_args(arguments)
    try:
        draw([read_curve(directory) for directory in wanted.runs], wanted.out, wanted.by)
    except WnRlError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
