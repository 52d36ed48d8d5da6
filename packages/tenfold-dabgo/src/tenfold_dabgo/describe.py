"""Results as bounded JSON: texts with token scores, roll-ups, points of the loss scatter.

A run's item holds what its report shows; full arrays go to a file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tenfold.capabilities import Tokenizes
from tenfold.lm.tokenizer import token_pieces

from tenfold_dabgo.queries import Query
from tenfold_dabgo.rollup import aggregate
from tenfold_dabgo.scores import DIRECTIONS, AttributionResult

MAX_SHOWN_TOKENS = 400
"""Longest text of a ranked sample in an item; longer ones are cut and say so."""
MAX_GROUPS = 20
MAX_POINTS = 400
MAX_TEXT = 200
_SKIPPED = ("docstring", "completion_ids", "prompt_ids")
"""Metadata columns that only repeat the text."""


def describe_query(query: Query, model: Tokenizes) -> dict[str, Any]:
    """Texts, token pieces and generation statistics of a query."""
    row: dict[str, Any] = {
        "id": query.id,
        "prompt": model.decode(query.prompt_ids),
        "completion": model.decode(query.completion_ids),
        "completion_pieces": token_pieces(model, query.completion_ids),
        "prompt_tokens": len(query.prompt_ids),
        "metadata": short_metadata(query.metadata),
    }
    if query.span is not None:
        row["span"] = list(query.span)
    if query.notes:
        row["notes"] = list(query.notes)
    for name in ("exit_histogram", "exits"):
        if name in query.stats:
            row[name] = query.stats[name]
    return row


def describe_ranking(
    result: AttributionResult, model: Tokenizes, top_k: int, view: str
) -> dict[str, list[dict[str, Any]]]:
    """Proponents and opponents: scores, metadata, token pieces with token scores."""
    ranking: dict[str, list[dict[str, Any]]] = {}
    for direction in DIRECTIONS:
        rows = result.topk(top_k, direction, view)
        ranking[direction] = [
            _describe_sample(result, model, r.index, r.rank, r.score) for r in rows
        ]
    return ranking


def _describe_sample(
    result: AttributionResult, model: Tokenizes, index: int, rank: int, score: float
) -> dict[str, Any]:
    dataset = result.dataset
    pieces = token_pieces(model, dataset.ids(index).tolist())
    row: dict[str, Any] = {
        "rank": rank,
        "id": dataset.sample_ids[index],
        "score": score,
        "signed": number(result.values[index]),
        "losses": {name: number(v[index]) for name, v in result.losses.items()},
        "metadata": short_metadata(dataset.metadata(index)),
        "tokens": len(pieces),
        "pieces": pieces[:MAX_SHOWN_TOKENS],
    }
    if index in result.tokens:
        row["token_scores"] = [number(v, 6) for v in result.tokens[index][:MAX_SHOWN_TOKENS]]
    return row


def describe_rollups(
    result: AttributionResult,
    columns: Sequence[str],
    how: str,
    view: str,
    seed: int,
    min_group: int = 1,
) -> dict[str, list[dict[str, Any]]]:
    """The groups with the largest values, of each column that the corpus has."""
    out = {}
    for column in columns:
        if not result.dataset.has_column(column):
            continue
        groups = aggregate(result, column, how, view=view, seed=seed)
        rows = [
            {
                "name": g.name,
                "value": number(g.value),
                "interval": None if g.interval is None else [number(v) for v in g.interval],
                "n": g.n,
                "best": g.best,
            }
            for g in [g for g in groups if g.n >= min_group][:MAX_GROUPS]
        ]
        out[column] = rows
    return out


def describe_points(result: AttributionResult, ends: Sequence[int]) -> list[list[Any]]:
    """`[loss ascent, loss descent, sample id]` of the ranking's ends and an even selection."""
    if not {"ascent", "descent"} <= set(result.losses):
        return []
    ascent, descent = result.losses["ascent"], result.losses["descent"]
    known = np.flatnonzero(np.isfinite(ascent))
    picks = known[np.linspace(0, len(known) - 1, min(len(known), MAX_POINTS)).astype(int)]
    chosen = np.unique(np.concatenate([picks, np.asarray(ends, dtype=np.int64)]))
    return [
        [number(ascent[i], 6), number(descent[i], 6), result.dataset.sample_ids[i]] for i in chosen
    ]


def describe_histogram(values: np.ndarray, bins: int = 30) -> dict[str, Any]:
    """Counts of scores in equal bins: `edges [bins + 1]`, `counts [bins]`."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(known, bins=bins)
    return {"edges": [number(e) for e in edges], "counts": counts.tolist()}


def short_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Scalar columns, long texts cut, columns that repeat the text left out."""
    row = {}
    for key, value in metadata.items():
        if key in _SKIPPED or not isinstance(value, str | int | float | bool):
            continue
        if isinstance(value, str) and len(value) > MAX_TEXT:
            value = value[: MAX_TEXT - 1] + "…"
        row[key] = value
    return row


def number(value: float, digits: int = 8) -> float | None:
    """A JSON number of so many significant digits; None for NaN and infinities."""
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
