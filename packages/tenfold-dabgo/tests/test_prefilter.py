"""The prefilter's candidates, and its estimate of what it missed."""

from __future__ import annotations

import numpy as np
import pytest
from tenfold.errors import ConfigError
from tenfold_dabgo import prefilter as pre


def scores(n=2000, noise=0.5, seed=0):
    generator = np.random.default_rng(seed)
    exact = generator.standard_normal(n)
    linear = exact + noise * generator.standard_normal(n)
    linear[::17] = np.nan
    exact[::17] = np.nan
    return linear, exact


def true_recall(exact, top, k):
    usable = np.flatnonzero(np.isfinite(exact))
    best = usable[np.argsort(-exact[usable])][:k]
    return np.isin(best, top).mean()


def test_candidates_are_both_ends_and_a_check_below():
    linear, _ = scores()
    picked = pre.candidates(linear, 0.1, seed=1)
    usable = np.flatnonzero(np.isfinite(linear))
    order = usable[np.argsort(-linear[usable])]
    n = int(np.ceil(0.1 * len(usable)))
    assert set(picked.top) == set(order[:n])
    assert set(order[-n // 10 :]) <= set(picked.chosen)
    (near, size), (far, rest) = picked.strata
    assert set(near) <= set(order[n : 2 * n])
    assert set(far) <= set(order[2 * n :])
    assert (size, rest) == (n, len(usable) - 2 * n)
    assert np.isfinite(linear[picked.chosen]).all()
    assert len(picked.chosen) <= n + n // 10 + 1 + len(near) + len(far)
    with pytest.raises(ConfigError, match="share of the corpus"):
        pre.candidates(linear, 0.0, seed=1)


@pytest.mark.parametrize("k", [1, 10, 60])
def test_recall_is_exact_when_everything_is_checked(k, monkeypatch):
    monkeypatch.setattr(pre, "CHECK_LEAST", 10**6)
    monkeypatch.setattr(pre, "CHECK_MOST", 10**6)
    for seed in range(5):
        linear, exact = scores(noise=1.0, seed=seed)
        picked = pre.candidates(linear, 0.05, seed=seed)
        assert pre.estimated_recall(exact, picked, k) == pytest.approx(
            true_recall(exact, picked.top, k)
        )


def test_recall_estimates_are_right_on_average():
    """Mean over many corpora: the check's estimate against the truth."""
    estimates, truths = [], []
    for seed in range(120):
        linear, exact = scores(noise=0.6, seed=seed)
        picked = pre.candidates(linear, 0.1, seed=seed)
        estimates.append(pre.estimated_recall(exact, picked, 30))
        truths.append(true_recall(exact, picked.top, 30))
    assert 0.5 < np.mean(truths) < 0.99
    assert np.mean(estimates) == pytest.approx(np.mean(truths), abs=0.04)


def test_everything_as_candidates_misses_nothing():
    linear, exact = scores(n=30)
    picked = pre.candidates(linear, 1.0, seed=0)
    report = pre.report(linear, exact, picked, 10)
    assert report.recall == 1.0
    assert report.scored_exactly == report.of == int(np.isfinite(linear).sum())
