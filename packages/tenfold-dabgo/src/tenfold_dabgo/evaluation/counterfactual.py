"""Metrics from retraining: LDS, leave-one-out correlation, removal effect, QLD.

Scores are signed (positive: proponent). Losses are the query's, nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tenfold_dabgo.rollup import bootstrap_interval
from tenfold_dabgo.scores import ranks, spearman


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries with its standard error and 95 % bootstrap interval."""

    value: float
    error: float
    interval: tuple[float, float] | None
    n: int
    per_query: np.ndarray


def estimate(per_query: np.ndarray, seed: int = 0) -> Estimate:
    """Mean over the finite values `[Q]`."""
    known = per_query[np.isfinite(per_query)]
    if known.size == 0:
        return Estimate(float("nan"), float("nan"), None, 0, per_query)
    error = float(known.std(ddof=1) / np.sqrt(known.size)) if known.size > 1 else float("nan")
    interval = bootstrap_interval(known, lambda x: x.mean(axis=1), np.random.default_rng(seed))
    return Estimate(float(known.mean()), error, interval, int(known.size), per_query)


def lds(scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """`[Q]` linear datamodeling scores.

    Spearman correlation over subsets between the predicted effect (sum of the scores of the
    samples kept) and the real one (minus the query's loss after retraining on them).

    Args:
        scores: `[Q, N]`; samples without a score count as 0.
        subsets: `[M, N]` bool, samples kept.
        losses: `[M, Q]`.
    """
    predicted = subsets.astype(np.float64) @ np.nan_to_num(scores).T
    return np.array([spearman(predicted[:, q], -losses[:, q]) for q in range(scores.shape[0])])


def noise_ceiling(losses_a: np.ndarray, losses_b: np.ndarray) -> np.ndarray:
    """`[Q]` rank correlation over subsets between two sets of training seeds, `[M, Q]` each:
    what a perfect predictor could reach against one of them is at most its square root."""
    return np.array([spearman(losses_a[:, q], losses_b[:, q]) for q in range(losses_a.shape[1])])


def loo(scores: np.ndarray, removed: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """`[Q]` leave-one-out correlations: Spearman between the scores of single removed samples
    `removed [M]` and the query's loss after each removal, `losses [M, Q]`."""
    return np.array([spearman(scores[q, removed], losses[:, q]) for q in range(scores.shape[0])])


def removal_effect(reduced: np.ndarray, full: np.ndarray) -> np.ndarray:
    """`[Q]` rise of the query's loss: `reduced [S, Q]` minus the mean of `full [S', Q]`, both
    over training seeds. Positive: what was removed mattered."""
    return reduced.mean(axis=0) - full.mean(axis=0)


def removed_samples(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest scores of one query `[N]`, ties to the smaller index."""
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    return order[:k]


def wilcoxon_signed_rank(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of the paired Wilcoxon test, exact by enumeration up to 16 pairs and
    by the normal approximation beyond. Zero differences are dropped."""
    differences = (a - b)[np.isfinite(a - b)]
    differences = differences[differences != 0]
    n = len(differences)
    if n == 0:
        return 1.0
    weights = ranks(np.abs(differences))
    positive = float(weights[differences > 0].sum())
    center = float(weights.sum()) / 2
    if n <= 16:
        signs = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        sums = signs @ weights
        return float((np.abs(sums - center) >= abs(positive - center) - 1e-12).mean())
    deviation = float(np.sqrt((weights**2).sum() / 4))
    z = (abs(positive - center) - 0.5) / deviation
    return min(1.0, math.erfc(max(z, 0.0) / math.sqrt(2)))
