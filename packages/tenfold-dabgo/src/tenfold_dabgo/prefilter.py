"""Prefilter: which samples deserve the exact pass, and how many winners were likely missed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tenfold.errors import ConfigError
from tenfold.seeds import derive

from tenfold_dabgo.scores import spearman

OPPONENT_SHARE = 0.1
"""Opponent candidates per proponent candidate."""
CHECK_SHARE, CHECK_LEAST, CHECK_MOST = 0.01, 16, 64
"""Samples outside the candidates that are scored exactly as well, to estimate the recall: this
share of the corpus, within these bounds."""


@dataclass(frozen=True)
class Candidates:
    """Samples for the exact pass: both ends of the first-order ranking, and a random check."""

    chosen: np.ndarray
    """Sorted indices of all samples to score exactly."""
    top: np.ndarray
    """The proponent candidates."""
    strata: tuple[tuple[np.ndarray, int], ...]
    """The check, drawn in two parts from what lies below the proponent candidates: as many just
    below as there are candidates, and the rest. Drawn samples, and how many they stand for."""

    @property
    def check(self) -> np.ndarray:
        """All check samples."""
        return np.concatenate([drawn for drawn, _ in self.strata])


@dataclass(frozen=True, slots=True)
class PrefilterReport:
    """How the prefilter did: samples scored exactly, rank correlation of first-order and exact
    scores over them, and the estimated recall of the exact top k."""

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

    The top `share` of the corpus, a tenth as many from the bottom (at least `at_least` each),
    and a random check. Missed winners mostly lie just below the candidates, so half of the
    check is drawn there.

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
    size = min(max(math.ceil(CHECK_SHARE * len(usable)), CHECK_LEAST), CHECK_MOST) // 2
    strata = []
    for part in (order[top : 2 * top], order[2 * top :]):
        drawn = generator.choice(part, size=min(size, len(part)), replace=False)
        strata.append((np.sort(drawn), len(part)))
    lowest = order[max(len(order) - bottom, 0) :]
    chosen = np.unique(np.concatenate([order[:top], lowest, *(drawn for drawn, _ in strata)]))
    return Candidates(chosen.astype(np.int64), np.sort(order[:top]), tuple(strata))


def report(linear: np.ndarray, exact: np.ndarray, picked: Candidates, k: int) -> PrefilterReport:
    """Judges the prefilter by its random check."""
    usable = int(np.isfinite(linear).sum())
    return PrefilterReport(
        scored_exactly=len(picked.chosen),
        of=usable,
        correlation=spearman(linear[picked.chosen], exact[picked.chosen]),
        recall=estimated_recall(exact, picked, min(k, usable)),
        k=k,
    )


def estimated_recall(exact: np.ndarray, picked: Candidates, k: int) -> float:
    """Share of the exact top `k` that the proponent candidates hold.

    Candidates and check are ranked together, with each check sample standing for as many as its
    stratum is larger than its check; exact when the check is everything else.
    """
    groups = [(picked.top, 1.0)]
    groups += [(drawn, total / max(len(drawn), 1)) for drawn, total in picked.strata]
    scores = np.concatenate([exact[part] for part, _ in groups])
    weights = np.concatenate([np.full(len(part), weight) for part, weight in groups])
    mine = np.arange(len(scores)) < len(picked.top)
    order = np.argsort(-scores, kind="stable")
    reached = np.minimum(np.cumsum(weights[order]), k)
    taken = np.diff(reached, prepend=0.0)
    return float(taken[mine[order]].sum() / k) if k else float("nan")
