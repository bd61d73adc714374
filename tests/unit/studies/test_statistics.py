"""Crossings, intervals and profiles against simulated studies of known ratio and values in closed form."""

import math

import numpy as np
import pytest

from speed_engine.studies.statistics import (
    correlation,
    crossing,
    intervals,
    profile,
    profile_score,
    ratio_interval,
    spread_of_pairs,
    t_quantile,
)

SIMULATIONS, SPREAD, DELTA = 2000, 0.05, -0.05  # the method needs 5 % less, with a CV of 5 %


def simulate(num: int, rho: float, seed: int = 0):
    """Logs of what method and baseline need, with twins of correlation rho; [S, N] each."""
    rng = np.random.default_rng([seed, num, round(10 * rho)])
    common, own = SPREAD * rng.standard_normal((2, SIMULATIONS, num))
    return DELTA + rho * common + math.sqrt(1 - rho**2) * own, common


@pytest.mark.parametrize("num", [3, 5, 10])
@pytest.mark.parametrize("rho", [0, 0.5, 0.9])
@pytest.mark.parametrize("target", ["always reached", "baseline's median"])
def test_the_95_percent_interval_covers(num, rho, target):
    """Of 2,000 studies. With the baseline's own median as target half of its runs never get there, at any n."""
    x, y = simulate(num, rho)
    limit = np.full((SIMULATIONS, num), math.inf)
    if target != "always reached":
        limit = np.median(y, axis=1, keepdims=True) + np.zeros_like(y) + 1e-12
    x, y = np.where(x > limit, math.inf, x), np.where(y > limit, math.inf, y)
    bounded = (np.isfinite(x) & np.isfinite(y)).sum(axis=1) >= 2
    assert bounded.mean() > (0.6 if num == 3 else 0.85)
    low, _, high = intervals(
        x[bounded],
        y[bounded],
        limit[bounded],
        limit[bounded],
        chains=1,
        draws={3: 500, 5: 350, 10: 200}[num],
    )
    covered = np.ones(SIMULATIONS, dtype=bool)  # fewer pairs: (0, infinity)
    covered[bounded] = (low <= DELTA) & (high >= DELTA)
    assert 0.92 <= covered.mean() <= 0.98


def test_without_a_missing_run_it_is_the_paired_t_interval():
    x, y = [80.0, 90.0, 85.0, 70.0], [100.0, 105.0, 100.0, 95.0]
    d = np.log(np.array(x) / np.array(y))
    half = 3.182446 * d.std(ddof=1) / 2
    found = ratio_interval(x, y, [200.0] * 4, [200.0] * 4)
    expected = np.exp([d.mean() - half, d.mean(), d.mean() + half])
    assert [found.low, found.ratio, found.high] == pytest.approx(expected.tolist(), rel=1e-6)
    assert (found.pairs, found.arrived, found.verdict) == (4, 4, "lower")
    assert ratio_interval(y, x).verdict == "higher"
    assert ratio_interval([1.0, 1.1, 0.9], [1.05, 0.95, 1.0]).verdict == "inconclusive"


def test_a_run_that_never_arrives_moves_the_interval_up_and_is_not_left_out():
    x, y, end = [80.0, 90.0, 85.0, 99.0], [100.0, 95.0, 90.0, 98.0], [100.0] * 4
    missing = [80.0, 90.0, 85.0, math.inf]
    whole, without = ratio_interval(x, y, end, end), ratio_interval(missing[:3], y[:3])
    found = ratio_interval(missing, y, end, end)
    assert found.ratio > without.ratio and found.ratio > whole.ratio
    assert found.high > whole.high
    again = ratio_interval(missing, y, end, end)
    assert found == again  # the same draws
    mirrored = ratio_interval(y, missing, end, end)  # and the inverse the other way round
    assert mirrored.ratio == pytest.approx(1 / found.ratio, rel=0.02)
    few = ratio_interval([math.inf, math.inf, 80.0], [90.0, 95.0, 99.0], end[:3], end[:3])
    assert (few.low, few.high, few.verdict, few.arrived) == (0, math.inf, "inconclusive", 1)


def test_students_quantiles():
    for freedom, expected in (
        (1, 12.7062),
        (2, 4.30265),
        (4, 2.77645),
        (9, 2.26216),
        (30, 2.04227),
    ):
        assert t_quantile(freedom) == pytest.approx(expected, rel=1e-4)


def test_a_crossing_is_linear_in_the_logs_of_the_running_minimum():
    at, power = [100.0, 200.0, 400.0, 800.0], lambda t: 5 * t**-0.7
    values = [power(t) for t in at]
    assert crossing(at, values, power(300.0)) == pytest.approx(300)
    assert crossing(at, values, power(400.0)) == pytest.approx(400)
    assert crossing(at, values, values[0] * 2) == 100  # there from the start
    assert crossing(at, values, power(801.0)) == math.inf
    # A value above the best so far, or not finite, does not count: from 200 on the minimum is flat.
    bumpy = [4.0, 2.0, 3.0, math.nan, 1.0]
    expected = 800 * 2 ** (math.log(2 / 1.5) / math.log(2))
    assert crossing([*at, 1600.0], bumpy, 1.5) == pytest.approx(expected)
    assert crossing(at, [math.inf, 2.0, 1.0, 0.5], 2.5) == 200


def test_twins_and_strangers():
    x, y = np.exp(simulate(10, 0.9)[0][0]), np.exp(simulate(10, 0.9)[1][0])
    assert correlation(np.log(x), np.log(y)) == pytest.approx(0.9, abs=0.15)
    twins, strangers = spread_of_pairs(x, y)
    assert twins < 0.6 * strangers
    assert correlation([1.0, math.inf, 3.0], [1.0, 2.0, 3.0]) is None
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert all(map(math.isnan, spread_of_pairs([1.0, math.inf], [1.0, 2.0])))


def test_the_performance_profile():
    """Three problems: the first method is best twice, the second once, the third misses one and is slow elsewhere."""
    inf = math.inf
    ratios, shares = profile(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, inf], [4.0, 2.0, 9.0]]))
    assert shares[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert shares[-1].tolist() == pytest.approx([1, 1, 1 / 3])
    scores = profile_score(ratios, shares)
    assert scores.tolist() == pytest.approx([(2 + 2 / 3) / 3, (2 + 1 / 3) / 3, 1 / 9])
    _, nobody = profile(np.array([[inf, inf], [1.0, 2.0]]))
    assert nobody[-1].tolist() == [0.5, 0.5]
