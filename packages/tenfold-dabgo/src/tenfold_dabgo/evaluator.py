"""`dabgo:attribution`: one item per query, from records to rankings, roll-ups and a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError, RunFailed
from tenfold.records import ItemResult, Metrics, WorkItem, WorkItems
from tenfold.seeds import content_hash

from tenfold_dabgo import describe
from tenfold_dabgo.attributor import Attributor, BidirectionalAttributor, blocks
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.linear import QUERY_BLOCK
from tenfold_dabgo.methods import make_attributor
from tenfold_dabgo.queries import Query, query_from_record
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.shards import write_arrays
from tenfold_dabgo.summary import item_summary, summarize
from tenfold_dabgo.weights import fingerprint

CACHE_FOLDER = "dabgo"


@dataclass
class _Prepared:
    """What all queries share: corpus, method, and methods to compare with."""

    dataset: TokenDataset
    main: Attributor
    others: dict[str, Attributor]


class Attribution:
    """The evaluator; its parameters are those of `AttributionSettings`.

    Raises:
        ConfigError: a parameter out of range.
    """

    def __init__(self, **params: Any) -> None:
        if params.get("seed") is None:
            params["seed"] = 0
        self.settings = AttributionSettings(**params)
        self._train: Dataset | None = None
        self._prepared: tuple[Any, _Prepared] | None = None

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """One item per query record, in the dataset's order."""
        self._train = data["train"]
        items = [WorkItem(record.id, record) for record in data["queries"].load()]
        if not items:
            raise ConfigError(
                "there are no queries: nothing to attribute",
                hint="check the `queries` dataset's filters and limit",
            )
        return WorkItems(items, len(items))

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Attributes the items. A query that cannot be attributed fails alone."""
        model = models["model"]
        prepared: _Prepared | None = None
        shared = self.settings.prefilter or self.settings.compare or self.settings.method != "dabgo"
        for block in blocks(items, QUERY_BLOCK if shared else 1):
            queries: list[Query] = []
            for item in block:
                try:
                    queries.append(
                        query_from_record(item.payload, model, truncate=self.settings.truncate)
                    )
                except ConfigError as error:
                    yield ItemResult(item.id, error=str(error))
            if queries:
                prepared = prepared or self._prepare(ctx, model)
                yield from self._attribute(ctx, model, prepared, queries)

    def _prepare(self, ctx: Context, model: Any) -> _Prepared:
        """Tokenizes the corpus and builds the methods; kept while the model is the same."""
        if self._prepared is not None and self._prepared[0] is model:
            return self._prepared[1]
        settings = self.settings
        if self._train is None:
            raise RunFailed("run was called before plan: the training texts are not known")
        dataset = TokenDataset.from_records(
            self._train.load(),
            model,
            window=settings.window,
            stride=settings.stride,
            min_tokens=settings.min_tokens,
        )
        dataset = dataset.deduplicated() if settings.dedupe else dataset
        ctx.log(
            "corpus",
            samples=len(dataset),
            documents=len(dataset.documents),
            tokens=int(dataset.lengths.sum()),
            unscorable=int((~dataset.scorable).sum()),
            short_windows_dropped=dataset.dropped,
            hash=dataset.content_hash(),
        )
        model_hash = fingerprint(model)

        def build(name: str) -> Attributor:
            return make_attributor(
                name,
                model,
                dataset,
                settings,
                cache=Path(ctx.cache_dir) / CACHE_FOLDER,
                work=Path(ctx.work_dir) / "passes",
                model_hash=model_hash,
                progress=ctx.progress,
            )

        others = {name: build(name) for name in settings.compare if name != settings.method}
        prepared = _Prepared(dataset, build(settings.method), others)
        self._prepared = (model, prepared)
        return prepared

    def _attribute(
        self, ctx: Context, model: Any, prepared: _Prepared, queries: Sequence[Query]
    ) -> Iterator[ItemResult]:
        main = prepared.main
        linear: Sequence[np.ndarray | None] = [None] * len(queries)
        if isinstance(main, BidirectionalAttributor) and self.settings.prefilter:
            linear = list(main.first_order(queries))
        compared = {
            name: list(method.attribute(queries)) for name, method in prepared.others.items()
        }
        together = self._together(main, queries)
        for number, query in enumerate(queries):
            others = {name: results[number] for name, results in compared.items()}
            try:
                result = together[number] if together else self._result(main, query, linear[number])
                yield ItemResult(query.id, self._values(ctx, model, query, result, others))
            except RunFailed as error:
                yield ItemResult(query.id, error=str(error))

    def _together(self, main: Attributor, queries: Sequence[Query]) -> list[AttributionResult]:
        """Results of methods whose pass serves many queries; none for DABGO's own, or when a
        query spoils it for the others (each is then tried alone)."""
        if isinstance(main, BidirectionalAttributor):
            return []
        try:
            return list(main.attribute(queries))
        except RunFailed:
            return []

    def _result(
        self, main: Attributor, query: Query, linear: np.ndarray | None
    ) -> AttributionResult:
        if isinstance(main, BidirectionalAttributor):
            return main.score(query, linear)
        return next(iter(main.attribute([query])))

    def _values(
        self,
        ctx: Context,
        model: Any,
        query: Query,
        result: AttributionResult,
        others: Mapping[str, AttributionResult],
    ) -> dict[str, Any]:
        """The item's JSON values; arrays go to an artifact, timings to the event log."""
        settings, view = self.settings, self.settings.resolved_view
        if result.method != "dabgo" and view in ("ascent", "descent"):
            raise RunFailed(f"view {view!r} exists for method dabgo only, not {result.method}")
        artifact = f"scores/{content_hash(query.id)}.npz"
        write_arrays(Path(ctx.artifacts) / artifact, result.arrays())
        details = dict(result.details)
        timings = {
            key: details.pop(key) for key in ("seconds", "tokens_per_second") if key in details
        }
        ctx.log("attributed", query=query.id, method=result.method, **timings)
        for warning in details.get("warnings", ()):
            ctx.log("warning", query=query.id, message=warning)
        ends = {d: result.topk(settings.top_k, d, view) for d in ("proponents", "opponents")}
        top = ends["proponents"]
        return {
            "query": describe.describe_query(query, model),
            "method": result.method,
            "view": view,
            "unit": result.unit,
            "how": settings.how,
            **describe.describe_ranking(result, model, settings.top_k, view),
            "rollups": describe.describe_rollups(
                result, settings.columns, settings.how, view, settings.seed, settings.min_group
            ),
            "points": describe.describe_points(
                result, [r.index for rows in ends.values() for r in rows]
            ),
            "histogram": describe.describe_histogram(result.scores(view)),
            "details": details,
            "summary": item_summary(
                result.scores(view),
                [r.score for r in top],
                details,
                self._same_group(query, result, [r.index for r in top]),
            ),
            "compare": {
                name: {
                    k: describe.number(v) for k, v in result.compare(other, settings.top_k).items()
                }
                for name, other in others.items()
            },
            "artifact": artifact,
        }

    def _same_group(
        self, query: Query, result: AttributionResult, top: Sequence[int]
    ) -> dict[str, tuple[float, float]]:
        """For columns that the query has too: share of the top k from its group, and chance."""
        out = {}
        scored = result.scored
        for column in self.settings.columns:
            own = query.metadata.get(column)
            if own is None or not result.dataset.has_column(column) or not top:
                continue
            labels = result.dataset.column(column)
            share = sum(labels[i] == own for i in top) / len(top)
            chance = sum(labels[i] == own for i in np.flatnonzero(scored)) / max(scored.sum(), 1)
            out[column] = (share, float(chance))
        return out

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Means over queries with intervals, see `summary.summarize`."""
        return summarize(results, ctx.derive("aggregate"))

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Any]:
        """Blocks of the run's report, see `reporting`."""
        from tenfold_dabgo.reporting import report_blocks

        return report_blocks(results)
