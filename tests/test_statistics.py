"""Aggregates against values worked out by hand, and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wn_rl.evaluation import statistics
from wn_rl.evaluation.statistics import (
    Estimate,
    improvement_with_interval,
    interquartile_mean,
    mean,
    mean_interval,
    median,
    probability_of_improvement,
    with_interval,
)

HAND = {"A": [1.0, 2.0, 3.0, 6.0], "B": [10.0, 20.0, 30.0, 100.0]}
SCORES = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=7)
SUITES = st.dictionaries(st.sampled_from("ABCD"), SCORES, min_size=1, max_size=4)


def test_hand_worked_aggregates() -> None:
    assert mean(HAND) == (12 / 4 + 160 / 4) / 2 == 21.5
    assert median({**HAND, "C": [7.0]}) == 7.0  # the game means are 3, 40 and 7
    assert median({"A": HAND["A"]}) == 2.5  # of one game, over its runs
    # Sorted: 1 2 | 3 6 10 20 | 30 100: the middle half of eight.
    assert interquartile_mean(HAND) == (3 + 6 + 10 + 20) / 4
    # Of six, one goes on each side: ⌊6/4⌋.
    assert interquartile_mean({"A": [1.0, 2.0, 3.0], "B": [4.0, 5.0, 60.0]}) == (2 + 3 + 4 + 5) / 4
    assert interquartile_mean({"A": [1.0, 2.0, 9.0]}) == 4.0  # nothing to leave out


def test_hand_worked_probability_of_improvement() -> None:
    # Game A: of 2 × 2 pairs, 3 beats 1 and 2, 2 beats 1 and ties with 2: 3.5 of 4. Game B: 0 of 1.
    x, y = {"A": [3.0, 2.0], "B": [0.0]}, {"B": [5.0], "A": [1.0, 2.0]}
    assert probability_of_improvement(x, y) == pytest.approx((3.5 / 4 + 0) / 2)
    assert probability_of_improvement(x, x) == 0.5


def test_hand_worked_intervals() -> None:
    # Four runs: a resample has mean 0 or 2 with probability 1/16 each, so both lie beyond the middle 95%'s ends.
    assert mean_interval([0.0, 2.0, 0.0, 2.0]) == Estimate(1.0, 0.0, 2.0, (4,))
    # Runs are drawn within their game: B's never take A's place, so the mean moves by A's half alone.
    assert with_interval(mean, {"A": [0.0, 2.0, 0.0, 2.0], "B": [10.0] * 3}) == Estimate(5.5, 5.0, 6.0, (7,))
    assert with_interval(mean, {"A": [3.0], "B": [5.0]}) == Estimate(4.0, None, None, (2,))
    # Of x resampled all are 0, or all 4, one time in 16 each, against 2: P = 0 and 1.
    assert improvement_with_interval({"A": [0.0, 4.0] * 2}, {"A": [2.0] * 3}) == Estimate(0.5, 0.0, 1.0, (4, 3))
    assert improvement_with_interval({"A": [1.0]}, {"A": [2.0]}) == Estimate(0.0, None, None, (1, 1))
    assert str(Estimate(1.0, 0.5, 2.0)) == "1 [0.5, 2]"
    assert str(Estimate(1.0, None, None)) == "1"


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        # The chance that a resample is one and the same run every time, against 2.5%.
        ([2], False),  # 1/4
        ([3], False),  # 1/27 = 3.7%
        ([4], True),  # 1/256
        ([2, 2], False),  # 1/16 = 6.3%
        ([2, 2, 2], False),  # 1/64, but two runs of a game
        ([3, 3], True),  # 1/729
        ([1] * 50, False),  # never resampled
        ([3, 1, 1], False),
        ([3, 2], False),
        ([3, 4], True),
    ],
)
def test_below_so_many_runs_a_bootstrap_says_nothing(runs: list[int], says: bool) -> None:
    rng = np.random.default_rng(0)
    scores = {str(game): rng.normal(size=count).tolist() for game, count in enumerate(runs)}
    assert statistics.is_informative([scores]) == says
    estimate = with_interval(mean, scores)
    assert (estimate.low is not None) == says
    assert estimate.n == (sum(runs),)
    assert estimate.sample_size == (f"n = {sum(runs)}" if says else f"n = {sum(runs)}: no interval")


def test_no_probability_of_improvement_is_certain() -> None:
    """Two seeds against two, and three against three that all lie above: 0.0% [0.0%, 0.0%] would be a lie."""
    for n in (2, 3, 6):
        found = improvement_with_interval({"A": [1.0, 2, 3, 4, 5, 6][:n]}, {"A": [7.0, 8, 9, 10, 11, 12][:n]})
        assert found == Estimate(0.0, None, None, (n, n))
        assert found.sample_size == f"n = {n} and {n}: no interval"
    assert with_interval(median, {"A": [4.0] * 9}) == Estimate(4.0, None, None, (9,))


@given(scores=SUITES)
@settings(deadline=None)
def test_scipy_agrees_on_the_trimmed_mean(scores: dict[str, list[float]]) -> None:
    pooled = [value for runs in scores.values() for value in runs]
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(pooled, 0.25))
    assert mean(scores) == pytest.approx(np.mean([np.mean(runs) for runs in scores.values()]))


@given(x=SCORES, y=SCORES)
@settings(deadline=None)
def test_scipy_agrees_on_the_probability_of_improvement(x: list[float], y: list[float]) -> None:
    wins = stats.mannwhitneyu(x, y).statistic
    assert probability_of_improvement({"A": x}, {"A": y}) == pytest.approx(wins / (len(x) * len(y)))


def test_scipy_agrees_on_the_bootstrap_interval() -> None:
    values = np.random.default_rng(3).gamma(2.0, 10.0, size=25)
    found = mean_interval(values)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.value == values.mean()
    assert found.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = [
        low <= 5.0 <= high
        for e in (mean_interval(rng.normal(5.0, 2.0, size=30)) for _ in range(150))
        if (low := e.low) is not None and (high := e.high) is not None
    ]
    assert len(held) == 150
    assert 0.89 <= np.mean(held) <= 0.99


@given(x=SUITES, seed=st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_properties(x: dict[str, list[float]], seed: int) -> None:
    y = {game: [value + 1 for value in runs] for game, runs in x.items()}
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1.0)
    for statistic in (mean, median, interquartile_mean):
        estimate = with_interval(statistic, x, seed)
        assert estimate == with_interval(statistic, x, seed)  # a function of scores and seed
        lowest, highest = min(map(min, x.values())), max(map(max, x.values()))
        assert lowest - 1e-9 <= estimate.value <= highest + 1e-9
        if estimate.low is not None and estimate.high is not None:
            assert lowest - 1e-9 <= estimate.low <= estimate.high <= highest + 1e-9


def test_many_scores_take_neither_long_nor_much_memory() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    estimate = mean_interval(values)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / np.sqrt(100_000), rel=0.15)


def test_nothing_and_other_games_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        mean({})
    with pytest.raises(ValueError, match="at least one run"):
        median({"A": []})
    with pytest.raises(ValueError, match="only one side has B"):
        probability_of_improvement({"A": [1.0]}, {"A": [1.0], "B": [1.0]})
    assert statistics.CONFIDENCE == 0.95
