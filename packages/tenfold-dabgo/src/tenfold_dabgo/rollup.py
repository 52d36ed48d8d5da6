"""Roll-ups: scores of samples gathered by module, package, author or any metadata column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tenfold.errors import ConfigError
from tenfold.seeds import derive

from tenfold_dabgo.scores import AttributionResult

REDUCTIONS = ("sum", "mean", "max", "share", "topk_mean")
BOOTSTRAPS = 1000


@dataclass(frozen=True, slots=True)
class Group:
    """A group's value with a 95 % bootstrap interval over its samples (None for one sample),
    its number of scored samples, and the best sample in it."""

    name: str
    value: float
    interval: tuple[float, float] | None
    n: int
    best: str


def aggregate(
    result: AttributionResult,
    by: str,
    how: str = "mean",
    *,
    view: str = "signed",
    seed: int = 0,
    dedupe_overlap: bool = True,
) -> list[Group]:
    """Groups of a metadata column (or `document`, `sample`), largest value first.

    Args:
        result: scores of one query.
        by: column; samples without a value are gathered under `(none)`.
        how: `sum`, `mean`, `max`, `topk_mean:k`, or `share`: the group's part of all positive
            scores.
        view: see `scores`.
        seed: of the bootstrap.
        dedupe_overlap: merge overlapping windows of a document first, so that a token counts
            once (see `merge_windows`).

    Raises:
        ConfigError: unknown column, reduction or view.
    """
    reduce = reduction(how)
    scores, labels, names = _units(result, by, view, dedupe_overlap)
    usable = np.isfinite(scores)
    total = float(np.maximum(scores[usable], 0).sum()) if how == "share" else 1.0
    groups = []
    for label in sorted(set(labels[usable])):
        members = np.flatnonzero(usable & (labels == label))
        values = scores[members]
        scale = 1.0 / total if total > 0 else 0.0
        generator = np.random.default_rng(derive(seed, "rollup", by, label))
        interval = bootstrap_interval(values, reduce, generator)
        groups.append(
            Group(
                name=str(label),
                value=float(reduce(values[None])[0]) * scale,
                interval=None if interval is None else (interval[0] * scale, interval[1] * scale),
                n=len(members),
                best=names[int(members[np.argmax(values)])],
            )
        )
    return sorted(groups, key=lambda group: (-group.value, group.name))


def reduction(how: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function `[R, n] -> [R]` that a reduction's name stands for.

    Raises:
        ConfigError: unknown name, or `topk_mean` without a sensible k.
    """
    name, _, argument = how.partition(":")
    if name == "sum":
        return lambda x: x.sum(axis=1)
    if name == "mean":
        return lambda x: x.mean(axis=1)
    if name == "max":
        return lambda x: x.max(axis=1)
    if name == "share":
        return lambda x: np.maximum(x, 0).sum(axis=1)
    if name == "topk_mean" and argument.isdigit() and int(argument) >= 1:
        k = int(argument)
        return lambda x: np.sort(x, axis=1)[:, -k:].mean(axis=1)
    raise ConfigError(
        f"reduction is {how!r}; known: sum, mean, max, share, topk_mean:<k> (k at least 1)"
    )


def bootstrap_interval(
    values: np.ndarray,
    reduce: Callable[[np.ndarray], np.ndarray],
    generator: np.random.Generator,
    repeats: int = BOOTSTRAPS,
) -> tuple[float, float] | None:
    """95 % percentile interval of `reduce` over resampled `values [n]`; None for n < 2."""
    n = len(values)
    if n < 2:
        return None
    block = max(1, 2_000_000 // n)
    drawn = []
    for start in range(0, repeats, block):
        rows = min(block, repeats - start)
        drawn.append(reduce(values[generator.integers(0, n, size=(rows, n))]))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return float(low), float(high)


def _units(
    result: AttributionResult, by: str, view: str, dedupe_overlap: bool
) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """Scores, labels and names of the units that are grouped: samples or merged documents."""
    scores = result.scores(view)
    dataset = result.dataset
    overlapping = len(set(dataset.document_of.tolist())) < len(dataset)
    if by == "sample" or not (dedupe_overlap and overlapping):
        labels = np.asarray([_label(v) for v in dataset.column(by)], dtype=object)
        return scores, labels, dataset.sample_ids
    column = dataset.column(by)
    merged = merge_windows(result, view)
    first = {int(d): i for i, d in reversed(list(enumerate(dataset.document_of)))}
    documents = sorted(merged)
    labels = np.asarray([_label(column[first[d]]) for d in documents], dtype=object)
    names = [dataset.documents[d].id for d in documents]
    return np.asarray([merged[d] for d in documents]), labels, names


def merge_windows(result: AttributionResult, view: str = "signed") -> dict[int, float]:
    """Document index → score, each source token counted once.

    A token's score is the mean over the windows that contain it of that window's score; a
    document's score is the mean over its scored tokens. (With per-token scores at hand,
    `granularity.document_tokens` is exact.)
    """
    dataset, scores = result.dataset, result.scores(view)
    merged: dict[int, float] = {}
    for d in np.unique(dataset.document_of):
        document = dataset.documents[int(d)]
        total, count = np.zeros(document.n_tokens), np.zeros(document.n_tokens)
        for i in np.flatnonzero(dataset.document_of == d):
            if not np.isfinite(scores[i]):
                continue
            low, high = dataset.spans[i] - document.start
            total[low + 1 : high] += scores[i]
            count[low + 1 : high] += 1
        covered = count > 0
        merged[int(d)] = (
            float((total[covered] / count[covered]).mean()) if covered.any() else np.nan
        )
    return merged


def _label(value: Any) -> str:
    return "(none)" if value is None else str(value)
