"""`dabgo:labels`: rankings against known sources, and checks that need no source at all.

One item per query. Against a metadata column (or planted duplicates): precision, recall,
reciprocal rank, and the area under the precision-recall curve, which on a corpus with planted
foreign texts (`dabgo:mixed`) is the mixed-dataset test. Without labels: do all queries get the
same samples (cardinality), do untrained weights give the same ranking (randomization), and how
far do scores rise above those of random queries (null calibration)?
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metric, Metrics, WorkItem, WorkItems
from tenfold.seeds import content_hash

from tenfold_dabgo import describe
from tenfold_dabgo.evaluation import labels
from tenfold_dabgo.evaluation.bench import (
    Bench,
    Stage,
    query_result,
    split_settings,
    top_indices,
)
from tenfold_dabgo.evaluation.null import NULLS, NullScores, histogram
from tenfold_dabgo.evaluation.ranking import Comparison, Measure, group_of
from tenfold_dabgo.evaluation.retrain import fresh_weights
from tenfold_dabgo.evaluation.sources import Scorer, parse_sources
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import spearman
from tenfold_dabgo.weights import borrowed, load

RELEVANCE = ("column", "duplicate")
CHANCE = "chance"
Z_LIMIT = 3.0


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """Own parameters of `dabgo:labels`; see the plugin's description."""

    methods: Sequence[str] = ("dabgo", "bm25", "gradient-dot", "random")
    relevance: str = "column"
    column: str = "module"
    k: Sequence[int] = (1, 5, 10)
    null_queries: int = 16
    null: str = "corpus"
    randomized: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError for values that make no sense."""
        for name, value, known in (
            ("relevance", self.relevance, RELEVANCE),
            ("null", self.null, NULLS),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k is {list(self.k)}; it must name numbers of at least 1")
        if self.null_queries == 1 or self.null_queries < 0:
            raise ConfigError(
                f"null_queries is {self.null_queries}; a spread needs 2 or more, 0 leaves the "
                "calibration out"
            )


@dataclass
class _Desk:
    """The bench with the corpus' labels, the untrained twin of the methods, and the null."""

    bench: Bench
    column: list[Any]
    twin: Scorer | None
    untrained: Any
    null: NullScores | None


class Labels:
    """The evaluator; parameters are those of `LabelSettings` and of the methods.

    Raises:
        ConfigError: a parameter out of range, or an unknown method.
    """

    def __init__(self, **params: Any) -> None:
        self.settings, self.method_settings = split_settings(LabelSettings, params)
        self.sources = parse_sources(self.settings.methods)
        self._stage: Stage[_Desk] = Stage(self.method_settings, self.sources)

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """One item per query record, in the dataset's order.

        Raises:
            ConfigError: no query has the column.
        """
        records = self._stage.plan(data)
        column = self.settings.column
        if self.settings.relevance == "column" and not any(
            r.metadata.get(column) is not None for r in records
        ):
            known = sorted({name for r in records for name in r.metadata})
            raise ConfigError(
                f"no query has the column {column!r} (they have: {', '.join(known) or 'none'})",
                hint='name a column that corpus and queries share, or set relevance = "duplicate"',
            )
        return WorkItems([WorkItem(r.id, r) for r in records], len(records))

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Scores query by query. One that cannot be scored fails alone."""
        model = models["model"]
        for item in items:
            desk = self._stage.ready(ctx, model, partial(self._desk, ctx))
            yield query_result(desk.bench, item.id, item.id, partial(self._values, desk))

    # --- Preparation --------------------------------------------------------------------------

    def _desk(self, ctx: Context, bench: Bench) -> _Desk:
        settings, by_column = self.settings, self.settings.relevance == "column"
        column = bench.dataset.column(settings.column) if by_column else []
        twin, untrained = None, None
        if settings.randomized and any(s.uses_model for s in self.sources):
            seed = self.method_settings.seed
            untrained = fresh_weights(bench.model, seed)
            twin = replace(
                bench.scorer,
                sources=[s for s in self.sources if s.uses_model],
                model_hash=content_hash([bench.model_hash, "untrained", seed]),
                work=bench.scorer.work and bench.scorer.work / "untrained",
            )
        null = None
        if settings.null_queries:
            null = NullScores.of(
                ctx, bench, self.sources, settings.null, settings.null_queries,
                self.method_settings,
            )  # fmt: skip
        return _Desk(bench, column, twin, untrained, null)

    # --- One query ----------------------------------------------------------------------------

    def _values(self, desk: _Desk, query: Query) -> dict[str, Any]:
        """All numbers of one query."""
        bench, largest = desk.bench, max(self.settings.k)
        scores = bench.scorer.scores(query)
        values: dict[str, Any] = {"query": describe.describe_query(query, bench.model)}
        calibrated = dict(scores)
        if desk.null is not None:
            values["null"] = {}
            for name, row in scores.items():
                z = desk.null.z_scores(name, row)
                if z is not None:
                    calibrated[f"{name} (z)"] = z
                    values["null"][name] = self._null_values(desk.null, name, row, z)
        relevant = self._relevant(desk, query)
        if relevant is not None:
            usable = relevant & bench.dataset.scorable
            values["relevant"] = int(usable.sum())
            rows = {name: self._label_values(row, relevant) for name, row in calibrated.items()}
            rows[CHANCE] = self._chance(usable.sum() / max(bench.dataset.scorable.sum(), 1))
            values["labels"] = rows
        values["top"] = {
            name: [bench.dataset.sample_ids[i] for i in top_indices(row, largest)]
            for name, row in scores.items()
        }
        if desk.twin is not None:
            values["randomized"] = self._randomized(desk, query, scores)
        return values

    def _relevant(self, desk: _Desk, query: Query) -> np.ndarray | None:
        """`[N]` bool; None for a query without the column."""
        if self.settings.relevance == "duplicate":
            low, high = query.span or (0, len(query.completion_ids))
            return contains(desk.bench.dataset, query.completion_ids[low:high])
        own = query.metadata.get(self.settings.column)
        return None if own is None else np.asarray([label == own for label in desk.column])

    def _label_values(self, scores: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
        ks, number = self.settings.k, describe.number
        return {
            "precision": {str(k): number(labels.precision_at_k(scores, relevant, k)) for k in ks},
            "recall": {str(k): number(labels.recall_at_k(scores, relevant, k)) for k in ks},
            "reciprocal_rank": number(labels.reciprocal_rank(scores, relevant)),
            "auprc": number(labels.average_precision(scores, relevant)),
        }

    def _chance(self, share: float) -> dict[str, Any]:
        """What a random ranking gives in expectation (the area under its curve: in the limit)."""
        known = describe.number(share) if share > 0 else None
        return {
            "precision": {str(k): describe.number(share) for k in self.settings.k},
            "auprc": known,
        }

    def _null_values(
        self, null: NullScores, name: str, scores: np.ndarray, z: np.ndarray
    ) -> dict[str, Any]:
        known = z[np.isfinite(z)]
        return {
            "max_z": describe.number(known.max()) if known.size else None,
            "share_above": describe.number((known > Z_LIMIT).mean()) if known.size else None,
            "histogram": histogram(scores, null.scores[name]),
        }

    def _randomized(
        self, desk: _Desk, query: Query, scores: Mapping[str, np.ndarray]
    ) -> dict[str, dict[str, float | None]]:
        """Agreement with the same methods on untrained weights."""
        assert desk.twin is not None
        k = max(self.settings.k)
        with borrowed(desk.bench.model) as params:
            load(params, desk.untrained)
            untrained = desk.twin.scores(query)
        out = {}
        for name, row in untrained.items():
            both = np.isfinite(row) & np.isfinite(scores[name])
            tops = [set(top_indices(v, k).tolist()) for v in (row, scores[name])]
            out[name] = {
                "spearman": describe.number(spearman(row[both], scores[name][both])),
                "overlap": describe.number(len(tops[0] & tops[1]) / max(len(tops[1]), 1)),
            }
        return out

    # --- Results ------------------------------------------------------------------------------

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Means over queries with intervals, and the cardinality over all queries."""
        items = list(results)
        comparison = compare(self.sources[0].label, items)
        return [*comparison.metrics(), *cardinality(items, self.settings.k)]

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Any]:
        """Ranked methods, precision by k, scores against the null."""
        from tenfold_dabgo.evaluation.blocks import label_blocks

        items = list(results)
        comparison = compare(self.sources[0].label, items)
        return label_blocks(comparison, items, metrics)


