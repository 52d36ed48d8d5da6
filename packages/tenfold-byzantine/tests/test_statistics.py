"""Statistics against published numbers, closed forms and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from tenfold.errors import ConfigError
from tenfold.stats import wilson
from tenfold_byzantine import statistics as st


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [
        ((0, 25), 0.0, 0.133192),
        ((2, 25), 0.02222, 0.249661),
        ((10, 25), 0.234033, 0.592605),
        ((29, 50), 0.442334, 0.70625),
        ((25, 25), 0.866808, 1.0),
        ((248, 600), 0.374604, 0.453165),
    ],
)
def test_wilson_gives_the_reference_numbers(count, low, high):
    assert wilson(*count) == pytest.approx((low, high), abs=1e-6)
    theirs = scipy_stats.binomtest(*count).proportion_ci(method="wilson")
    assert wilson(*count) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert st.halfwidth(*count) == pytest.approx((high - low) / 2, abs=1e-6)


def test_clopper_pearson_covers_exactly_at_its_ends():
    for k, n in [(0, 7), (3, 7), (7, 7), (10, 25)]:
        interval = st.clopper_pearson(k, n)
        assert interval is not None
        low, high = interval
        if k > 0:
            assert scipy_stats.binom.sf(k - 1, n, low) == pytest.approx(0.025)
        if k < n:
            assert scipy_stats.binom.cdf(k, n, high) == pytest.approx(0.025)
        theirs = scipy_stats.binomtest(k, n).proportion_ci(method="exact")
        assert (low, high) == pytest.approx((theirs.low, theirs.high))
    assert st.clopper_pearson(0, 0) is None


def test_newcombe_gives_the_reference_difference():
    found = st.newcombe((44, 50), (29, 50))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.30, 0.127158, 0.451741), abs=1e-6
    )
    assert st.newcombe((0, 0), (1, 2)) is None


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [((29, 50), (44, 50), 0.001341), ((10, 25), (2, 25), 0.018077), ((29, 50), (10, 25), 0.15)],
)
def test_fisher_gives_the_reference_p(first, second, p):
    assert st.fisher(first, second) == pytest.approx(p, abs=5e-7 if p < 0.1 else 0.005)


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert st.holm([]) == []


def test_mcnemar_counts_discordant_pairs_alone():
    first = dict(enumerate([True] * 9 + [False] * 3))
    second = dict(enumerate([True] * 4 + [False] * 5 + [True] + [False] * 2)) | {99: True}
    found = st.mcnemar(first, second)
    assert (found.pairs, found.only_first, found.only_second) == (12, 5, 1)
    # Two-sided binomial: P(X <= 1) + P(X >= 5) of six fair coins.
    assert found.p == pytest.approx((1 + 6 + 6 + 1) / 64)
    assert st.mcnemar({0: True}, {0: True}).p == 1.0


def test_kaplan_meier_hand_example_with_censoring():
    """Events at 2, 3, 3, 7; censored at 3, 5, 10, 10: worked out with fractions."""
    times = [2, 3, 3, 3, 5, 7, 10, 10]
    seen = [True, True, True, False, False, True, False, False]
    curve = st.kaplan_meier(times, seen)
    assert curve.times == (2, 3, 7)
    assert curve.at_risk == (8, 7, 3)
    assert curve.events == (1, 2, 1)
    assert curve.survival == pytest.approx((7 / 8, 7 / 8 * 5 / 7, 5 / 8 * 2 / 3))
    assert curve.at(1) == 1.0
    assert curve.at(6.9) == pytest.approx(5 / 8)
    # Area: 2·1 + 1·7/8 + 4·5/8 + 3·5/12.
    assert curve.restricted_mean(10) == pytest.approx(2 + 7 / 8 + 5 / 2 + 5 / 4)
    assert curve.restricted_mean(5) == pytest.approx(2 + 7 / 8 + 2 * 5 / 8)
    # Greenwood at the second time: S² Σ d/(n(n-d)), on the log-log scale.
    sd = math.sqrt(1 / 56 + 2 / 35) / abs(math.log(5 / 8))
    expected = [(5 / 8) ** math.exp(sign * 1.959964 * sd) for sign in (1, -1)]
    assert curve.intervals[1] == pytest.approx(expected, abs=1e-6)


def test_kaplan_meier_agrees_with_scipy_on_random_censoring():
    draw = np.random.default_rng(3)
    times, seen = draw.integers(1, 12, 60), draw.random(60) < 0.6
    ours = st.kaplan_meier(times.tolist(), seen.tolist())
    data = scipy_stats.CensoredData(uncensored=times[seen], right=times[~seen])
    theirs = scipy_stats.ecdf(data).sf
    for t in range(13):
        assert ours.at(t) == pytest.approx(float(theirs.evaluate(t)))


def test_kaplan_meier_without_events_is_flat():
    curve = st.kaplan_meier([5, 5], [False, False])
    assert (curve.times, curve.restricted_mean(5), curve.n) == ((), 5.0, 2)


def test_conditional_mean_is_students():
    found = st.conditional_mean([3, 5, 10, 4])
    assert found is not None
    expected = scipy_stats.t.interval(0.95, 3, 5.5, scipy_stats.sem([3, 5, 10, 4]))
    assert found.value == 5.5
    assert found.interval == pytest.approx(expected)
    assert st.conditional_mean([]) is None
    assert st.conditional_mean([29.0]) == st.Mean(29.0, 1, None)


def test_bootstrap_repeats_and_covers_the_known_mean():
    values = np.random.default_rng(0).exponential(2.0, 40).tolist()
    for method in ("bca", "percentile"):
        one = st.bootstrap(values, seed=5, resamples=2000, method=method)
        assert one == st.bootstrap(values, seed=5, resamples=2000, method=method)
        assert one != st.bootstrap(values, seed=6, resamples=2000, method=method)
    # The percentile interval of three values by full enumeration of the 27 resamples.
    means = sorted(sum(t) / 3 for t in itertools.product([0.0, 3.0, 9.0], repeat=3))
    found = st.bootstrap(
        [0.0, 3.0, 9.0], seed=1, resamples=20_000, method="percentile", confidence=0.6
    )
    assert found == pytest.approx(
        (float(np.quantile(means, 0.2)), float(np.quantile(means, 0.8))), abs=0.35
    )
    hits = 0
    draw = np.random.default_rng(1)
    for seed in range(60):
        interval = st.bootstrap(draw.exponential(1.0, 30).tolist(), seed=seed, resamples=400)
        assert interval is not None
        hits += interval[0] <= 1.0 <= interval[1]
    assert hits >= 50  # 95 % nominal; fewer has probability below 0.001
    assert st.bootstrap([1.0]) is None
    assert st.bootstrap([2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ConfigError, match="bca or percentile"):
        st.bootstrap([1.0, 2.0], method="magic")


def _cells(a, b, c, d):
    """A 2 x 2 table as columns: a successes and b failures at x=1, c and d at x=0."""
    y = [True] * a + [False] * b + [True] * c + [False] * d
    return y, {"x": [1.0] * (a + b) + [0.0] * (c + d)}


def test_logistic_equals_the_closed_form_of_a_table():
    y, x = _cells(10, 15, 29, 21)
    plain = st.logistic(y, x, firth=False)
    assert plain[1].value == pytest.approx(math.log(10 * 21 / (15 * 29)))
    half = 1.959964 * math.sqrt(1 / 10 + 1 / 15 + 1 / 29 + 1 / 21)
    assert plain[1].interval[1] - plain[1].value == pytest.approx(half, abs=1e-5)
    # In a saturated model Firth's penalty adds one half to every cell.
    assert st.logistic(y, x)[1].value == pytest.approx(math.log(10.5 * 21.5 / (15.5 * 29.5)))


def test_logistic_with_an_empty_cell_is_finite_with_the_penalty_only():
    y, x = _cells(0, 25, 29, 21)
    assert st.logistic(y, x)[1].value == pytest.approx(math.log(0.5 * 21.5 / (25.5 * 29.5)))
    with pytest.raises(ConfigError, match="no finite estimate"):
        st.logistic(y, x, firth=False)
    with pytest.raises(ConfigError, match="determine each other"):
        st.logistic(y, {**x, "same": x["x"]})


def test_logistic_over_a_game_per_cell_is_the_closed_form():
    for a, c in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        y, x = _cells(a, 1 - a, c, 1 - c)
        [intercept, slope] = st.logistic(y, x)
        assert intercept.value == pytest.approx(math.log((c + 0.5) / (1.5 - c)))
        odds = (a + 0.5) * (1.5 - c) / ((1.5 - a) * (c + 0.5))
        assert slope.value == pytest.approx(math.log(odds))


def test_logistic_of_columns_that_nearly_repeat_each_other_converges():
    """Small cells over 8 + B agents, some without a failure: no step away from the
    estimate makes the penalised likelihood larger."""
    valid = {0: (2, 2), 1: (2, 2), 2: (2, 2), 3: (1, 2), 4: (1, 2)}
    y, b, n = [], [], []
    for faults, (good, games) in valid.items():
        y += [True] * good + [False] * (games - good)
        b += [float(faults)] * games
        n += [math.log2(8 + faults)] * games
    found = np.array([e.value for e in st.logistic(y, {"log2 N": n, "B": b})])
    x = np.column_stack([np.ones(len(y)), n, b])

    def penalised(beta):
        eta = x @ beta
        p = 1 / (1 + np.exp(-eta))
        information = x.T @ (x * (p * (1 - p))[:, None])
        return (np.array(y) @ eta - np.logaddexp(0, eta).sum()
                + 0.5 * np.linalg.slogdet(information)[1])  # fmt: skip

    best = penalised(found)
    draw = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1):
        steps = draw.normal(size=(200, 3)) * size
        assert all(penalised(found + step) <= best + 1e-9 for step in steps)


def test_fisher_power_equals_enumeration_with_scipy():
    n, p0, p1 = 9, 0.8, 0.2
    total = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        if scipy_stats.fisher_exact([[a, n - a], [b, n - b]]).pvalue <= 0.05:
            total += scipy_stats.binom.pmf(a, n, p0) * scipy_stats.binom.pmf(b, n, p1)
    assert st.fisher_power(n, p0, p1) == pytest.approx(total, abs=1e-12)


def test_games_per_cell():
    """Fleiss' formula by hand for 0.58 against 0.40, and the exact test needs more."""
    mean = 0.49
    spread = 1.959964 * math.sqrt(2 * mean * 0.51)
    spread += 0.841621 * math.sqrt(0.58 * 0.42 + 0.4 * 0.6)
    assert st.games_per_cell(0.58, 0.40) == math.ceil((spread / 0.18) ** 2) == 120
    n = st.games_for_fisher(0.58, 0.40)
    assert n is not None
    assert st.fisher_power(n, 0.58, 0.40) >= 0.8
    assert n > 120
    assert st.games_for_fisher(0.58, 0.57, most=200) is None
    for arguments, word in [((0.5, 0.5), "both 0.5"), ((0.0, 0.5), "p0 is 0"), ((0.5, 2), "p1")]:
        with pytest.raises(ConfigError, match=word):
            st.games_per_cell(*arguments)
