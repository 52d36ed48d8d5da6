"""Prefilter: which samples deserve the exact pass, and how many winners were likely missed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tenfold.errors import ConfigError
from tenfold.seeds import derive

from tenfold_dabgo.scores import spearman

OPPONENT_SHARE = 0.25
"""Opponent candidates per proponent candidate."""
CHECK_SAMPLES = 64
"""Random samples scored exactly as well, to estimate the recall."""


@dataclass(frozen=True)
class Candidates:
    """Samples for the exact pass: both ends of the first-order ranking, and a random check."""

    chosen: np.ndarray
    """Sorted indices of all samples to score exactly."""
    check: np.ndarray
    """The random part of them, drawn from the whole corpus."""
    share: float


@dataclass(frozen=True, slots=True)
class PrefilterReport:
    """How the prefilter did: samples scored exactly, rank correlation of first-order and exact
    scores on the random check, and the estimated recall of the exact top k."""

    scored_exactly: int
    of: int
    correlation: float
    recall: float
    k: int

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary; NaN as None."""
        return {
            key: None if isinstance(v, float) and math.isnan(v) else v
            for key, v in asdict(self).items()
        }


def candidates(linear: np.ndarray, share: float, seed: int, at_least: int = 1) -> Candidates:
    """Picks samples from first-order scores `[N]` (NaN: not scorable).

    The top `share` of the corpus, a quarter as many from the bottom (at least `at_least` each),
    and `CHECK_SAMPLES` at random.

    Raises:
        ConfigError: share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"prefilter is {share}; it must be a share of the corpus in (0, 1]")
    usable = np.flatnonzero(np.isfinite(linear))
    order = usable[np.argsort(-linear[usable], kind="stable")]
    top = max(math.ceil(share * len(usable)), at_least)
    bottom = max(math.ceil(OPPONENT_SHARE * share * len(usable)), at_least)
    generator = np.random.default_rng(derive(seed, "prefilter-check"))
    size = min(CHECK_SAMPLES, len(usable))
    check = np.sort(generator.choice(usable, size=size, replace=False)) if size else usable
    chosen = np.unique(np.concatenate([order[:top], order[-bottom:] if bottom else [], check]))
    return Candidates(chosen.astype(np.int64), check, share)


def report(linear: np.ndarray, exact: np.ndarray, picked: Candidates, k: int) -> PrefilterReport:
    """Judges the prefilter by its random check.

    A check sample outside the first-order candidates whose exact score would enter the top k
    stands for `N / len(check)` missed ones.
    """
    usable = int(np.isfinite(linear).sum())
    top = np.sort(exact[picked.chosen][np.isfinite(exact[picked.chosen])])[::-1][:k]
    threshold = top[-1] if len(top) else np.inf
    first_order = candidates_only(linear, picked.share)
    outside = np.setdiff1d(picked.check, first_order)
    missed = float((exact[outside] >= threshold).sum()) * usable / max(len(picked.check), 1)
    found = float(np.isin(np.flatnonzero(exact >= threshold), first_order).sum())
    recall = found / (found + missed) if found + missed > 0 else float("nan")
    return PrefilterReport(
        scored_exactly=len(picked.chosen),
        of=usable,
        correlation=spearman(linear[picked.check], exact[picked.check]),
        recall=recall,
        k=k,
    )


def candidates_only(linear: np.ndarray, share: float) -> np.ndarray:
    """The top `share` by first-order score, without the random check."""
    usable = np.flatnonzero(np.isfinite(linear))
    order = usable[np.argsort(-linear[usable], kind="stable")]
    return order[: max(math.ceil(share * len(usable)), 1)]
