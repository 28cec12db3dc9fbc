"""The band around a mean over seeds: by hand, against scipy, and what must hold for any curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wn_rl.report.statistics import Curve, binned, interval, meaning, over_seeds, t_quantile

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


def curve(frames: list[float], values: list[float]) -> Curve:
    return Curve(np.array(frames, float), np.array(values, float))


@st.composite
def curves(draw: st.DrawFn) -> list[Curve]:
    """Up to six curves, each on a grid of its own."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        frames = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=12)))
        values = draw(st.lists(NUMBERS, min_size=len(frames), max_size=len(frames)))
        found.append(curve([float(frame) for frame in frames], values))
    return found


def test_t_is_the_one_of_the_tables_and_of_scipy() -> None:
    assert t_quantile(1) == pytest.approx(12.706, abs=5e-4)
    assert t_quantile(2) == pytest.approx(4.303, abs=5e-4)
    for degrees in (*range(1, 40), 1000):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


def test_intervals_of_one_two_and_three_seeds_by_hand() -> None:
    one = interval([7.0])
    assert (one.mean, one.low, one.high, one.runs) == (7.0, None, None, 1)
    two = interval([7.0, 1.0])
    assert (two.mean, two.low, two.high) == (4.0, 1.0, 7.0)
    three = interval([1.0, 2.0, 3.0])  # standard deviation 1, so ± 4.303 / √3
    assert (three.mean, three.low, three.high) == (
        2.0,
        pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5),
        pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5),
    )
    low, high = stats.t.interval(0.95, 4, loc=np.mean([3, 1, 4, 1, 5]), scale=stats.sem([3, 1, 4, 1, 5]))
    five = interval([3.0, 1.0, 4.0, 1.0, 5.0])
    assert (five.low, five.high) == (pytest.approx(low), pytest.approx(high))
    assert [meaning(count).split()[0] for count in (1, 2, 3, 9)] == ["one", "range", "95%", "95%"]


def test_different_grids_are_interpolated_and_never_extrapolated() -> None:
    fine = curve([0, 10, 20, 30, 40], [0, 10, 20, 30, 40])
    coarse = curve([5, 25, 35], [1, 3, 5])
    band = over_seeds([fine, coarse])
    assert band.frames.tolist() == [5, 25, 35]
    assert band.low is not None
    assert band.high is not None
    assert band.low.tolist() == [1, 3, 5]
    assert band.high.tolist() == [5, 25, 35]
    assert band.mean.tolist() == [3, 14, 20]
    apart = over_seeds([curve([0, 10], [1, 2]), curve([20, 30], [1, 2])])
    assert apart.frames.size == apart.mean.size == 0


def test_a_running_mean_is_over_what_came_before() -> None:
    values = [4.0, 2, 6, 1, *[0] * 24, 3, 9]
    smoothed = curve(list(range(1, 31)), values).smoothed(3)
    assert smoothed.values.tolist() == pytest.approx([4, 3, 4, 3, 7 / 3, 1 / 3, *[0] * 22, 1, 4])
    assert curve([1, 2], [4, 2]).smoothed(1).values.tolist() == [4, 2]


@pytest.mark.parametrize(("points", "window"), [(1, 1), (4, 1), (19, 1), (20, 2), (39, 3), (50, 5), (400, 5)])
def test_a_running_mean_is_over_a_tenth_of_a_curve_at_most(points: int, window: int) -> None:
    """Over four evaluations 2.0, 13.5, 45.0 and 45.9 the line ends at 45.9, the score."""
    one = curve(list(range(1, points + 1)), [float(value) for value in range(points)])
    assert one.window(5) == window
    assert one.smoothed(5).values[-1] == pytest.approx(points - 1 - (window - 1) / 2)
    assert curve([1, 2, 3, 4], [2.0, 13.5, 45.0, 45.9]).smoothed(5).values.tolist() == [2.0, 13.5, 45.0, 45.9]


@settings(deadline=None)
@given(curves())
def test_what_holds_for_any_band(seeds: list[Curve]) -> None:
    band = over_seeds(seeds)
    first, last = max(one.frames[0] for one in seeds), min(one.frames[-1] for one in seeds)
    assert band.runs == len(seeds)
    assert (np.diff(band.frames) > 0).all()
    if len(seeds) == 1:
        assert band.low is None
        assert band.high is None
        np.testing.assert_array_equal(band.mean, seeds[0].values)
        return
    assert band.low is not None
    assert band.high is not None
    assert ((first <= band.frames) & (band.frames <= last)).all()
    assert (len(band.frames) > 0) == (first <= last)
    slack = 1e-6
    assert (band.low <= band.mean + slack).all()
    assert (band.mean <= band.high + slack).all()
    for index, frames in enumerate(band.frames):
        values = [float(np.interp(frames, one.frames, one.values)) for one in seeds]
        assert min(values) - slack <= band.mean[index] <= max(values) + slack
        if len(seeds) == 2:
            assert (band.low[index], band.high[index]) == (min(values), max(values))
    backwards = over_seeds(seeds[::-1])
    if len(backwards.frames) == len(band.frames):
        np.testing.assert_allclose(backwards.mean[[0, -1][: len(band.frames)]], band.mean[[0, -1][: len(band.frames)]])


@settings(deadline=None, max_examples=50)
@given(st.lists(NUMBERS, min_size=3, max_size=8), NUMBERS)
def test_an_interval_moves_with_its_values_and_a_curve_has_that_of_its_points(values: list[float], by: float) -> None:
    here, there = interval(values), interval([value + by for value in values])
    assert here.low is not None
    assert there.low is not None
    assert there.mean == pytest.approx(here.mean + by, abs=1e-5)
    assert there.low == pytest.approx(here.low + by, abs=1e-3)
    band = over_seeds([curve([0, 1], [value, 0]) for value in values])
    assert band.low is not None
    assert (band.mean[0], band.low[0]) == (pytest.approx(here.mean), pytest.approx(here.low))


def test_values_are_averaged_in_bins_of_frames() -> None:
    curve = binned(np.array([0.0, 9.0, 11.0, 35.0, 40.0]), np.array([2.0, 4.0, 7.0, 1.0, 2.0]), 40.0, 4)
    assert curve is not None
    assert curve.frames.tolist() == [5, 15, 35]
    assert curve.values.tolist() == [3, 7, 1.5]
    assert binned(np.empty(0), np.empty(0), 40.0, 4) is None
    for longest in (2_000_004.0, 1_000_008.0, 200_000_016.0):  # the last episode is in the last bin
        curve = binned(np.array([longest * 0.999, longest]), np.array([1.0, 3.0]), longest, 40)
        assert curve is not None
        assert curve.values.tolist() == [2]
