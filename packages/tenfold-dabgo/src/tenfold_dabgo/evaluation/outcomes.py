"""From the items of `dabgo:retraining` to its numbers: pure functions of what was recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tenfold.records import ItemResult, Metric

from tenfold_dabgo.evaluation.counterfactual import estimate
from tenfold_dabgo.evaluation.ranking import Comparison, Measure
from tenfold_dabgo.scores import spearman

SHARE = "share"
NO_REMOVAL, RANDOM_REMOVAL = "no removal", "random removal"
NATS = "nats/token"
LDS = Measure("lds", "", "")
LOO = Measure("loo", "", "")
QLD = Measure("qld", "", NATS)


def rise(k: str) -> Measure:
    """The rise of the query's loss without `k` units."""
    return Measure("removal_rise", f"k={k}", NATS)


@dataclass
class Outcomes:
    """Recorded losses by kind of training set, and the comparison of methods made from them.

    Attributes:
        full: query → loss of each seed on the full set.
        random: size → draws, each query → losses by seed.
        lds, loo: number of the training set → query → losses by seed.
        queries: query → the values of its item.
        comparison: method by method.
        sizes: every training set's size in samples, by item.
    """

    full: list[dict[str, list[float]]] = field(default_factory=list)
    random: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    lds: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    loo: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    queries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    comparison: Comparison = field(default_factory=Comparison)
    ceiling: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Iterable[ItemResult], reference: str) -> Outcomes:
        """Sorts the items and computes everything that they allow.

        A run that has not finished gives what is known so far.
        """
        out = cls(comparison=Comparison(reference))
        for result in results:
            out._take(result)
        out._removal()
        out._lds()
        out._loo()
        return out

    def _take(self, result: ItemResult) -> None:
        kind, _, rest = result.id.partition("/")
        if kind == "query":
            self.queries[rest] = result.values
            return
        losses: Any = result.values["losses"]
        self.sizes[result.id] = int(result.values["trained_on"])
        if kind == "full":
            self.full.append(losses)
        elif kind == "random":
            self.random.setdefault(rest.split("/")[0], []).append(losses)
        elif kind == "lds":
            self.lds[int(rest)] = losses
        else:
            self.loo[int(rest)] = losses

    # --- Removal --------------------------------------------------------------------------------

    def _removal(self) -> None:
        """`removal_rise` by size, its two controls, and `qld`."""
        if not self.full:
            return
        for query, values in self.queries.items():
            full = [seed[query][0] for seed in self.full]
            self.spread[query] = float(np.std(full, ddof=1)) if len(full) > 1 else float("nan")
            base = float(np.mean(full))
            for method, by_size in values.get("removal", {}).items():
                for label, row in by_size.items():
                    change = float(np.mean(row["losses"])) - base
                    self._add(label, method, query, change)
            for label, draws in self.random.items():
                change = float(np.mean([draw[query] for draw in draws])) - base
                self._add(label, RANDOM_REMOVAL, query, change)
                # One seed against the others: what chance alone does without any removal.
                if len(full) > 1 and label != SHARE:
                    chance = full[0] - float(np.mean(full[1:]))
                    self._add(label, NO_REMOVAL, query, chance)
        self._differences()

    def _add(self, label: str, method: str, query: str, change: float) -> None:
        self.comparison.add(rise(label), method, query, change)

    def _differences(self) -> None:
        """QLD: the rise without the top share minus that without a random share."""
        rows = self.comparison.values.pop(rise(SHARE), None)
        if not rows or RANDOM_REMOVAL not in rows:
            return
        random = rows.pop(RANDOM_REMOVAL)
        for method, by_query in rows.items():
            for query, value in by_query.items():
                self.comparison.add(QLD, method, query, value - random[query])

    # --- Correlations ---------------------------------------------------------------------------

    def _lds(self) -> None:
        """`lds` per method and query, and the correlation between the two halves of the seeds."""
        subsets = sorted(self.lds)
        if len(subsets) < 2:
            return
        for query, values in self.queries.items():
            losses = np.asarray([self.lds[j][query] for j in subsets], dtype=float)
            mean = losses.mean(axis=1)
            half = losses.shape[1] // 2
            if half:
                self.ceiling[query] = spearman(
                    losses[:, :half].mean(axis=1), losses[:, half:].mean(axis=1)
                )
            for method, sums in values.get("predicted", {}).items():
                chosen = np.asarray([sums[j] for j in subsets], dtype=float)
                self.comparison.add(LDS, method, query, spearman(chosen, -mean))

    def _loo(self) -> None:
        """`loo` per method and query; a sample without a score counts as 0."""
        removed = sorted(self.loo)
        if len(removed) < 2:
            return
        for query, values in self.queries.items():
            losses = [float(np.mean(self.loo[j][query])) for j in removed]
            for method, row in values.get("loo_scores", {}).items():
                chosen = np.nan_to_num(np.asarray([row[j] for j in removed], dtype=float))
                self.comparison.add(LOO, method, query, spearman(chosen, np.asarray(losses)))

    def metrics(self) -> list[Metric]:
        """Means over queries with intervals."""
        out = list(self.comparison.metrics())
        for name, values, unit in (
            ("lds_noise_ceiling", self.ceiling, ""),
            ("full_seed_spread", self.spread, NATS),
        ):
            e = estimate(np.asarray(list(values.values())))
            if e.n:
                out.append(Metric(name, e.value, e.n, e.interval, unit=unit))
        if self.full and self.queries:
            losses = [np.mean([seed[q][0] for seed in self.full]) for q in self.queries]
            e = estimate(np.asarray(losses))
            out.append(Metric("full_loss", e.value, e.n, e.interval, False, NATS))
        return out
