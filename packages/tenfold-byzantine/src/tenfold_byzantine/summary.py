"""From rows to cells: rates with intervals, times with censoring, comparisons with a base cell.

Games that ended in an error are counted and left out of every rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold.records import Metric
from tenfold.stats import MeanSum, wilson

from tenfold_byzantine.result import GROUPINGS
from tenfold_byzantine.rows import top
from tenfold_byzantine.statistics import (
    Difference,
    Effect,
    Mean,
    Paired,
    Survival,
    conditional_mean,
    fisher,
    holm,
    kaplan_meier,
    logistic,
    mcnemar,
    newcombe,
)

PROPERTIES = (
    "termination",
    "agreement",
    "strong_validity",
    "hull_validity",
    "unanimity_validity",
)

KEY_MEASURES = (
    "influence",
    "stubbornness",
    "time_lost_to_voting",
    "vote_precision",
    "vote_recall",
    "quality",
    "keyword_hits",
)
"""Measures that become metrics of a run; rows have all of them."""


def setting_name(path: str) -> str:
    """A setting's short name: `game.n_byzantine` → `n_byzantine`, `honest.use` → `honest`."""
    parts = path.split(".")
    return parts[-2] if parts[-1] == "use" and len(parts) > 1 else parts[-1]


def cell_label(coordinates: Mapping[str, Any]) -> str:
    """`n_byzantine=2, honest=low-median`; `all` for the cell without coordinates."""
    return ", ".join(f"{setting_name(k)}={v}" for k, v in coordinates.items()) or "all"


