"""Intervals: known values, coverage, and limits."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from tenfold.stats import (
    MeanSum,
    RatioSum,
    bootstrap,
    median,
    median_interval,
    normal_quantile,
    quantile,
    wilson,
)


def test_wilson_equals_published_values():
    # Newcombe (1998), table I, method 3.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_the_score_equation():
    z = normal_quantile()
    for n in (1, 2, 7, 50):
        for successes in range(n + 1):
            for end in wilson(successes, n):
                gap = abs(successes / n - end)
                if 0 < end < 1:
                    assert gap == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_wilson_of_nothing_is_unknown_and_of_too_much_an_error():
    assert wilson(0, 0) is None
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="6 successes of 5"):
        wilson(6, 5)


def test_running_mean_and_variance_equal_those_of_the_list():
    draw = random.Random(1)
    values = [1e6 + draw.gauss(0, 2) for _ in range(500)]
    total = MeanSum()
    for value in values:
        total.add(value)
    assert total.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert total.variance == pytest.approx(statistics.variance(values), rel=1e-9)
    low, high = total.interval()
    assert high - total.mean == pytest.approx(total.mean - low)
    assert MeanSum().interval() is None


def test_ratio_interval_covers_the_true_ratio_as_often_as_it_says():
    draw = random.Random(2)
    covered = 0
    for _ in range(400):
        total = RatioSum()
        for _ in range(60):
            tokens = draw.randint(5, 60)
            total.add(tokens * 1.7 + draw.gauss(0, 3), tokens)
        low, high = total.interval()
        covered += low <= 1.7 <= high
    assert 0.91 <= covered / 400 <= 0.985


def test_ratio_of_constant_parts_has_no_width():
    total = RatioSum()
    for tokens in (3, 50, 7):
        total.add(0.3 * tokens, tokens)
    low, high = total.interval()
    assert total.ratio == pytest.approx(0.3)
    assert high - low == pytest.approx(0, abs=1e-7)
    assert math.isnan(RatioSum().ratio)


def test_bootstrap_is_repeatable_and_near_the_normal_interval():
    draw = random.Random(3)
    values = [draw.gauss(10, 4) for _ in range(200)]
    first = bootstrap(values, statistics.fmean, seed=5)
    assert first == bootstrap(values, statistics.fmean, seed=5)
    assert first != bootstrap(values, statistics.fmean, seed=6)
    total = MeanSum()
    for value in values:
        total.add(value)
    assert first == pytest.approx(total.interval(), abs=0.15)
    assert bootstrap([1.0], statistics.fmean) is None


def test_quantiles_interpolate():
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
    assert quantile([1, 2, 3, 4], 0) == 1
    assert quantile([1, 2, 3, 4], 1) == 4
    assert median([3, 1, 2]) == 2
    assert math.isnan(median([]))


def test_median_interval_uses_the_right_order_statistics():
    # P(Binomial(n, 1/2) < k) tables: n = 6 needs the extremes, n = 10 the 2nd and 9th.
    assert median_interval(range(5)) is None
    assert median_interval(range(6)) == (0, 5)
    assert median_interval(range(10)) == (1, 8)
    assert median_interval(range(20)) == (5, 14)