def contains(dataset: Any, ids: Sequence[int]) -> np.ndarray:
    """`[N]` bool: samples that hold these tokens in a row (planted duplicates)."""
    wanted = np.asarray(ids, dtype=np.int32)
    out = np.zeros(len(dataset), dtype=bool)
    for i in np.flatnonzero(dataset.lengths >= len(wanted)):
        windows = np.lib.stride_tricks.sliding_window_view(dataset.ids(int(i)), len(wanted))
        out[i] = bool((windows == wanted).all(axis=1).any())
    return out


def compare(reference: str, results: Iterable[ItemResult]) -> Comparison:
    """All numbers of the items by measure, method and query."""
    comparison = Comparison(reference)
    for result in results:
        values: Mapping[str, Any] = result.values
        for method, row in values.get("labels", {}).items():
            for name in ("precision", "recall"):
                for k, value in row.get(name, {}).items():
                    comparison.add(Measure(name, f"k={k}"), method, result.id, value)
            for name in ("reciprocal_rank", "auprc"):
                if name in row:
                    comparison.add(Measure(name), method, result.id, row[name])
        for method, row in values.get("randomized", {}).items():
            for name in ("spearman", "overlap"):
                measure = Measure(f"randomized_{name}", higher_is_better=False, tested=False)
                comparison.add(measure, method, result.id, row[name])
        for method, row in values.get("null", {}).items():
            for name in ("max_z", "share_above"):
                measure = Measure(f"null_{name}", higher_is_better=None, tested=False)
                comparison.add(measure, method, result.id, row[name])
    return comparison


def cardinality(results: Sequence[ItemResult], ks: Sequence[int]) -> Iterator[Metric]:
    """`top_k_cardinality`: different samples among all queries' top k, over what could be."""
    tops: dict[str, list[list[str]]] = {}
    for result in results:
        rows: Mapping[str, Any] = result.values.get("top", {})
        for method, ids in rows.items():
            tops.setdefault(method, []).append(ids)
    for method, lists in tops.items():
        for k in sorted(set(ks)):
            cut = [ids[:k] for ids in lists]
            total = sum(map(len, cut))
            if total:
                distinct = len({i for ids in cut for i in ids})
                yield Metric(
                    "top_k_cardinality", distinct / total, len(lists),
                    higher_is_better=True, group=group_of(method, f"k={k}"),
                )  # fmt: skip
