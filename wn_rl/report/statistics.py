"""Means and confidence intervals over seeds, of single values and of curves; smoothing and binning of curves.

The kind of interval depends on the number of seeds and is printed beside it: none for one seed, the range for two, the
95% interval of Student's t for three and more. Bootstrap intervals over runs and games are in
:mod:`wn_rl.evaluation.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
WINDOW = 5
"""Default of the largest number of evaluations in a running mean."""
SHARE = 10
"""A running mean is over a tenth of the points at most; over more, the end of a short curve is far from its score."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A quantity of one run over its training frames.

    Attributes:
        frames: emulator frames, shape (n,), increasing.
        values: shape (n,).
    """

    frames: Array
    values: Array

    def window(self, most: int) -> int:
        """Return the number of points in the running mean: ``most``, at most a tenth of the curve, at least 1."""
        return max(1, min(most, len(self.values) // SHARE))

    def smoothed(self, most: int) -> Curve:
        """Return the running mean: of each point and those before it, :meth:`window` points in total."""
        window = self.window(most)
        if window == 1:
            return self
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        ends = np.arange(1, len(self.values) + 1)
        starts = np.maximum(ends - window, 0)
        return Curve(self.frames, (sums[ends] - sums[starts]) / (ends - starts))


@dataclass(frozen=True)
class Band:
    """The mean of several runs' curves, at the frames that all of them cover.

    Attributes:
        frames: emulator frames, shape (k,); k is 0 where no frame is in the range of every run.
        mean: over the runs, shape (k,).
        low: lower end of the band, shape (k,), or None for a single run.
        high: upper end, likewise.
        runs: their number.
    """

    frames: Array
    mean: Array
    low: Array | None
    high: Array | None
    runs: int


@dataclass(frozen=True)
class Interval:
    """The mean of one value per seed with the ends of its interval, which are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    runs: int


def meaning(runs: int) -> str:
    """Return in words what the band or interval of this number of runs is."""
    if runs < 2:
        return "one seed: no band"
    return "range of the two seeds" if runs == 2 else "95% Student's t interval over seeds"


def interval(values: Sequence[float] | Array) -> Interval:
    """Return the mean of one value per seed, at least one, with its interval."""
    mean, low, high = _band(np.asarray(values, np.float64)[:, None])
    if low is None or high is None:
        return Interval(float(mean[0]), None, None, len(values))
    return Interval(float(mean[0]), float(low[0]), float(high[0]), len(values))


def over_seeds(curves: Sequence[Curve]) -> Band:
    """Return the mean of curves and its band over the frames that all of them cover.

    The grid is that of the curve with the fewest points there, and the ends of the common range. On it the other
    curves are interpolated linearly, never beyond their own first or last point.
    """
    if len(curves) == 1:
        return Band(curves[0].frames, curves[0].values, None, None, 1)
    first = max(float(curve.frames[0]) for curve in curves)
    last = min(float(curve.frames[-1]) for curve in curves)
    if first > last:
        return Band(np.empty(0), np.empty(0), np.empty(0), np.empty(0), len(curves))
    inside = [curve.frames[(curve.frames > first) & (curve.frames < last)] for curve in curves]
    grid = np.unique(np.concatenate([[first], min(inside, key=len), [last]]))
    values = np.stack([np.interp(grid, curve.frames, curve.values) for curve in curves])
    mean, low, high = _band(values)
    return Band(grid, mean, low, high, len(curves))


def binned(frames: Array, values: Array, longest: float, count: int) -> Curve | None:
    """Return the mean of ``values`` in each non-empty one of ``count`` equal bins of (0, longest], at its middle.

    None if there are no values. A value at the very end belongs to the last bin, one at 0 to the first.
    """
    if not len(frames):
        return None
    bins = np.clip(np.ceil(frames * (count / longest)).astype(np.int64) - 1, 0, count - 1)
    found, place = np.unique(bins, return_inverse=True)
    means: Array = np.bincount(place, values) / np.bincount(place)
    return Curve((found.astype(np.float64) + 0.5) * (longest / count), means)


def t_quantile(degrees: int) -> float:
    """Return the t that the absolute value of a Student-t variable exceeds with probability 5%.

    Its distribution function is a finite sum for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4);
    bisection inverts it.

    Args:
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _inside(middle, degrees) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _inside(angle: float, degrees: int) -> float:
    """Return P(|T| ≤ √degrees · tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _band(values: Array) -> tuple[Array, Array | None, Array | None]:
    """Return mean, low and high of shape (k,) from values of shape (runs, k)."""
    runs = len(values)
    mean: Array = values.mean(0)
    if runs == 1:
        return mean, None, None
    if runs == 2:
        return mean, values.min(0), values.max(0)
    half = t_quantile(runs - 1) * values.std(0, ddof=1) / math.sqrt(runs)
    return mean, mean - half, mean + half
