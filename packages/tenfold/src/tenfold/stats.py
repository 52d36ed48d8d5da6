"""Intervals and summaries for metrics: plain Python, no random state left to chance.

Every interval is a two-sided 95 % interval unless `confidence` says otherwise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

Interval = tuple[float, float]
T = TypeVar("T")


def normal_quantile(confidence: float = 0.95) -> float:
    """The z with probability `confidence` between -z and z under the standard normal."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval of a proportion; None for n = 0.

    Unlike the normal approximation it stays inside [0, 1] and has width at 0 and n successes
    (Wilson 1927; Brown, Cai and DasGupta 2001).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return None
    z2 = normal_quantile(confidence) ** 2
    p = successes / n
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the formula is exact in theory and off by rounding in practice.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


@dataclass(slots=True)
class MeanSum:
    """Running mean and variance (Welford's algorithm): flat memory for any number of values."""

    n: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self.n += 1
        delta = value - self.mean
        self.mean += delta / self.n
        self._squares += delta * (value - self.mean)

    @property
    def variance(self) -> float:
        """Unbiased variance; 0 for fewer than two values."""
        return self._squares / (self.n - 1) if self.n > 1 else 0.0

    def interval(self, confidence: float = 0.95) -> Interval | None:
        """Normal interval of the mean; None for fewer than two values."""
        if self.n < 2:
            return None
        half = normal_quantile(confidence) * math.sqrt(self.variance / self.n)
        return self.mean - half, self.mean + half


@dataclass(slots=True)
class RatioSum:
    """Running ratio of two sums, such as nats over tokens, with its delta-method interval.

    The observations are pairs (one per document); pairs are independent, their parts need not
    be. With r = Σx/Σy the variance is n/(n-1) · Σ(x - r·y)² / (Σy)² (linearisation of the
    ratio estimator, Cochran 1977, §6.4).
    """

    n: int = 0
    x: float = 0.0
    y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """One more pair."""
        self.n += 1
        self.x += x
        self.y += y
        self._xx += x * x
        self._xy += x * y
        self._yy += y * y

    @property
    def ratio(self) -> float:
        """Σx / Σy; NaN when Σy is 0."""
        return self.x / self.y if self.y else math.nan

    def interval(self, confidence: float = 0.95) -> Interval | None:
        """Interval of the ratio; None for fewer than two pairs or Σy = 0."""
        if self.n < 2 or not self.y:
            return None
        r = self.ratio
        # The sum is not negative; rounding can make it so when all ratios are equal.
        residuals = max(0.0, self._xx - 2 * r * self._xy + r * r * self._yy)
        deviation = math.sqrt(self.n / (self.n - 1) * residuals) / abs(self.y)
        half = normal_quantile(confidence) * deviation
        return r - half, r + half


def bootstrap(
    values: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval | None:
    """Percentile bootstrap interval of any statistic; None for fewer than two values.

    A function of its arguments: the resampling draws from a generator seeded with `seed`.
    Cost: `resamples` calls of `statistic`.
    """
    if len(values) < 2:
        return None
    draw = random.Random(seed)
    size = len(values)
    drawn = sorted(statistic(draw.choices(values, k=size)) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return quantile(drawn, tail), quantile(drawn, 1 - tail)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, by linear interpolation; NaN for no values."""
    if not 0 <= q <= 1:
        raise ValueError(f"quantile {q} is not between 0 and 1")
    if not ordered:
        return math.nan
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median(values: Iterable[float]) -> float:
    """The median; NaN for no values."""
    return quantile(sorted(values), 0.5)


def median_interval(values: Iterable[float], confidence: float = 0.95) -> Interval | None:
    """Distribution-free interval of the median from order statistics.

    The k-th smallest and k-th largest of n values enclose the median with probability
    1 - 2·P(Binomial(n, 1/2) < k); the largest such k is taken. None where even the two
    extremes cover it too rarely (n < 6 at 95 %).
    """
    ordered = sorted(values)
    n = len(ordered)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 1 - 2 * tail < confidence:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None
