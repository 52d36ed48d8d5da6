"""From the items of `nvium:tradeoff` to numbers: points, intervals, the curve between them.

Intervals come from resampling texts; all points see the same resamples, so the interval of a
difference between two of them is not widened by what both find hard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tenfold.records import ItemResult, Metric, Metrics
from tenfold.stats import Interval, median, median_interval

from tenfold_nvium.tradeoff import DENSE, ORACLE, TRAINED

RESAMPLES = 1000
_BLOCK = 50


@dataclass(slots=True)
class Speed:
    """Measured decoding of one point, one entry per pass."""

    rates: list[float] = field(default_factory=list)
    """Tokens per second."""
    ratios: list[float] = field(default_factory=list)
    """Rate over the reference's in the same pass."""
    depths: list[float] = field(default_factory=list)
    """Share of the layers that ran one after the other, per token."""


@dataclass(slots=True)
class CurvePoint:
    """One point over all texts.

    Attributes:
        name: `offset=+0.5`, `exit=2`, `oracle` or `dense`.
        loss: nats per token, with its interval; `gap` is loss minus the dense twin's.
        depth: expected share of the layers, `shares` of the exits.
        pareto: whether no other point (the oracle aside) is both shallower and better.
    """

    name: str
    loss: float
    interval: Interval | None
    gap: float | None
    gap_interval: Interval | None
    depth: float
    shares: list[float]
    pareto: bool = False
    speed: Speed | None = None

    @property
    def offset(self) -> float | None:
        """The routers' shift, for points that have one."""
        kind, _, value = self.name.partition("=")
        return float(value) if kind == "offset" else None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, infinite where that overflows."""
        return _exp(self.loss)


@dataclass(slots=True)
class Curve:
    """All points, in the order of the items: offsets, fixed exits, oracle, dense twin."""

    points: list[CurvePoint]
    texts: int
    tokens: int
    cut: int
    """Texts that were longer than what was scored."""
    reference: str
    """Point that speed-ups are relative to: the dense twin, else the last exit."""

    @classmethod
    def of(cls, results: Iterable[ItemResult], seed: int) -> Curve:
        """Sums the items' values; `seed` is that of the resampling."""
        sums: dict[str, list[Mapping[str, Any]]] = {}
        tokens: list[int] = []
        passes: list[Mapping[str, Any]] = []
        cut = 0
        for result in results:
            values = result.values
            if "times" in values:
                passes.append(values["times"])
            elif values["tokens"]:
                tokens.append(values["tokens"])
                cut += values["cut"]
                for name, point in values["points"].items():
                    sums.setdefault(name, []).append(point)
        points = _points(sums, tokens, seed)
        fixed = [p.name for p in points if p.name.startswith("exit=")]
        reference = DENSE if DENSE in sums else fixed[-1] if fixed else ""
        for point in points:
            point.speed = _speed(passes, point.name, reference)
        _mark_pareto(points)
        return cls(points, len(tokens), sum(tokens), cut, reference)

    def point(self, name: str) -> CurvePoint | None:
        """The point of that name, if there is one."""
        return next((p for p in self.points if p.name == name), None)

    def shifted(self) -> list[CurvePoint]:
        """The curve: points by offset, deepest first."""
        return sorted((p for p in self.points if p.offset is not None), key=lambda p: -p.depth)

    def depth_at(self, loss: float) -> float | None:
        """Smallest depth at which the curve, a straight line between neighbours, has at most
        this loss; None where it never does."""
        line = self.shifted()
        found = [p.depth for p in line if p.loss <= loss]
        for a, b in itertools.pairwise(line):
            if (a.loss - loss) * (b.loss - loss) < 0:
                share = (loss - a.loss) / (b.loss - a.loss)
                found.append(a.depth + share * (b.depth - a.depth))
        return min(found, default=None)

    def metrics(self) -> Metrics:
        """The trained point's numbers without a group, then every point's."""
        if not self.points:
            return []
        found = [Metric("tokens", float(self.tokens), self.texts)]
        if self.cut:
            found.append(Metric("texts_cut", float(self.cut), self.texts))
        trained, dense = self.point(TRAINED), self.point(DENSE)
        if trained is not None:
            found += self._metrics_of(trained, "")
            for k, share in enumerate(trained.shares):
                found.append(Metric("share", share, self.tokens, group=f"exit={k + 1}"))
        if dense is not None:
            depth = self.depth_at(dense.loss)
            if depth is not None:
                found.append(
                    Metric("depth_at_dense_loss", depth, self.texts, higher_is_better=False)
                )
        for point in self.points:
            found += self._metrics_of(point, point.name)
        return found

    def _metrics_of(self, point: CurvePoint, group: str) -> Metrics:
        n, interval = self.texts, point.interval
        spread = None if interval is None else (_exp(interval[0]), _exp(interval[1]))
        found = [
            Metric("perplexity", point.perplexity, n, spread, False, "", group),
            Metric("nats_per_token", point.loss, n, interval, False, "nats", group),
            Metric("expected_depth", point.depth, n, None, False, "", group),
            Metric("bound", 1 / point.depth, n, None, True, "x", group),
        ]
        if point.gap is not None and point.name != DENSE:
            found.append(
                Metric("gap_to_dense", point.gap, n, point.gap_interval, False, "nats", group)
            )
        if point.speed is not None:
            rates, ratios, depths = point.speed.rates, point.speed.ratios, point.speed.depths
            found += [
                Metric("tokens_per_second", median(rates), len(rates), median_interval(rates),
                       True, "tokens/s", group),
                Metric("speedup", median(ratios), len(ratios), median_interval(ratios),
                       True, "x", group),
                Metric("decoded_depth", median(depths), len(depths), None, False, "", group),
            ]  # fmt: skip
        return found