@dataclass(slots=True)
class Cell:
    """Running sums over the games of one cell; memory: a few numbers per game."""

    coordinates: Mapping[str, Any]
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    valid_by_replicate: dict[int, bool] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)
    properties: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, MeanSum] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    agents: tuple[int, int] = (0, 0)
    safety_failures: int = 0
    courses: dict[int, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """See `cell_label`."""
        return cell_label(self.coordinates)

    @property
    def games(self) -> int:
        """Games that count in rates."""
        return len(self.times)

    @property
    def valid(self) -> tuple[int, int]:
        """Valid games and games."""
        return self.count("VALID"), self.games

    def count(self, name: str) -> int:
        """Games of a top-level outcome."""
        return sum(n for outcome, n in self.outcomes.items() if outcome.partition(".")[0] == name)

    @property
    def survival(self) -> Survival:
        """Time to a valid end.

        A game that stopped on something else can no longer become valid: it stays at risk until
        its deadline, where it is censored, so that 1 - survival is the share valid by a round.
        """
        return kaplan_meier(self.times, self.observed)

    @property
    def deadline(self) -> int:
        """The latest deadline of its games."""
        return max(self.times, default=0)

    @property
    def rounds(self) -> Mean | None:
        """Mean rounds of the valid games alone, as the paper reports it."""
        return conditional_mean([t for t, s in zip(self.times, self.observed, strict=True) if s])

    def add(self, row: Mapping[str, Any]) -> None:
        """One more game."""
        kind = top(row)
        self.agents = (row["n_honest"], row["n_byzantine"])
        if kind == "ERROR":
            self.errors += 1
            return
        valid = kind == "VALID"
        self.outcomes[row["outcome"]] += 1
        self.valid_by_replicate[row["replicate"]] = valid
        self.courses[row["replicate"]] = row["course"]
        self.times.append(row["rounds"] if valid else max(row["max_rounds"], row["rounds"]))
        self.observed.append(valid)
        self.properties.update(n for n in PROPERTIES if row["properties"].get(n))
        self.safety_failures += kind in ("INVALID", "PREMATURE")
        for name, value in row["metrics"].items():
            if isinstance(value, int | float):
                self.metrics.setdefault(name, MeanSum()).add(float(value))
        self.counters.update({k: v for k, v in row["counters"].items() if v})


def collect(rows: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Cells in the order in which their first game comes."""
    cells: dict[str, Cell] = {}
    for row in rows:
        label = cell_label(row["cell"])
        if label not in cells:
            cells[label] = Cell(row["cell"])
        cells[label].add(row)
    return list(cells.values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell against the base cell.

    Attributes:
        cell: the other cell.
        difference: its valid rate minus the base's, with Newcombe's interval.
        p: Fisher's exact test.
        p_holm: adjusted for all comparisons with the base.
        paired: McNemar's test over common replicates, which share seeds; None without any.
        same: common replicates whose games went the same way: equal roles, values and votes.
    """

    cell: Cell
    difference: Difference | None
    p: float
    p_holm: float
    paired: Paired | None
    same: int = 0


def compare(cells: Sequence[Cell], base: int = 0, *, paired: bool = True) -> list[Comparison]:
    """Every other cell against the base cell."""
    reference = cells[base]
    others = [cell for i, cell in enumerate(cells) if i != base]
    p_values = [fisher(cell.valid, reference.valid) for cell in others]
    out = []
    for cell, p, adjusted in zip(others, p_values, holm(p_values), strict=True):
        pairs = mcnemar(cell.valid_by_replicate, reference.valid_by_replicate) if paired else None
        if pairs is not None and not pairs.pairs:
            pairs = None
        same = sum(reference.courses.get(r) == course for r, course in cell.courses.items())
        difference = newcombe(cell.valid, reference.valid)
        out.append(Comparison(cell, difference, p, adjusted, pairs, same))
    return out


def effects(cells: Sequence[Cell]) -> list[Effect]:
    """Logistic regression of valid on log2 N, B, and a 0/1 column per other setting's value.

    Empty where fewer than two cells have games or no column varies.
    """
    used = [cell for cell in cells if cell.games]
    if len(used) < 2:
        return []
    named: dict[str, list[float]] = {"B": [float(cell.agents[1]) for cell in used]}
    # With one number of honest agents N says what B says, only bent.
    if len({cell.agents[0] for cell in used}) > 1:
        named = {"log2 N": [_log2(sum(cell.agents)) for cell in used], **named}
    for path in sorted({p for cell in used for p in cell.coordinates}):
        if path in ("game.n_honest", "game.n_byzantine"):
            continue
        values = list(dict.fromkeys(str(cell.coordinates.get(path)) for cell in used))
        for value in values[1:]:
            named[f"{setting_name(path)}={value}"] = [
                float(str(cell.coordinates.get(path)) == value) for cell in used
            ]
    varying = _independent(named)
    if not varying:
        return []
    successes: list[bool] = []
    columns: dict[str, list[float]] = {name: [] for name in varying}
    for index, cell in enumerate(used):
        valid, games = cell.valid
        successes += [True] * valid + [False] * (games - valid)
        for name, column in columns.items():
            column += [varying[name][index]] * games
    return logistic(successes, columns)


def _independent(columns: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The columns that, one after the other, add to the rank beside an intercept."""
    import numpy as np

    kept: dict[str, list[float]] = {}
    matrix = np.ones((len(next(iter(columns.values()))), 1))
    for name, column in columns.items():
        wider = np.column_stack([matrix, column])
        if np.linalg.matrix_rank(wider) > np.linalg.matrix_rank(matrix):
            kept[name], matrix = column, wider
    return kept


def _log2(value: int) -> float:
    import math

    return math.log2(value) if value > 0 else 0.0


def cell_metrics(cell: Cell, taxonomy: str = "full", *, alone: bool = False) -> Iterator[Metric]:
    """The numbers of one cell; `alone` leaves the group empty."""
    group, n = "" if alone else cell.label, cell.games
    if cell.errors:
        yield Metric("errors", cell.errors, n + cell.errors, None, False, "games", group)
    if not n:
        return

    def rate(name: str, count: int, better: bool | None) -> Metric:
        return Metric(name, count / n, n, wilson(count, n), better, "", group)

    labels = GROUPINGS[taxonomy]
    grouped: Counter[str] = Counter()
    for outcome, count in cell.outcomes.items():
        grouped[labels[outcome.partition(".")[0]]] += count
    for label in dict.fromkeys(labels.values()):
        yield rate(label.replace(" ", "_"), grouped[label], label == "valid")
    for name in PROPERTIES:
        yield rate(name, cell.properties[name], True)
    yield rate("liveness_failure", n - cell.properties["termination"], False)
    yield rate("safety_failure", cell.safety_failures, False)
    until = cell.deadline
    mean = cell.survival.restricted_mean(until)
    yield Metric("restricted_mean_rounds", mean, n, None, False, f"of {until}", group)
    if (rounds := cell.rounds) is not None:
        yield Metric(
            "rounds_when_valid", rounds.value, rounds.n, rounds.interval, False, "rounds", group
        )
    for name in KEY_MEASURES:
        if (total := cell.metrics.get(name)) is None:
            continue
        yield Metric(name, total.mean, total.n, total.interval(), None, "", group)
    for name, count in sorted(cell.counters.items()):
        yield Metric(name, count / n, n, None, None, "per game", group)


def comparison_metrics(comparisons: Iterable[Comparison]) -> Iterator[Metric]:
    """Differences from the base cell."""
    for c in comparisons:
        group, n = c.cell.label, c.cell.games
        if c.difference is not None:
            d = c.difference
            yield Metric("valid_minus_base", d.value, n, (d.low, d.high), None, "", group)
        yield Metric("fisher_p", c.p, n, None, None, "", group)
        yield Metric("fisher_p_holm", c.p_holm, n, None, None, "", group)
        if c.paired is not None:
            yield Metric("mcnemar_p", c.paired.p, c.paired.pairs, None, None, "", group)
            share = c.same / c.paired.pairs
            yield Metric("same_course_as_base", share, c.paired.pairs, None, None, "", group)
