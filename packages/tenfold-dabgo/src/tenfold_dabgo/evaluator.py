"""`dabgo:attribution`: one item per query, from records to rankings, roll-ups and a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from tenfold_dabgo.cost import Cost, Work, estimate, shaped_size
from tenfold_dabgo.linear import QUERY_BLOCK
from tenfold_dabgo.methods import make_attributor
from tenfold_dabgo.queries import Query, query_from_record
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.settings import TABLES, AttributionSettings
from tenfold_dabgo.shards import write_arrays
from tenfold_dabgo.summary import item_summary, summarize
from tenfold_dabgo.team import Team, explain_failure
from tenfold_dabgo.weights import fingerprint
from tenfold_dabgo.zero3 import spread

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
        self._spread: tuple[Any, Any, Team] | None = None
        self._null: tuple[Any, np.ndarray] | None = None

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
        """Attributes the items. A query that cannot be attributed fails alone.

        Several processes score everybody's queries together, each on its part of the corpus;
        each gives the results of its own items.

        Raises:
            ComponentError: shared work failed on one of several processes.
        """
        team = Team.join(ctx)
        if self.settings.null_queries and not team.alone:
            raise ConfigError("null_queries needs one process", hint="set scale.processes = 1")
        try:
            yield from self._run(ctx, models["model"], items, team)
        except Exception as error:
            if team.alone:
                raise
            raise explain_failure(error, team.rank) from error

    def _run(
        self, ctx: Context, model: Any, items: Iterable[WorkItem], team: Team
    ) -> Iterator[ItemResult]:
        prepared: _Prepared | None = None
        model, team = self._spread_over(model, team)
        shared = self.settings.prefilter or self.settings.compare or self.settings.method != "dabgo"
        for block in team.rounds(blocks(items, QUERY_BLOCK if shared else 1)):
            queries: list[Query] = []
            for item in block:
                try:
                    queries.append(
                        query_from_record(item.payload, model, truncate=self.settings.truncate)
                    )
                except ConfigError as error:
                    yield ItemResult(item.id, error=str(error))
            shared = [query for own in team.gather(queries) for query in own]
            if shared:
                prepared = prepared or self._prepare(ctx, model, team)
                yield from self._attribute(ctx, model, prepared, queries, shared)

    def _spread_over(self, model: Any, team: Team) -> tuple[Any, Team]:
        """The model and team, with weights spread once where the run asks for it."""
        if self._spread is None or self._spread[0] is not model:
            self._spread = (model, *spread(model, self.settings, team))
        return self._spread[1:]

    def _prepare(self, ctx: Context, model: Any, team: Team) -> _Prepared:
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
        ctx.log("cost", **_query_cost(model, dataset, settings).to_json())
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
                team=team,
            )

        others = {name: build(name) for name in settings.compare if name != settings.method}
        prepared = _Prepared(dataset, build(settings.method), others)
        self._prepared = (model, prepared)
        return prepared

    def _attribute(
        self,
        ctx: Context,
        model: Any,
        prepared: _Prepared,
        queries: Sequence[Query],
        shared: Sequence[Query],
    ) -> Iterator[ItemResult]:
        """Results of this process's `queries`, which are among the `shared` ones of all."""
        compared: dict[str, dict[str, AttributionResult | RunFailed]] = {q.id: {} for q in queries}
        for name, method in prepared.others.items():
            for query, other in self._results(method, queries, shared):
                if query.id in compared:
                    compared[query.id][name] = other
        for query, result in self._results(prepared.main, queries, shared):
            if query.id not in compared:
                continue
            try:
                own, others = _sound(result), {}
                for name, other in compared[query.id].items():
                    if isinstance(other, RunFailed):
                        notes = [*own.details.get("warnings", ()), f"{name}: {other}"]
                        own.details["warnings"] = notes
                    else:
                        others[name] = other
                yield ItemResult(query.id, self._values(ctx, model, query, own, others))
            except RunFailed as error:
                yield ItemResult(query.id, error=str(error))

    def _results(
        self, main: Attributor, queries: Sequence[Query], shared: Sequence[Query]
    ) -> Iterator[tuple[Query, AttributionResult | RunFailed]]:
        """A method's results: DABGO's for the shared queries, in one order on every process;
        another method's for this process's own."""
        if not isinstance(main, BidirectionalAttributor):
            yield from self._together(main, queries)
            return
        linear: Sequence[np.ndarray | RunFailed | None] = [None] * len(shared)
        if self.settings.prefilter:
            linear = self._first_order(main, shared)
        for query, scores in zip(shared, linear, strict=True):
            if isinstance(scores, RunFailed):
                yield query, scores
                continue
            try:
                yield query, main.score(query, scores)
            except RunFailed as error:
                yield query, error

    def _first_order(
        self, main: BidirectionalAttributor, queries: Sequence[Query]
    ) -> list[np.ndarray | RunFailed]:
        """First-order scores of all queries in one pass; one by one when a query spoils it for
        the others (several processes stop together instead)."""
        try:
            return list(main.first_order(queries))
        except RunFailed:
            if not main.team.alone:
                raise
        found: list[np.ndarray | RunFailed] = []
        for query in queries:
            try:
                found.append(main.first_order([query])[0])
            except RunFailed as error:
                found.append(error)
        return found

    def _together(
        self, main: Attributor, queries: Sequence[Query]
    ) -> list[tuple[Query, AttributionResult | RunFailed]]:
        """Results of a method whose pass serves many queries; one by one when a query spoils it
        for the others."""
        try:
            return list(zip(queries, main.attribute(queries), strict=True))
        except RunFailed:
            return [(query, self._alone(main, query)) for query in queries]

    def _alone(self, main: Attributor, query: Query) -> AttributionResult | RunFailed:
        try:
            return next(iter(main.attribute([query])))
        except RunFailed as error:
            return error

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
        artifact = f"scores/{content_hash(query.id)}.npz"
        write_arrays(Path(ctx.artifacts) / artifact, result.arrays())
        details = dict(result.details)
        if settings.top_k > (known := int(result.scored.sum())):
            note = f"top_k is {settings.top_k}, but only {known} training texts have a score"
            details["warnings"] = [*details.get("warnings", ()), note]
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
            **self._exported(ctx, model, result, view),
        }

    def _exported(
        self, ctx: Context, model: Any, result: AttributionResult, view: str
    ) -> dict[str, Any]:
        """Writes the exports that are asked for; their paths below the run's artifacts."""
        if not self.settings.export:
            return {}
        from tenfold_dabgo.exports import FORMATS, export

        paths = {}
        for form in self.settings.export:
            if form == "latex" and not result.tokens:
                continue  # a method without token scores has nothing to highlight
            paths[form] = f"exports/{content_hash(result.query_id)}.{FORMATS[form]}"
            export(
                result,
                form,
                Path(ctx.artifacts) / paths[form],
                view=view,
                model=model,
                settings=asdict(self.settings),
                null=self._null_scores(ctx, model) if form in TABLES else None,
                top=self.settings.top_k,
            )
        return {"exports": paths}

    def _null_scores(self, ctx: Context, model: Any) -> np.ndarray | None:
        """`[M, N]` scores of random queries, for the column z; once per model."""
        if not self.settings.null_queries:
            return None
        assert self._prepared is not None
        if self._null is None or self._null[0] is not model:
            from tenfold_dabgo.evaluation.null import null_of_method

            dataset = self._prepared[1].dataset
            cache = Path(ctx.cache_dir) / CACHE_FOLDER
            self._null = (model, null_of_method(ctx, model, dataset, self.settings, cache))
        return self._null[1]

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


def _query_cost(model: Any, dataset: TokenDataset, settings: AttributionSettings) -> Cost:
    """What attributing one query over this corpus costs, the Fisher included."""
    module = model.module()
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    config = getattr(module, "config", None)
    table = config.to_dict() if hasattr(config, "to_dict") else {}
    tokens = int(dataset.lengths.sum())
    length = tokens / max(len(dataset), 1)
    work = Work(len(dataset), tokens, length, 1, min(length, model.context_length))
    return estimate(shaped_size(shapes, table, settings.params), work, asdict(settings))


def _sound(result: AttributionResult | RunFailed) -> AttributionResult:
    """The result, or the failure raised."""
    if isinstance(result, RunFailed):
        raise result
    return result
