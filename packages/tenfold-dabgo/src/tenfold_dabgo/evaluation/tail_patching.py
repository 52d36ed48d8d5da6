"""`dabgo:tail-patch`: does a little training on a method's top k make the query likelier?

One item per query: for every method and both variants (see `tail_patch`) the change of log P
after patching with the first 1, 3, 5, ... of its ranking. Controls: random samples of the
corpus, strings of uniformly random tokens, and the first method's opponents, which a metric
that ignores the sign would praise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metrics, WorkItem, WorkItems
from tenfold.seeds import derive

from tenfold_dabgo import describe
from tenfold_dabgo.evaluation.bench import (
    Bench,
    Stage,
    query_result,
    split_settings,
    top_indices,
)
from tenfold_dabgo.evaluation.ranking import Comparison, Measure
from tenfold_dabgo.evaluation.sources import parse_sources
from tenfold_dabgo.evaluation.tail_patch import (
    VARIANTS,
    Patch,
    PatchEffect,
    individual_changes,
    joint_changes,
    log_probability,
    random_strings,
)
from tenfold_dabgo.queries import Query

RANDOM_SAMPLES, RANDOM_STRINGS = "random samples", "random strings"
HEADLINE = "d_log_p"
_UNITS = {HEADLINE: "nats", "percent": "%", "published_percent": "%", "d_p": ""}
_BETTER = {"published_percent": None}
"""The published metric ignores the sign, so that a larger value need not be better."""


@dataclass(frozen=True, slots=True)
class TailPatchSettings:
    """Own parameters of `dabgo:tail-patch`; see the plugin's description."""

    methods: Sequence[str] = ("dabgo", "bm25", "gradient-dot", "random")
    k: Sequence[int] = (1, 3, 5, 7, 10, 15, 20)
    variants: Sequence[str] = VARIANTS
    opponents: bool = True
    random_draws: int = 3
    string_length: int | None = None
    joint_lr: float = 1e-5
    joint_clip: float = 1.0
    individual_lr: float = 1e-3
    individual_clip: float = 0.0
    patch_weight_decay: float = 0.01
    patch_optimizer: str = "adamw"

    def __post_init__(self) -> None:
        """Raises ConfigError for values that make no sense."""
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k is {list(self.k)}; it must name numbers of at least 1")
        if not self.variants:
            raise ConfigError(f"variants is empty; known: {', '.join(VARIANTS)}")
        if self.random_draws < 1:
            raise ConfigError(f"random_draws is {self.random_draws}; it must be at least 1")
        for variant in self.variants:
            self.patch(variant)

    def patch(self, variant: str) -> Patch:
        """The step of a variant."""
        joint = variant == "joint"
        return Patch(
            variant=variant,
            lr=self.joint_lr if joint else self.individual_lr,
            weight_decay=self.patch_weight_decay,
            clip=self.joint_clip if joint else self.individual_clip,
            optimizer=self.patch_optimizer,
        )


class TailPatch:
    """The evaluator; parameters are those of `TailPatchSettings` and of the methods.

    Raises:
        ConfigError: a parameter out of range, or an unknown method.
    """

    def __init__(self, **params: Any) -> None:
        self.settings, self.method_settings = split_settings(TailPatchSettings, params)
        self.sources = parse_sources(self.settings.methods)
        self._stage: Stage[Bench] = Stage(self.method_settings, self.sources)

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """One item per query record, in the dataset's order."""
        records = self._stage.plan(data)
        return WorkItems([WorkItem(r.id, r) for r in records], len(records))

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Scores and patches, query by query. A query that cannot be scored fails alone."""
        model = models["model"]
        for item in items:
            bench = self._stage.ready(ctx, model, lambda bench: bench)
            yield query_result(bench, item.id, item.id, partial(self._values, ctx, bench))

    def _values(self, ctx: Context, bench: Bench, query: Query) -> dict[str, Any]:
        """All rows of one query."""
        largest = max(self.settings.k)
        scores = bench.scorer.scores(query)
        ranked = {name: top_indices(values, largest) for name, values in scores.items()}
        first = self.sources[0].label
        if self.settings.opponents:
            ranked[opponents_of(first)] = top_indices(scores[first], largest, lowest=True)
        before = log_probability(bench.model, query)
        patcher = _Patcher(bench, query, self.settings.k, before)
        effects: dict[str, dict[str, Any]] = {}
        with ctx.progress(f"patches for {query.id}", None, "rows") as bar:
            for variant in self.settings.variants:
                patch = self.settings.patch(variant)
                rows = {n: patcher.of_samples(chosen, patch) for n, chosen in ranked.items()}
                rows |= self._controls(bench, query, patcher, patch)
                effects[variant] = {n: _row(r) for n, r in rows.items()}
                bar.advance(len(rows))
        return {
            "query": describe.describe_query(query, bench.model),
            "log_p": describe.number(before),
            "scored_tokens": query.scored[1] - query.scored[0],
            "effects": effects,
            "top": {
                n: [bench.dataset.sample_ids[i] for i in chosen] for n, chosen in ranked.items()
            },
        }

    def _controls(
        self, bench: Bench, query: Query, patcher: _Patcher, patch: Patch
    ) -> dict[str, dict[int, PatchEffect]]:
        """Random samples and random strings, several draws each."""
        settings, seed = self.settings, self.method_settings.seed
        usable = np.flatnonzero(bench.dataset.scorable)
        size = min(max(settings.k), len(usable))
        lengths = bench.dataset.lengths[usable]
        length = settings.string_length or max(2, int(np.median(lengths)))
        draws: dict[str, list[dict[int, PatchEffect]]] = {RANDOM_SAMPLES: [], RANDOM_STRINGS: []}
        for draw in range(settings.random_draws):
            generator = np.random.default_rng(derive(seed, "random-samples", query.id, draw))
            chosen = generator.choice(usable, size=size, replace=False)
            draws[RANDOM_SAMPLES].append(patcher.of_samples(chosen, patch))
            strings = random_strings(
                size, length, bench.model.vocabulary_size, seed, query.id, draw
            )
            draws[RANDOM_STRINGS].append(patcher.of_texts(strings, patch))
        return {name: _mean_effects(rows) for name, rows in draws.items()}

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Change of log P for every k, with paired tests against the first method; the other
        numbers for the largest k (the report has them all)."""
        comparison = compare(self.sources[0].label, results)
        last = f",k={max(self.settings.k)}"
        kept = {
            measure: rows
            for measure, rows in comparison.values.items()
            if measure.name == HEADLINE or measure.condition.endswith(last)
        }
        return list(Comparison(comparison.reference, kept).metrics())

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Any]:
        """Change of log P by k, ranked methods, the published layout."""
        from tenfold_dabgo.evaluation.blocks import tail_patch_blocks

        comparison = compare(self.sources[0].label, results)
        return tail_patch_blocks(comparison)


