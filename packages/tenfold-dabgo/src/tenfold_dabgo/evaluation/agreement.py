"""How alike are methods? Rank correlation and overlap of the top k, pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tenfold_dabgo.evaluation.bench import top_indices
from tenfold_dabgo.evaluation.counterfactual import Estimate, estimate
from tenfold_dabgo.scores import spearman


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two methods over several queries: Spearman correlation over the samples both score, and
    the share of the top k that both name."""

    a: str
    b: str
    spearman: Estimate
    overlap: Estimate


def overlap_at_k(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of the top k `[N]` in common; of fewer, where fewer samples have both scores."""
    both = np.isfinite(a) & np.isfinite(b)
    size = min(k, int(both.sum()))
    if size == 0:
        return float("nan")
    tops = [set(top_indices(np.where(both, x, np.nan), size).tolist()) for x in (a, b)]
    return len(tops[0] & tops[1]) / size


def agreements(scores: Iterable[Mapping[str, np.ndarray]], k: int) -> list[Agreement]:
    """Every pair of methods; `scores` gives each query's method → `[N]`."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for by_method in scores:
        for a, b in combinations(by_method, 2):
            x, y = by_method[a], by_method[b]
            both = np.isfinite(x) & np.isfinite(y)
            values = (spearman(x[both], y[both]), overlap_at_k(x, y, k))
            found.setdefault((a, b), []).append(values)
    return [
        Agreement(
            a,
            b,
            estimate(np.asarray([s for s, _ in values])),
            estimate(np.asarray([o for _, o in values])),
        )
        for (a, b), values in found.items()
    ]
