"""Aggregate metrics of an attribution run, from the items' values alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tenfold.records import ItemResult, Metric, Metrics

from tenfold_dabgo.rollup import bootstrap_interval

_UNITS = {"ascent_rise": "nats/token", "descent_fall": "nats/token", "top_score": "score"}
_BETTER = {"prefilter_recall": True, "same": True, "noise_ratio": True}


def summarize(results: Iterable[ItemResult], seed: int) -> Metrics:
    """Means over queries with bootstrap intervals.

    `ascent_rise` and `descent_fall`: how far the query's loss moved; `top_score`: the best
    proponent's score; `top_share`: the top k's part of all positive scores; `noise_ratio`: a
    typical score over the rounding noise; `same_<column>`: share of the top k from the query's
    own group, and `same_<column>_chance` what a random choice would give;
    `spearman` and `overlap` with each compared method.
    """
    columns: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for key, value in _numbers(result.values):
            columns.setdefault(key, []).append(value)
    metrics = []
    for (name, group), values in columns.items():
        numbers = np.asarray(values, dtype=float)
        generator = np.random.default_rng(seed)
        stem = name.partition("_")[0] if name.startswith("same_") else name
        metrics.append(
            Metric(
                name=name,
                value=float(numbers.mean()),
                n=len(numbers),
                interval=bootstrap_interval(numbers, lambda x: x.mean(axis=1), generator),
                higher_is_better=None if name.endswith("_chance") else _BETTER.get(stem),
                unit=_UNITS.get(name, ""),
                group=group,
            )
        )
    return metrics


def _numbers(values: Mapping[str, Any]) -> Iterable[tuple[tuple[str, str], float]]:
    """`((metric, group), value)` of one item."""
    for name, value in values.get("summary", {}).items():
        if value is not None:
            yield (name, ""), float(value)
    for method, agreement in values.get("compare", {}).items():
        for name, value in agreement.items():
            if value is not None:
                yield (name, f"method={method}"), float(value)


def item_summary(
    values: np.ndarray,
    exact_top: list[float],
    details: Mapping[str, Any],
    same: Mapping[str, tuple[float, float]],
) -> dict[str, float | None]:
    """One query's numbers.

    Args:
        values: `[N]` scores in the chosen view.
        exact_top: the top k's scores.
        details: the result's details.
        same: column → (share of the top k from the query's own group, chance).
    """
    known = values[np.isfinite(values)]
    positive = float(np.maximum(known, 0).sum())
    row: dict[str, float | None] = {
        "scored": float(known.size),
        "unscored": float(len(values) - known.size),
        "top_score": exact_top[0] if exact_top else None,
        "top_share": sum(max(s, 0.0) for s in exact_top) / positive if positive > 0 else None,
    }
    trace = details.get("trace")
    if trace:
        base = trace["ascent"][0]["loss"]
        row["query_loss"] = base
        row["ascent_rise"] = trace["ascent"][-1]["loss"] - base
        row["descent_fall"] = base - trace["descent"][-1]["loss"]
    if "noise" in details:
        row["noise_ratio"] = details["noise"]["ratio"]
    if "prefilter" in details:
        row["prefilter_recall"] = details["prefilter"]["recall"]
    for column, (share, chance) in same.items():
        row[f"same_{column}"] = share
        row[f"same_{column}_chance"] = chance
    return row
