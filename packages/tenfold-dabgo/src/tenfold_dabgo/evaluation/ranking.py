"""Methods side by side: per-query values, their means with intervals, and paired tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tenfold.records import Metric
from tenfold.report import Table

from tenfold_dabgo.evaluation.counterfactual import Estimate, estimate, wilcoxon_signed_rank

MIN_PAIRS = 2
"""Pairs of queries that a paired test needs."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a number means: its metric's name, the condition it was taken under (`k=10`), its
    unit, which direction is better, and whether methods are tested against each other."""

    name: str
    condition: str = ""
    unit: str = ""
    higher_is_better: bool | None = True
    tested: bool = True


@dataclass
class Comparison:
    """Measure → method → query → value; `reference` is the method that others are tested
    against (the first one named)."""

    reference: str = ""
    values: dict[Measure, dict[str, dict[str, float]]] = field(default_factory=dict)

    def add(self, measure: Measure, method: str, query: str, value: float | None) -> None:
        """One query's value; None counts as missing."""
        cells = self.values.setdefault(measure, {}).setdefault(method, {})
        cells[query] = float("nan") if value is None else float(value)

    def measures(self, name: str) -> list[Measure]:
        """Measures of a metric, in the order they came in."""
        return [m for m in self.values if m.name == name]

    def estimate(self, measure: Measure, method: str) -> Estimate:
        """Mean over queries with its interval."""
        return estimate(np.asarray(list(self.values[measure][method].values())))

    def p_value(self, measure: Measure, method: str) -> float | None:
        """Two-sided paired Wilcoxon test against the reference; None where there is no pair."""
        rows = self.values[measure]
        if not measure.tested or method == self.reference or self.reference not in rows:
            return None
        ours, theirs = rows[method], rows[self.reference]
        common = [q for q in ours if q in theirs and np.isfinite([ours[q], theirs[q]]).all()]
        if len(common) < MIN_PAIRS:
            return None
        return wilcoxon_signed_rank(
            np.asarray([ours[q] for q in common]), np.asarray([theirs[q] for q in common])
        )

    def metrics(self) -> Iterator[Metric]:
        """Every mean that is known, and the tests against the reference (`<name>_p`)."""
        for measure, rows in self.values.items():
            for method in rows:
                found = self.estimate(measure, method)
                if not found.n:
                    continue
                group = group_of(method, measure.condition)
                yield Metric(
                    measure.name,
                    found.value,
                    found.n,
                    found.interval,
                    measure.higher_is_better,
                    measure.unit,
                    group,
                )
                p = self.p_value(measure, method)
                if p is not None:
                    yield Metric(f"{measure.name}_p", p, found.n, group=group)

    def ranked(self, measure: Measure, caption: str = "") -> Table:
        """One row per method, best first."""
        found = {m: self.estimate(measure, m) for m in self.values[measure]}
        sign = -1.0 if measure.higher_is_better is False else 1.0
        order = sorted(
            found,
            key=lambda m: (not np.isfinite(found[m].value), -sign * found[m].value, m),
        )
        rows = []
        for rank, method in enumerate(order, start=1):
            e = found[method]
            low, high = e.interval or (None, None)
            p = self.p_value(measure, method)
            cells = (e.value, low, high, e.error)
            row = [rank, method, *map(rounded, cells), e.n]
            rows.append([*row, rounded(p)] if measure.tested else row)
        title = measure.name + (f" ({measure.unit})" if measure.unit else "")
        columns = ["rank", "method", title, "low", "high", "s.e.", "queries"]
        columns += [f"p against {self.reference}"] if measure.tested else []
        return Table(columns, rows, caption)


def group_of(method: str, condition: str = "") -> str:
    """A metric's group: `method=dabgo,k=10`."""
    return f"method={method}" + (f",{condition}" if condition else "")


def rounded(value: Any, digits: int = 4) -> float | None:
    """A number for a table cell."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def by_k(
    comparison: Comparison, name: str, prefix: str = ""
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float] | None]]]:
    """Method → points `(k, mean)` in the order of k, and their intervals, of the measures
    called `name` whose condition is `<prefix>k=<number>`."""
    found: dict[str, list[tuple[float, float, tuple[float, float] | None]]] = {}
    for measure in comparison.measures(name):
        head, _, k = measure.condition.rpartition("k=")
        if head != prefix or not k.isdigit():
            continue
        for method in comparison.values[measure]:
            e = comparison.estimate(measure, method)
            if e.n:
                found.setdefault(method, []).append((float(k), e.value, e.interval))
    for rows in found.values():
        rows.sort(key=lambda row: row[0])
    points = {method: [(k, mean) for k, mean, _ in rows] for method, rows in found.items()}
    return points, {method: [i for *_, i in rows] for method, rows in found.items()}