def _points(
    sums: Mapping[str, Sequence[Mapping[str, Any]]], tokens: Sequence[int], seed: int
) -> list[CurvePoint]:
    """Every point's loss with its interval, and its gap to the dense twin."""
    names = list(sums)
    if not names:
        return []
    nats = np.array([[point["nats"] for point in sums[name]] for name in names])
    total = sum(tokens)
    losses = nats.sum(1) / total
    drawn = resampled_losses(nats, np.asarray(tokens, dtype=float), seed)
    base = names.index(DENSE) if DENSE in names else None
    points = []
    for i, name in enumerate(names):
        gap = None if base is None else float(losses[i] - losses[base])
        shares = np.sum([point["shares"] for point in sums[name]], axis=0) / total
        points.append(
            CurvePoint(
                name,
                float(losses[i]),
                _middle(drawn[:, i]),
                gap,
                None if base is None else _middle(drawn[:, i] - drawn[:, base]),
                sum(point["depth"] for point in sums[name]) / total,
                shares.tolist(),
            )
        )
    return points


def resampled_losses(nats: np.ndarray, tokens: np.ndarray, seed: int) -> np.ndarray:
    """Losses `[R, P]` of R resamples of the texts, from `nats [P, N]` and `tokens [N]`; no
    rows for fewer than two texts."""
    count = len(tokens)
    if count < 2:
        return np.zeros((0, len(nats)))
    generator, even = np.random.default_rng(seed), np.full(count, 1 / count)
    parts = []
    for _ in range(0, RESAMPLES, _BLOCK):  # a block of counts at a time, for many texts
        weights = generator.multinomial(count, even, size=_BLOCK).astype(float)
        parts.append((weights @ nats.T) / (weights @ tokens)[:, None])
    return np.concatenate(parts)


def _middle(drawn: np.ndarray) -> Interval | None:
    """The middle 95 % of resampled values."""
    if not len(drawn):
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _speed(passes: Sequence[Mapping[str, Any]], name: str, reference: str) -> Speed | None:
    """A point's speed in every pass that timed it."""
    speed = Speed()
    for times in passes:
        if name not in times or not times[name]["tokens"]:
            continue
        rate, base = (_rate(times[key]) for key in (name, reference))
        speed.rates.append(rate)
        speed.ratios.append(rate / base)
        speed.depths.append(times[name]["depth"])
    return speed if speed.rates else None


def _rate(values: Mapping[str, Any]) -> float:
    return values["tokens"] / max(values["seconds"], 1e-9)


def _mark_pareto(points: Sequence[CurvePoint]) -> None:
    """Marks the points that no other one beats in depth and loss; the oracle is no model."""
    models = [p for p in points if p.name != ORACLE]
    for point in models:
        point.pareto = not any(
            p.depth <= point.depth
            and p.loss <= point.loss
            and (p.depth < point.depth or p.loss < point.loss)
            for p in models
        )


def _exp(nats: float) -> float:
    """`exp` that ends in infinity instead of an error."""
    return math.exp(nats) if nats < 700 else math.inf