def opponents_of(method: str) -> str:
    """Name of the control row of a method's lowest scores."""
    return f"{method}: opponents"


@dataclass
class _Patcher:
    """Patches of one query; individual changes are computed once per sample and variant."""

    bench: Bench
    query: Query
    ks: Sequence[int]
    before: float

    def __post_init__(self) -> None:
        self._known: dict[Patch, dict[int, float]] = {}

    def of_samples(self, chosen: np.ndarray, patch: Patch) -> dict[int, PatchEffect]:
        """k → effect of the first k of these corpus samples."""
        texts = [self.bench.dataset.ids(int(i)) for i in chosen]
        if patch.variant == "joint":
            return self.of_texts(texts, patch)
        known = self._known.setdefault(patch, {})
        new = [int(i) for i in chosen if int(i) not in known]
        if new:
            ids = [self.bench.dataset.ids(i) for i in new]
            changes = individual_changes(self.bench.model, self.query, ids, patch)
            known.update(zip(new, changes.tolist(), strict=True))
        return self._first([known[int(i)] for i in chosen])

    def of_texts(self, texts: Sequence[np.ndarray], patch: Patch) -> dict[int, PatchEffect]:
        """k → effect of the first k token sequences."""
        if patch.variant == "individual":
            return self._first(individual_changes(self.bench.model, self.query, texts, patch))
        sizes = {k: min(k, len(texts)) for k in self.ks}
        changes = joint_changes(
            self.bench.model, self.query, texts, sorted(set(sizes.values())), patch
        )
        return {k: PatchEffect.of(self.before, [changes[n]]) for k, n in sizes.items()}

    def _first(self, changes: Sequence[float] | np.ndarray) -> dict[int, PatchEffect]:
        return {k: PatchEffect.of(self.before, changes[:k]) for k in self.ks}


def _mean_effects(draws: Sequence[dict[int, PatchEffect]]) -> dict[int, PatchEffect]:
    """Mean over draws, number by number."""
    return {
        k: PatchEffect(
            *(
                float(np.mean([getattr(draw[k], name) for draw in draws]))
                for name in ("log_p", "d_log_p", "d_p", "percent", "relative_percent")
            )
        )
        for k in draws[0]
    }


def _row(effects: Mapping[int, PatchEffect]) -> dict[str, dict[str, float | None]]:
    """JSON: k → numbers."""
    return {
        str(k): {
            HEADLINE: describe.number(e.d_log_p, 10),
            "percent": describe.number(e.percent, 10),
            "published_percent": describe.number(e.relative_percent, 10),
            "d_p": describe.number(e.d_p, 10),
        }
        for k, e in effects.items()
    }


def compare(reference: str, results: Iterable[ItemResult]) -> Comparison:
    """All numbers of the items by measure, method and query."""
    comparison = Comparison(reference)
    for result in results:
        for variant, rows in result.values.get("effects", {}).items():
            for method, by_k in rows.items():
                for k, numbers in by_k.items():
                    for name, value in numbers.items():
                        measure = Measure(
                            name,
                            condition(variant, int(k)),
                            _UNITS[name],
                            _BETTER.get(name, True),
                            tested=name == HEADLINE,
                        )
                        comparison.add(measure, method, result.id, value)
    return comparison


def condition(variant: str, k: int) -> str:
    """Condition of a measure: `variant=joint,k=5`."""
    return f"variant={variant},k={k}"
