"""Metrics against known sources: who is relevant is given, not measured by retraining."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _order(scores: np.ndarray) -> np.ndarray:
    """Scored samples, best first; ties to the smaller index."""
    known = np.flatnonzero(np.isfinite(scores))
    return known[np.argsort(-scores[known], kind="stable")]


def precision_at_k(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Share of the top k `[N]` that is relevant `[N]` bool (of fewer, when fewer are scored)."""
    top = _order(scores)[:k]
    return float(relevant[top].mean()) if top.size else float("nan")


def recall_at_k(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Share of the relevant samples that the top k holds; NaN without relevant ones."""
    total = int((relevant & np.isfinite(scores)).sum())
    return float(relevant[_order(scores)[:k]].sum() / total) if total else float("nan")


def reciprocal_rank(scores: np.ndarray, relevant: np.ndarray) -> float:
    """1 / rank of the first relevant sample; 0 without one."""
    hits = np.flatnonzero(relevant[_order(scores)])
    return 1.0 / (int(hits[0]) + 1) if hits.size else 0.0


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Area under the precision-recall curve (step-wise); NaN without relevant samples."""
    hits = relevant[_order(scores)].astype(np.float64)
    if hits.sum() == 0:
        return float("nan")
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def top_k_cardinality(rankings: Sequence[np.ndarray], k: int) -> float:
    """Different samples among all queries' top k, over the number there could be.

    1 means that every query gets samples of its own; 1 / Q that all get the same ones.
    """
    tops = [_order(scores)[:k] for scores in rankings]
    total = sum(len(top) for top in tops)
    return len(set(np.concatenate(tops).tolist())) / total if total else float("nan")
