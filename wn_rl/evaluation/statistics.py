"""Aggregates over runs and games with bootstrap intervals, after Agarwal et al. 2021 (arXiv 2108.13264).

A *score* here is one run's mean return over its evaluation episodes. ``scores`` maps each game to the scores of its
runs (seeds). An aggregate over several games needs human-normalized scores: raw points of different games have no
common scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
FEWEST = 3
"""Runs of each game below which there is no interval."""
RESAMPLES = 10_000
"""Bootstrap resamples; a tenth of them if there are more than :data:`MANY_SCORES` scores, to save time."""
MANY_SCORES = 20_000
BLOCK = 2**21
"""Largest number of values drawn at once, which limits memory."""

Scores = Mapping[str, Sequence[float] | NDArray[np.float64]]
_Resampled = list[NDArray[np.float64]]
"""One array (resamples, runs) for each game."""


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95% interval.

    Attributes:
        value: of the statistic.
        low: lower end; None if a bootstrap is not informative, see :func:`is_informative`.
        high: upper end, likewise.
        n: number of scores; of a comparison, on either side.
    """

    value: float
    low: float | None
    high: float | None
    n: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def sample_size(self) -> str:
        """The number of scores in words, and "no interval" if there is none."""
        count = f"n = {' and '.join(map(str, self.n))}"
        return f"{count}: no interval" if self.low is None else count


def mean(scores: Scores) -> float:
    """Return the mean over games of each game's mean over runs."""
    return float(_mean(_as_resampled(scores))[0])


def median(scores: Scores) -> float:
    """Return the median over games of each game's mean over runs; for one game, the median over its runs.

    With one game the former would be the mean over runs, which is :func:`mean`.
    """
    return float(_median(_as_resampled(scores))[0])


def interquartile_mean(scores: Scores) -> float:
    """Return the mean of the middle half of all runs of all games.

    The ⌊n/4⌋ lowest and the ⌊n/4⌋ highest of n scores are left out: the 25% trimmed mean. A game with more runs than
    another has more weight.
    """
    return float(_interquartile_mean(_as_resampled(scores))[0])


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """Return the probability that a random run of ``x`` beats one of ``y`` on a random game; a tie counts one half.

    Raises:
        ValueError: not the same games.
    """
    _same_games(x, y)
    return float(_improvement(_as_resampled(x), _as_resampled({game: y[game] for game in x}))[0])


def is_informative(sides: Sequence[Scores]) -> bool:
    """Return whether a bootstrap of these scores gives more than their minimum and maximum.

    A resample that draws the same run every time must be rarer than 2.5%, the tail beyond an end of the interval;
    otherwise that end is simply the minimum or the maximum. Its probability is 1/4 for two runs of one game, 1/27 for
    three, 1/256 for four; for several games it is the product. With fewer than :data:`FEWEST` runs of any game, that
    game's contribution to the interval is far too narrow.
    """
    counts = [len(runs) for side in sides for runs in side.values()]
    log = -sum(count * math.log(count) for count in counts)
    return min(counts) >= FEWEST and log < math.log((1 - CONFIDENCE) / 2)


def with_interval(statistic: Callable[[Scores], float], scores: Scores, seed: int = 0) -> Estimate:
    """Return one of the statistics above with its stratified bootstrap interval.

    Runs are drawn with replacement within each game, as often as it has runs; the interval holds the middle 95% of
    what the statistic then is. It is about other seeds on the same games. There is none if :func:`is_informative` is
    false, or if all resamples give the same value, which would look like certainty.

    Args:
        statistic: :func:`mean`, :func:`median` or :func:`interquartile_mean`.
        scores: by game.
        seed: of the resampling.
    """
    known: dict[Callable[[Scores], float], Callable[[_Resampled], NDArray[np.float64]]]
    known = {mean: _mean, median: _median, interquartile_mean: _interquartile_mean}
    vectorized = known[statistic]
    value, n = statistic(scores), (_count(scores),)
    if not is_informative([scores]):
        return Estimate(value, None, None, n)
    return _percentiles(value, _bootstrap(lambda resampled: vectorized(resampled[0]), [scores], seed), n)


