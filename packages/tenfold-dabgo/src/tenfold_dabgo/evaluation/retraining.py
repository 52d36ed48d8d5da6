"""`dabgo:retraining`: quality measured by training again, the expensive and only honest way.

    removal   rise of the query's loss without a method's top k, against the full set
    qld       the same for the top share, minus a random share (query loss difference)
    lds       rank correlation over random subsets between summed scores and real losses
    loo       the same over removals of single samples

One item per training set that all queries share (`full/<seed>`, `lds/<subset>`,
`random/<size>/<draw>`, `loo/<number>`) and one per query, which holds its scores' sums and the
trainings without its own top k. Every single training is kept in the cache, so that a stopped
run goes on inside an item, and methods that remove the same samples share a training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.capabilities import Context, Dataset
from tenfold.errors import ConfigError
from tenfold.records import ItemResult, Metrics, WorkItem, WorkItems
from tenfold.seeds import content_hash, derive

from tenfold_dabgo import describe
from tenfold_dabgo.evaluation.bench import (
    Bench,
    Stage,
    numbers,
    query_result,
    split_settings,
)
from tenfold_dabgo.evaluation.removal import random_units, remaining, top_units, units_of
from tenfold_dabgo.evaluation.retrain import Recipe, Retrainer, half_subsets
from tenfold_dabgo.evaluation.sources import parse_sources
from tenfold_dabgo.evaluator import CACHE_FOLDER
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import Weights, borrowed, load

MEASURES = ("removal", "qld", "lds", "loo")
RULES = ("equal-steps", "equal-epochs")
SEEDED = ("order", "init", "both")
ATTRIBUTED = ("given", "retrained")
SHARE = "share"
"""Label of the removal that `qld` is about."""


@dataclass(frozen=True, slots=True)
class RetrainingSettings:
    """Own parameters of `dabgo:retraining`; see the plugin's description."""

    methods: Sequence[str] = ("dabgo", "bm25", "gradient-dot", "random")
    measure: Sequence[str] = ("removal", "lds")
    attributed: str = "given"
    k: Sequence[int] = (10, 30)
    unit: str = "sample"
    qld_share: float = 0.01
    seeds: int = 3
    vary: str = "order"
    random_draws: int = 3
    removal_rule: str = "equal-steps"
    subsets: int = 36
    subset_share: float = 0.5
    lds_seeds: int = 2
    lds_rule: str = "equal-epochs"
    loo_samples: int = 24
    train_steps: int | None = None
    train_epochs: float | None = None
    train_batch_size: int | None = None
    train_lr: float | None = None
    train_weight_decay: float | None = None
    train_warmup: float | None = None
    train_clip: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for values that make no sense."""
        for name, value, known in (
            *(("measure", m, MEASURES) for m in self.measure),
            ("attributed", self.attributed, ATTRIBUTED),
            ("vary", self.vary, SEEDED),
            ("removal_rule", self.removal_rule, RULES),
            ("lds_rule", self.lds_rule, RULES),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")
        if not self.measure:
            raise ConfigError(f"measure is empty; known: {', '.join(MEASURES)}")
        if "removal" in self.measure and (not self.k or min(self.k) < 1):
            raise ConfigError(f"k is {list(self.k)}; it must name numbers of at least 1")
        for name in ("seeds", "random_draws", "lds_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("subsets", "loo_samples"):
            if getattr(self, name) < 2:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; a rank correlation needs 2 or more"
                )
        for name in ("qld_share", "subset_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.train_steps is not None and self.train_epochs is not None:
            raise ConfigError("give train_steps or train_epochs, one of them")
        self.recipe(1)

    def recipe(self, samples: int, rule: str = "equal-steps") -> Recipe:
        """How a corpus of `samples` samples is trained on."""
        given = {
            "batch_size": self.train_batch_size,
            "lr": self.train_lr,
            "weight_decay": self.train_weight_decay,
            "warmup_ratio": self.train_warmup,
            "clip": self.train_clip,
            "steps": self.train_steps,
        }
        recipe = Recipe(
            **{k: v for k, v in given.items() if v is not None},  # ty: ignore[invalid-argument-type]
            same_epochs=rule == "equal-epochs",
        )
        if self.train_epochs is None:
            return recipe
        return replace(recipe, steps=max(1, round(self.train_epochs * samples / recipe.batch_size)))

    def pairs(self, count: int) -> list[tuple[int, int]]:
        """`count` seeds of initialization and order."""
        init, order = self.vary in ("init", "both"), self.vary in ("order", "both")
        return [(s if init else 0, s if order else 0) for s in range(count)]

    @property
    def removals(self) -> list[str]:
        """Labels of the sizes that are removed: `10`, `30`, `share`."""
        out = [str(k) for k in sorted(set(self.k))] if "removal" in self.measure else []
        return [*out, SHARE] if "qld" in self.measure else out


@dataclass
class _Lab:
    """The bench with its retrainers; `weights` are those that are attributed, None for the
    model's own."""

    bench: Bench
    removal: Retrainer
    subset: Retrainer
    units: list[np.ndarray]
    weights: Weights | None

    @contextmanager
    def attributed(self) -> Iterator[None]:
        """The model holds the weights that scores are about."""
        if self.weights is None:
            yield
            return
        with borrowed(self.bench.model) as params:
            load(params, self.weights)
            yield


