"""What every quality evaluator prepares: the queries, the corpus, the model, and the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError, RunFailed
from tenfold.records import ItemResult, Record

from tenfold_dabgo import describe
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.sources import Scorer, Source
from tenfold_dabgo.evaluator import CACHE_FOLDER
from tenfold_dabgo.queries import Query, query_from_record
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.weights import fingerprint

T = TypeVar("T")


def split_settings(own: Any, params: Mapping[str, Any]) -> tuple[Any, AttributionSettings]:
    """An evaluator's own settings and those of the methods, from one table of parameters.

    Raises:
        ConfigError: a value that makes no sense.
    """
    given = dict(params)
    if given.get("seed") is None:
        given["seed"] = 0
    names = {f.name for f in fields(own)}
    mine = {k: v for k, v in given.items() if k in names}
    return own(**mine), AttributionSettings(**{k: v for k, v in given.items() if k not in names})


def load_records(data: Mapping[str, Dataset]) -> list[Record]:
    """The query records.

    Raises:
        ConfigError: there are none.
    """
    records = list(data["queries"].load())
    if not records:
        raise ConfigError(
            "there are no queries: nothing to evaluate",
            hint="check the `queries` dataset's filters and limit",
        )
    return records


@dataclass
class Bench:
    """Corpus, queries and methods of one run.

    Attributes:
        model: offers `grad` and `tokenize`.
        model_hash: its fingerprint.
        dataset: the corpus.
        queries: query id → query, in the order of the records.
        errors: query id → why it cannot be scored.
        scorer: the methods.
    """

    model: Any
    model_hash: str
    dataset: TokenDataset
    queries: dict[str, Query]
    errors: dict[str, str]
    scorer: Scorer


def prepare(
    ctx: Context,
    model: Any,
    train: Dataset,
    records: Iterable[Record],
    settings: AttributionSettings,
    sources: Sequence[Source],
) -> Bench:
    """Tokenizes corpus and queries; the methods are built when they are first asked.

    Raises:
        ConfigError: an empty corpus, or windows that make no sense.
    """
    dataset = TokenDataset.from_records(
        train.load(),
        model,
        window=settings.window,
        stride=settings.stride,
        min_tokens=settings.min_tokens,
    )
    dataset = dataset.deduplicated() if settings.dedupe else dataset
    queries, errors = {}, {}
    for record in records:
        try:
            queries[record.id] = query_from_record(record, model, truncate=settings.truncate)
        except ConfigError as error:
            errors[record.id] = str(error)
    model_hash = fingerprint(model)
    scorer = Scorer(
        model,
        dataset,
        settings,
        sources,
        cache=Path(ctx.cache_dir) / CACHE_FOLDER,
        work=Path(ctx.work_dir) / "passes",
        model_hash=model_hash,
        progress=ctx.progress,
    )
    ctx.log(
        "corpus",
        samples=len(dataset),
        documents=len(dataset.documents),
        tokens=int(dataset.lengths.sum()),
        queries=len(queries),
        unusable_queries=len(errors),
        hash=dataset.content_hash(),
    )
    return Bench(model, model_hash, dataset, queries, errors, scorer)


@dataclass
class Stage(Generic[T]):
    """What `plan` of a quality evaluator leaves for `run`, and what `run` prepares once per model.

    Attributes:
        settings: of the methods.
        sources: the methods.
        train: the training texts, once planned.
        records: the query records, once planned.
    """

    settings: AttributionSettings
    sources: Sequence[Source]
    train: Dataset | None = None
    records: list[Record] = field(default_factory=list)
    _ready: tuple[Any, T] | None = None

    def plan(self, data: Mapping[str, Dataset]) -> list[Record]:
        """Takes over the datasets; the query records.

        Raises:
            ConfigError: there are none.
        """
        self.train, self.records = data["train"], load_records(data)
        return self.records

    def ready(self, ctx: Context, model: Any, build: Callable[[Bench], T]) -> T:
        """What `build` makes of the bench, kept while the model is the same.

        Raises:
            ConfigError: an empty corpus, or windows that make no sense.
            RunFailed: nothing is planned yet.
        """
        if self._ready is None or self._ready[0] is not model:
            if self.train is None:
                raise RunFailed("run was called before plan: the training texts are not known")
            bench = prepare(ctx, model, self.train, self.records, self.settings, self.sources)
            self._ready = (model, build(bench))
        return self._ready[1]


def query_result(
    bench: Bench, item: str, query: str, values: Callable[[Query], dict[str, Any]]
) -> ItemResult:
    """An item's values for one query; a query that cannot be scored fails alone."""
    if query in bench.errors:
        return ItemResult(item, error=bench.errors[query])
    try:
        return ItemResult(item, values(bench.queries[query]))
    except RunFailed as error:
        return ItemResult(item, error=str(error))


def numbers(values: Iterable[float] | np.ndarray, digits: int = 10) -> list[float | None]:
    """JSON numbers; None for NaN and infinities."""
    return [describe.number(float(v), digits) for v in values]


def top_indices(scores: np.ndarray, k: int, *, lowest: bool = False) -> np.ndarray:
    """Indices of the k highest (or lowest) finite scores `[N]`, ties to the smaller index."""
    known = np.flatnonzero(np.isfinite(scores))
    order = np.argsort(scores[known] if lowest else -scores[known], kind="stable")
    return known[order[:k]]
