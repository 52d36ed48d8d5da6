"""Statistics of games: rates, comparisons of cells, censored rounds, and how many games to play.

Intervals are two-sided and 95 % unless `confidence` says otherwise. Wilson's interval is the
core's (`tenfold.stats.wilson`). Nothing draws from a global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tenfold.errors import ConfigError
from tenfold.stats import Interval, normal_quantile, wilson

Count = tuple[int, int]
"""`(successes, games)`."""


def _scipy() -> Any:
    from scipy import stats

    return stats


def halfwidth(successes: int, n: int, confidence: float = 0.95) -> float:
    """Half the width of Wilson's interval; 0.5, all that is known, for n = 0."""
    interval = wilson(successes, n, confidence)
    return 0.5 if interval is None else (interval[1] - interval[0]) / 2


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """The exact interval of a proportion, from the beta distribution; None for n = 0.

    It covers at least as often as it says, at the price of width (Clopper and Pearson 1934).
    """
    _check_count((successes, n))
    if n == 0:
        return None
    tail = (1 - confidence) / 2
    low = _scipy().beta.ppf(tail, successes, n - successes + 1) if successes else 0.0
    high = _scipy().beta.ppf(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two rates with its interval."""

    value: float
    low: float
    high: float


def newcombe(first: Count, second: Count, confidence: float = 0.95) -> Difference | None:
    """First rate minus second, by Newcombe's score interval; None where a cell is empty.

    It combines the two Wilson intervals (Newcombe 1998, method 10).
    """
    one, two = wilson(*first, confidence), wilson(*second, confidence)
    if one is None or two is None:
        return None
    p, q = first[0] / first[1], second[0] / second[1]
    below = math.hypot(p - one[0], two[1] - q)
    above = math.hypot(one[1] - p, q - two[0])
    return Difference(p - q, p - q - below, p - q + above)


def fisher(first: Count, second: Count) -> float:
    """Two-sided p of Fisher's exact test that two cells have one rate; 1 for an empty cell."""
    _check_count(first)
    _check_count(second)
    table = [[first[0], first[1] - first[0]], [second[0], second[1] - second[0]]]
    return float(_scipy().fisher_exact(table).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being a family, in the given order (Holm 1979).

    Rejecting those below α errs anywhere in the family with probability at most α.
    """
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda i: (p_values[i], i))):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True, slots=True)
class Paired:
    """McNemar's exact test over pairs of games that share seed, roles and initial values.

    Attributes:
        pairs: games in both cells.
        only_first: valid in the first cell alone.
        only_second: valid in the second cell alone.
        p: two-sided p; 1 without a discordant pair.
    """

    pairs: int
    only_first: int
    only_second: int
    p: float


def mcnemar(first: Mapping[int, bool], second: Mapping[int, bool]) -> Paired:
    """Compares two cells by their replicates: `{replicate: success}`; the common ones count."""
    common = sorted(set(first) & set(second))
    only_first = sum(first[r] and not second[r] for r in common)
    only_second = sum(second[r] and not first[r] for r in common)
    discordant = only_first + only_second
    p = 1.0
    if discordant:
        p = float(_scipy().binomtest(only_first, discordant, 0.5).pvalue)
    return Paired(len(common), only_first, only_second, p)


@dataclass(frozen=True, slots=True)
class Survival:
    """A Kaplan-Meier curve: `survival[k]` holds from `times[k]` until the next one.

    Attributes:
        times: event times, ascending; before the first one the survival is 1.
        survival: probability of no event up to and at the time.
        at_risk: games at risk just before the time.
        events: events at the time.
        intervals: of the survival, by Greenwood's variance of its complementary log-log.
        n: games.
    """

    times: tuple[float, ...]
    survival: tuple[float, ...]
    at_risk: tuple[int, ...]
    events: tuple[int, ...]
    intervals: tuple[Interval, ...]
    n: int

    def at(self, time: float) -> float:
        """Probability of no event by `time`."""
        value = 1.0
        for t, s in zip(self.times, self.survival, strict=True):
            if t > time:
                break
            value = s
        return value

    def restricted_mean(self, until: float) -> float:
        """Mean time to the event, cut at `until`: the area under the curve from 0 to there."""
        area, before, value = 0.0, 0.0, 1.0
        for t, s in zip(self.times, self.survival, strict=True):
            if t >= until:
                break
            area += value * (t - before)
            before, value = t, s
        return area + value * (until - before)


def kaplan_meier(
    times: Sequence[float], observed: Sequence[bool], confidence: float = 0.95
) -> Survival:
    """The product-limit estimate (Kaplan and Meier 1958).

    Args:
        times: time of the event, or of censoring, per game.
        observed: whether the event was seen; False is censored at that time.
        confidence: of the pointwise intervals.

    A game censored at t counts as at risk at t. Memory and time are those of a sort.
    """
    if len(times) != len(observed):
        raise ValueError(f"{len(times)} times for {len(observed)} games")
    z = normal_quantile(confidence)
    rows = sorted(zip(times, observed, strict=True))
    at_risk, value, greenwood = len(rows), 1.0, 0.0
    steps: list[tuple[float, float, int, int, Interval]] = []
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows) and rows[stop][0] == rows[start][0]:
            stop += 1
        events = sum(seen for _, seen in rows[start:stop])
        if events:
            value *= 1 - events / at_risk
            left = at_risk - events
            greenwood = greenwood + events / (at_risk * left) if left else math.inf
            steps.append((rows[start][0], value, at_risk, events, _loglog(value, greenwood, z)))
        at_risk -= stop - start
        start = stop
    columns = list(zip(*steps, strict=True)) or [()] * 5
    return Survival(*(tuple(column) for column in columns), n=len(rows))


def _loglog(value: float, greenwood: float, z: float) -> Interval:
    """Pointwise interval on the log(-log) scale, which stays inside [0, 1]."""
    if value <= 0.0 or value >= 1.0 or not math.isfinite(greenwood):
        return value, value
    spread = math.exp(z * math.sqrt(greenwood) / abs(math.log(value)))
    return value**spread, value ** (1 / spread)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its interval (None for fewer than two values)."""

    value: float
    n: int
    interval: Interval | None


def conditional_mean(values: Sequence[float], confidence: float = 0.95) -> Mean | None:
    """Mean with Student's t interval; None for no values.

    Over the rounds of valid games alone it is what the paper reports. It ignores every game that
    took too long, so a cell that fails more often can look faster; see `kaplan_meier`.
    """
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, 1, None)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(_scipy().t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Mean(mean, n, (mean - half, mean + half))


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    method: str = "bca",
    confidence: float = 0.95,
) -> Interval | None:
    """Bootstrap interval over games; None for fewer than two values or where it is undefined.

    Args:
        values: one number per game.
        statistic: of an array of them.
        seed: of the resampling; equal arguments give equal intervals.
        resamples: how often.
        method: `percentile`, or `bca`: corrected for bias and skewness (Efron 1987).
        confidence: of the interval.

    Raises:
        ConfigError: another method.
    """
    names = {"bca": "BCa", "percentile": "percentile"}
    if method not in names:
        raise ConfigError(f"bootstrap method is {method!r}; it must be bca or percentile")
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return None
    if np.ptp(data) == 0:  # resamples do not differ; scipy would divide by zero
        constant = float(statistic(data))
        return constant, constant
    found = _scipy().bootstrap(
        (data,), statistic, n_resamples=resamples, confidence_level=confidence,
        method=names[method], rng=np.random.default_rng(seed), vectorized=False,
        batch=1000,
    ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    return None if math.isnan(low) or math.isnan(high) else (low, high)


@dataclass(frozen=True, slots=True)
class Effect:
    """One line of a logistic regression: log odds ratio, Wald interval and p."""

    name: str
    value: float
    interval: Interval
    p: float


def logistic(
    successes: Sequence[bool],
    columns: Mapping[str, Sequence[float]],
    *,
    firth: bool = True,
    confidence: float = 0.95,
) -> list[Effect]:
    """Logistic regression of success on the columns and an intercept.

    Firth's penalty keeps estimates finite where a cell has no success at all, as games against
    several adversaries do; without it the estimate is the ordinary maximum likelihood.

    Args:
        successes: per game.
        columns: name → value per game, e.g. log2 of N, B, a 0/1 column per model.
        firth: with the penalty (Firth 1993).
        confidence: of the Wald intervals.

    Raises:
        ConfigError: columns that cannot be told apart, or estimates that do not exist.
    """
    y = np.asarray(successes, dtype=float)
    names = ["intercept", *columns]
    x = np.column_stack([np.ones(len(y)), *(np.asarray(c, dtype=float) for c in columns.values())])
    if np.linalg.matrix_rank(x) < x.shape[1]:
        raise ConfigError(
            f"the columns {', '.join(columns)} determine each other over these {len(y)} games",
            hint="leave out a column that is constant or a combination of others",
        )
    # Columns of one size make Newton's steps and the check for separation mean the same for all.
    scale = np.concatenate([[1.0], np.abs(x[:, 1:]).max(axis=0)])
    beta, information = _fit(x / scale, y, firth=firth)
    errors = np.sqrt(np.diag(np.linalg.inv(information))) / scale
    beta = beta / scale
    z = normal_quantile(confidence)
    return [
        Effect(
            name,
            float(b),
            (float(b - z * e), float(b + z * e)),
            float(2 * _scipy().norm.sf(abs(b / e))),
        )
        for name, b, e in zip(names, beta, errors, strict=True)
    ]


def _fit(x: np.ndarray, y: np.ndarray, *, firth: bool) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method with halved steps; estimate `[k]` and information `[k, k]`."""

    def objective(beta: np.ndarray) -> float:
        eta = x @ beta
        likelihood = float(y @ eta - np.logaddexp(0, eta).sum())
        if not firth:
            return likelihood
        return likelihood + 0.5 * float(np.linalg.slogdet(_information(x, beta))[1])

    beta = np.zeros(x.shape[1])
    value = objective(beta)
    for _ in range(200):
        p = 1 / (1 + np.exp(-(x @ beta)))
        information = _information(x, beta)
        residual = y - p
        if firth:
            w = np.sqrt(p * (1 - p))[:, None] * x
            leverage = np.einsum("ij,ij->i", w @ np.linalg.inv(information), w)
            residual = residual + leverage * (0.5 - p)
            # The penalty bends the objective as if each game had 1 + leverage weight; without
            # that, steps over few games are twice too long and never settle.
            information = x.T @ (x * ((1 + leverage) * p * (1 - p))[:, None])
        step = np.linalg.solve(information, x.T @ residual)
        for _ in range(40):
            better = objective(beta + step)
            if better >= value - 1e-12:
                break
            step = step / 2
        beta, value = beta + step, better
        if np.abs(step).max() < 1e-10:
            return beta, _information(x, beta)
        if not firth and np.abs(x @ beta).max() > 50:
            break
    raise ConfigError(
        "the logistic regression has no finite estimate: a column separates successes from failures"
    )


def _information(x: np.ndarray, beta: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-(x @ beta)))
    return x.T @ (x * (p * (1 - p))[:, None])


def games_per_cell(p0: float, p1: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Games per cell so that a two-sided test tells two rates apart with this power.

    The usual normal approximation with pooled variance under the null (Fleiss 1981, 3.14).

    Raises:
        ConfigError: a rate or level outside (0, 1), or equal rates.
    """
    _check_power(p0, p1, power, alpha)
    a = normal_quantile(1 - alpha)
    b = float(_scipy().norm.ppf(power))
    mean = (p0 + p1) / 2
    spread = a * math.sqrt(2 * mean * (1 - mean)) + b * math.sqrt(p0 * (1 - p0) + p1 * (1 - p1))
    return math.ceil((spread / (p0 - p1)) ** 2)


def fisher_power(n: int, p0: float, p1: float, alpha: float = 0.05) -> float:
    """Exact probability that Fisher's test at level alpha tells two cells of n games apart.

    Sums over all pairs of counts; cost O(n² log n).
    """
    counts = np.arange(n + 1)
    first = _scipy().binom.pmf(counts, n, p0)
    second = _scipy().binom.pmf(counts, n, p1)
    total = 0.0
    for m in range(2 * n + 1):
        a = np.arange(max(0, m - n), min(m, n) + 1)
        null = _scipy().hypergeom.pmf(a, 2 * n, n, m)
        order = np.sort(null)
        # A table's p is the mass of all that are no likelier; equal ones differ by rounding.
        p = np.cumsum(order)[np.searchsorted(order, null * (1 + 1e-7), side="right") - 1]
        total += float((first[a] * second[m - a])[p <= alpha].sum())
    return total


def games_for_fisher(
    p0: float, p1: float, power: float = 0.8, alpha: float = 0.05, most: int = 2000
) -> int | None:
    """The smallest n from which on Fisher's exact test has this power; None above `most`.

    The exact test is conservative, so this exceeds `games_per_cell`. Its power is not monotone in
    n: the number returned keeps the power for the next ten n as well.

    Raises:
        ConfigError: see `games_per_cell`.
    """
    n = max(2, int(games_per_cell(p0, p1, power, alpha) * 0.9))
    run = 0
    while n <= most + 10:
        run = run + 1 if fisher_power(n, p0, p1, alpha) >= power else 0
        if run == 10:
            return n - 9
        n += 1
    return None


def _check_power(p0: float, p1: float, power: float, alpha: float) -> None:
    for name, value in (("p0", p0), ("p1", p1), ("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} is {value:g}; it must lie between 0 and 1")
    if p0 == p1:
        raise ConfigError(f"p0 and p1 are both {p0:g}; no number of games tells them apart")


def _check_count(count: Count) -> None:
    if not 0 <= count[0] <= count[1]:
        raise ValueError(f"{count[0]} successes of {count[1]}")