class Retraining:
    """The evaluator; parameters are those of `RetrainingSettings` and of the methods.

    Raises:
        ConfigError: a parameter out of range, or an unknown method.
    """

    def __init__(self, **params: Any) -> None:
        self.settings, self.method_settings = split_settings(RetrainingSettings, params)
        self.sources = parse_sources(self.settings.methods)
        if self.settings.attributed == "retrained" and any(s.run for s in self.sources):
            raise ConfigError(
                "methods holds scores of an earlier run, and attributed is 'retrained': "
                "that run scored other weights",
                hint='use attributed = "given"',
            )
        self._stage: Stage[_Lab] = Stage(self.method_settings, self.sources)

    def plan(self, ctx: Context, data: Mapping[str, Dataset]) -> WorkItems:
        """Training sets that all queries share, then one item per query."""
        records = self._stage.plan(data)
        settings, ids = self.settings, []
        if settings.removals:
            ids += [f"full/{s}" for s in range(settings.seeds)]
            ids += [
                f"random/{label}/{draw}"
                for label in settings.removals
                for draw in range(settings.random_draws)
            ]
        if "lds" in settings.measure:
            ids += [f"lds/{j:03d}" for j in range(settings.subsets)]
        if "loo" in settings.measure:
            ids += [f"loo/{j:03d}" for j in range(settings.loo_samples)]
        ids += [f"query/{record.id}" for record in records]
        return WorkItems([WorkItem(i) for i in ids], len(ids))

    def run(
        self, ctx: Context, models: Mapping[str, Any], items: Iterable[WorkItem]
    ) -> Iterator[ItemResult]:
        """Trains and scores. A query that cannot be scored fails alone."""
        model = models["model"]
        for item in items:
            lab = self._stage.ready(ctx, model, partial(self._laboratory, ctx))
            kind, _, rest = item.id.partition("/")
            if kind != "query":
                yield ItemResult(item.id, self._shared(lab, kind, rest))
            else:
                yield query_result(lab.bench, item.id, rest, partial(self._query, ctx, lab))

    # --- Preparation --------------------------------------------------------------------------

    def _laboratory(self, ctx: Context, bench: Bench) -> _Lab:
        if not bench.queries:
            raise ConfigError(f"no query can be scored; first: {next(iter(bench.errors.values()))}")
        settings, n = self.settings, int(bench.dataset.scorable.sum())
        folder = Path(ctx.cache_dir) / CACHE_FOLDER / "retrained"
        queries = list(bench.queries.values())

        def retrainer(rule: str) -> Retrainer:
            recipe = settings.recipe(n, rule)
            return Retrainer(bench.model, bench.dataset, queries, recipe, folder)

        units = units_of(bench.dataset, settings.unit)
        most = max((self._size(label, len(units)) for label in settings.removals), default=0)
        if most >= len(units):
            raise ConfigError(
                f"k is {most}, but the corpus has {len(units)} units of {settings.unit!r}: "
                "nothing would be left to train on"
            )
        lab = _Lab(
            bench, retrainer(settings.removal_rule), retrainer(settings.lds_rule), units, None
        )
        if settings.attributed == "retrained":
            everything = np.arange(len(bench.dataset))
            with ctx.progress("the model to attribute", None, "steps"):
                lab.weights = lab.removal.train(everything)
            facts = [bench.model_hash, "retrained", repr(lab.removal.recipe)]
            bench.scorer.model_hash = content_hash(facts)
        with lab.attributed():
            bench.scorer.prepare()  # a method that cannot be built should say so before hours pass
        return lab

    def _size(self, label: str, units: int) -> int:
        """How many units a removal takes."""
        if label == SHARE:
            return max(1, round(self.settings.qld_share * units))
        return int(label)

    # --- Training sets that all queries share -------------------------------------------------

    def _shared(self, lab: _Lab, kind: str, rest: str) -> dict[str, Any]:
        settings, dataset = self.settings, lab.bench.dataset
        if kind == "full":
            pairs = [settings.pairs(settings.seeds)[int(rest)]]
            return self._losses(lab, lab.removal, np.arange(len(dataset)), pairs)
        if kind == "random":
            label, draw = rest.split("/")
            size = self._size(label, len(lab.units))
            gone = random_units(lab.units, size, self.method_settings.seed, label, draw)
            kept = remaining(dataset, settings.unit, gone)
            return self._losses(lab, lab.removal, kept, settings.pairs(settings.seeds))
        if kind == "lds":
            kept = np.flatnonzero(self._subsets(len(dataset))[int(rest)])
            return self._losses(lab, lab.subset, kept, settings.pairs(settings.lds_seeds))
        gone = self._left_out(lab)[int(rest) : int(rest) + 1]
        kept = remaining(dataset, "sample", gone)
        values = self._losses(lab, lab.removal, kept, settings.pairs(settings.seeds))
        return {**values, "sample": dataset.sample_ids[int(gone[0])]}

    def _losses(
        self, lab: _Lab, trainer: Retrainer, kept: np.ndarray, pairs: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """Query id → losses by seed, and how many samples were trained on."""
        runs = [trainer.query_losses(kept, *pair) for pair in pairs]
        by_query = zip(lab.bench.queries, np.stack(runs, axis=1), strict=True)
        return {
            "trained_on": len(kept),
            "removed": len(lab.bench.dataset) - len(kept),
            "losses": {name: numbers(row) for name, row in by_query},
        }

    def _subsets(self, n: int) -> np.ndarray:
        """`[M, N]` bool, the subsets of LDS."""
        settings = self.settings
        return half_subsets(n, settings.subsets, self.method_settings.seed, settings.subset_share)

    def _left_out(self, lab: _Lab) -> np.ndarray:
        """Samples whose single removal is measured.

        Raises:
            ConfigError: more than the corpus has.
        """
        usable = np.flatnonzero(lab.bench.dataset.scorable)
        if self.settings.loo_samples > len(usable):
            raise ConfigError(
                f"loo_samples is {self.settings.loo_samples}, but the corpus has "
                f"{len(usable)} samples"
            )
        generator = np.random.default_rng(derive(self.method_settings.seed, "loo"))
        return generator.permutation(usable)[: self.settings.loo_samples]

    # --- One query ----------------------------------------------------------------------------

    def _query(self, ctx: Context, lab: _Lab, query: Query) -> dict[str, Any]:
        """Scores, their sums over the shared training sets, and the query's own removals."""
        with lab.attributed():
            scores = lab.bench.scorer.scores(query)
        values: dict[str, Any] = {"query": describe.describe_query(query, lab.bench.model)}
        if "lds" in self.settings.measure:
            kept = self._subsets(len(lab.bench.dataset)).astype(np.float64)
            values["predicted"] = {
                name: numbers(kept @ np.nan_to_num(row)) for name, row in scores.items()
            }
        if "loo" in self.settings.measure:
            gone = self._left_out(lab)
            values["loo_scores"] = {name: numbers(row[gone]) for name, row in scores.items()}
        if self.settings.removals:
            values["removal"] = self._removals(ctx, lab, query, scores)
        return values

    def _removals(
        self, ctx: Context, lab: _Lab, query: Query, scores: Mapping[str, np.ndarray]
    ) -> dict[str, dict[str, Any]]:
        """Method → size → losses by seed without the method's best units."""
        settings, place = self.settings, list(lab.bench.queries).index(query.id)
        out: dict[str, dict[str, Any]] = {}
        pairs = settings.pairs(settings.seeds)
        total = len(scores) * len(settings.removals) * len(pairs)
        with ctx.progress(f"trainings for {query.id}", total, "trainings") as bar:
            for method, row in scores.items():
                for label in settings.removals:
                    gone = top_units(lab.units, row, self._size(label, len(lab.units)))
                    kept = remaining(lab.bench.dataset, settings.unit, gone)
                    losses = []
                    for pair in pairs:
                        losses.append(lab.removal.query_losses(kept, *pair)[place])
                        bar.advance()
                    out.setdefault(method, {})[label] = {
                        "units": self._size(label, len(lab.units)),
                        "removed": len(lab.bench.dataset) - len(kept),
                        "losses": numbers(losses),
                    }
        return out

    # --- Results ------------------------------------------------------------------------------

    def aggregate(self, ctx: Context, results: Iterable[ItemResult]) -> Metrics:
        """Means over queries with intervals, paired tests, noise ceiling and seed spread."""
        from tenfold_dabgo.evaluation.outcomes import Outcomes

        return Outcomes.of(results, self.sources[0].label).metrics()

    def report(
        self, ctx: Context, results: Iterable[ItemResult], metrics: Metrics
    ) -> Iterator[Any]:
        """Removal curves, ranked methods, LDS per method and query."""
        from tenfold_dabgo.evaluation.blocks import retraining_blocks
        from tenfold_dabgo.evaluation.outcomes import Outcomes

        outcomes = Outcomes.of(results, self.sources[0].label)
        return retraining_blocks(outcomes, self.settings)
