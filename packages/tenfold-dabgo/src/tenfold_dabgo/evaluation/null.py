"""What scores look like for queries that mean nothing: the null they are calibrated against.

A sample that scores high for every query (a long one, one that is badly learned) is no source
of any. With the scores of M random queries its own mean and spread are known, and

    z_i = (s_i - mean_m s_i^(m)) / std_m s_i^(m)

says how much this query stands out for sample i.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.capabilities import Context
from tenfold.seeds import content_hash, derive

from tenfold_dabgo import describe
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.bench import Bench
from tenfold_dabgo.evaluation.sources import Scorer, Source, parse_source
from tenfold_dabgo.queries import Query
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.shards import write_arrays
from tenfold_dabgo.weights import fingerprint

NULLS = ("corpus", "uniform")
BINS = 40


def null_queries(
    dataset: TokenDataset, kind: str, count: int, length: int, vocabulary_size: int, seed: int
) -> list[Query]:
    """Queries of random tokens: drawn as often as the corpus has them, or uniformly."""
    generator = np.random.default_rng(derive(seed, "null", kind))
    shape = (count, max(length, 2))
    if kind == "uniform":
        ids = generator.integers(0, vocabulary_size, shape)
    else:
        ids = dataset.tokens[generator.integers(0, len(dataset.tokens), shape)]
    return [Query(f"null-{i}", (), tuple(map(int, row))) for i, row in enumerate(ids)]


@dataclass(frozen=True)
class NullScores:
    """Method → `[M, N]` scores of the random queries."""

    scores: dict[str, np.ndarray]

    @classmethod
    def of(
        cls,
        ctx: Context,
        bench: Bench,
        sources: Sequence[Source],
        kind: str,
        count: int,
        settings: AttributionSettings,
        length: int | None = None,
    ) -> NullScores:
        """Scores the random queries, or reads what an interrupted run has scored.

        Their length is the median of the real queries' where none is given. Recorded runs have
        no null.
        """
        live = [s for s in sources if not s.run]
        lengths = [len(query.ids) for query in bench.queries.values()] or [2]
        length = min(length or int(np.median(lengths)), bench.model.context_length)
        queries = null_queries(
            bench.dataset, kind, count, length, bench.model.vocabulary_size, settings.seed
        )
        folder = Path(ctx.work_dir) / "null"
        scorer = Scorer(
            bench.model, bench.dataset, settings, live, bench.scorer.cache,
            work=folder / "passes", model_hash=bench.model_hash, progress=ctx.progress,
        )  # fmt: skip
        facts = [bench.model_hash, bench.dataset.content_hash(), asdict(settings)]
        facts.append([s.label for s in live])
        rows: dict[str, list[np.ndarray]] = {s.label: [] for s in live}
        with ctx.progress("random queries", len(queries), "queries") as bar:
            for query in queries:
                path = folder / f"{content_hash([*facts, query.ids])}.npz"
                found = _read(path, list(rows), len(bench.dataset))
                if found is None:
                    found = scorer.scores(query)
                    write_arrays(path, found)
                for name, values in found.items():
                    rows[name].append(values)
                bar.advance()
        return cls({name: np.stack(values) for name, values in rows.items()})

    def z_scores(self, method: str, scores: np.ndarray) -> np.ndarray | None:
        """`[N]` z-scores; NaN where the null does not vary; None for a recorded run."""
        if method not in self.scores:
            return None
        null = self.scores[method]
        with np.errstate(invalid="ignore", divide="ignore"):
            center, spread = null.mean(axis=0), null.std(axis=0, ddof=1)
            return (scores - center) / np.where(spread > 0, spread, np.nan)


def null_of_method(
    ctx: Context, model: Any, dataset: TokenDataset, settings: AttributionSettings, cache: Path
) -> np.ndarray:
    """`[M, N]` signed scores of `null_queries` random queries by the run's own method.

    As long as the median training text, so that they do not depend on which queries a process
    has at hand.
    """
    source = parse_source(f"{settings.method}/signed")
    model_hash = fingerprint(model)
    scorer = Scorer(model, dataset, settings, [source], cache=cache, model_hash=model_hash)
    bench = Bench(model, model_hash, dataset, {}, {}, scorer)
    length = int(np.median(dataset.lengths))
    null = NullScores.of(ctx, bench, [source], "corpus", settings.null_queries, settings, length)
    return null.scores[source.label]


def _read(path: Path, names: Sequence[str], size: int) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return found if all(v.shape == (size,) for v in found.values()) else None


def histogram(scores: np.ndarray, null: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Shares of scores and of null scores in common equal bins: `edges [bins + 1]`, `scores`
    and `null` `[bins]`. The outermost 0.1 % of the null do not widen the bins."""
    mine, theirs = scores[np.isfinite(scores)], null[np.isfinite(null)]
    if not mine.size or not theirs.size:
        return {"edges": [], "scores": [], "null": []}
    low, high = np.quantile(theirs, [0.001, 0.999])
    low, high = min(low, mine.min()), max(high, mine.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    parts = {
        "scores": np.histogram(mine, edges)[0] / mine.size,
        "null": np.histogram(theirs, edges)[0] / theirs.size,
    }
    return {
        "edges": [describe.number(e, 6) for e in edges],
        **{name: [describe.number(v, 6) for v in values] for name, values in parts.items()},
    }