def improvement_with_interval(x: Scores, y: Scores, seed: int = 0) -> Estimate:
    """Return :func:`probability_of_improvement` with its stratified bootstrap interval; both sides are resampled.

    Raises:
        ValueError: not the same games.
    """
    value, n = probability_of_improvement(x, y), (_count(x), _count(y))
    sides = [x, {game: y[game] for game in x}]
    if not is_informative(sides):
        return Estimate(value, None, None, n)
    return _percentiles(value, _bootstrap(lambda resampled: _improvement(*resampled), sides, seed), n)


def mean_interval(values: Sequence[float] | NDArray[np.float64], seed: int = 0) -> Estimate:
    """Return the mean of single values, e.g. of one network's episodes, with its bootstrap interval."""
    return with_interval(mean, {"": values}, seed)


def _as_resampled(scores: Scores) -> _Resampled:
    if not scores or not all(len(runs) for runs in scores.values()):
        raise ValueError("a statistic needs at least one run")
    return [np.asarray(runs, np.float64)[None] for runs in scores.values()]


def _bootstrap(
    statistic: Callable[[list[_Resampled]], NDArray[np.float64]], sides: Sequence[Scores], seed: int
) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    count = sum(len(runs) for side in sides for runs in side.values())
    resamples = RESAMPLES if count <= MANY_SCORES else RESAMPLES // 10
    block = max(1, min(resamples, BLOCK // count))
    return np.concatenate(
        [
            statistic([_resample(side, rng, min(block, resamples - done)) for side in sides])
            for done in range(0, resamples, block)
        ]
    )


def _resample(scores: Scores, rng: np.random.Generator, resamples: int) -> _Resampled:
    drawn = []
    for runs in scores.values():
        values = np.asarray(runs, np.float64)
        drawn.append(values[rng.integers(len(values), size=(resamples, len(values)))])
    return drawn


def _mean(games: _Resampled) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.mean([runs.mean(1) for runs in games], axis=0)
    return means


def _median(games: _Resampled) -> NDArray[np.float64]:
    one = games[0] if len(games) == 1 else np.stack([runs.mean(1) for runs in games], axis=1)
    medians: NDArray[np.float64] = np.median(one, axis=1)
    return medians


def _interquartile_mean(games: _Resampled) -> NDArray[np.float64]:
    ordered = np.sort(np.concatenate(games, axis=1), axis=1)
    cut = ordered.shape[1] // 4
    middle: NDArray[np.float64] = ordered[:, cut : ordered.shape[1] - cut].mean(1)
    return middle


def _improvement(x: _Resampled, y: _Resampled) -> NDArray[np.float64]:
    by_game = []
    for ours, theirs in zip(x, y, strict=True):
        wins = np.zeros(len(ours))
        for run in range(ours.shape[1]):  # a loop over one side keeps memory at (resamples, runs)
            one = ours[:, run : run + 1]
            wins += (one > theirs).mean(1) + 0.5 * (one == theirs).mean(1)
        by_game.append(wins / ours.shape[1])
    improvement: NDArray[np.float64] = np.mean(by_game, axis=0)
    return improvement


def _count(scores: Scores) -> int:
    return sum(len(runs) for runs in scores.values())


def _percentiles(value: float, resampled: NDArray[np.float64], n: tuple[int, ...]) -> Estimate:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if np.ptp(resampled) <= 1e-12 * abs(
        value
    ):  # but for rounding: say, every run of one side above every run of the other
        return Estimate(value, None, None, n)
    return Estimate(value, float(low), float(high), n)


def _same_games(x: Scores, y: Scores) -> None:
    if set(x) != set(y):
        raise ValueError(f"not the same games: only one side has {', '.join(sorted(set(x) ^ set(y)))}")
