"""Many games of a one-round rule at once, in NumPy columns (§8): over a million a second.

The game: complete graph, honest agents under one common rule, Byzantine agents that speak before
they heard anything and never vote stop. Round 1 says initial values; honest agents stop there
where all but B of the values are equal (`policies.base.votes_stop`); otherwise they apply the rule
to what they heard, hold the same value in round 2, and stop. Games are the columns of `[N, games]`
arrays of offsets `value - low`; results equal those of the scalar policies game by game.

A chunk's draws depend on the seed and the chunk's number, not on how many chunks follow.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenfold.errors import ConfigError
from tenfold.seeds import derive

from tenfold_byzantine.contracts import Policy, Rules
from tenfold_byzantine.policies import adversaries, averaging, one_round
from tenfold_byzantine.policies.registry import policy

Offsets = NDArray[Any]  # [rows, games], unsigned, value - low
CHUNK = 1 << 15  # columns: a row fits the first-level cache
STOPS = ("rule", "unanimity")
SEATINGS = 100_000  # tables of all seatings up to this many; sorted random keys above


@dataclass(frozen=True)
class Draws:
    """Games to be played.

    Attributes:
        honest: `[H, games]` initial values.
        byzantine: `[B, games]` what liars say in round 1; `[0, games]` where they are silent.
        seats: `[H + B, games]` per agent number the row of honest, then Byzantine agents.
    """

    honest: Offsets
    byzantine: Offsets
    seats: NDArray[Any]

    @property
    def rows(self) -> Offsets:
        """Honest rows, then Byzantine ones."""
        return np.concatenate([self.honest, self.byzantine])

    @property
    def by_agent(self) -> Offsets:
        """What was said, by number; silent agents left out."""
        rows = self.rows
        seats = self.seats
        if len(rows) < len(seats):  # the silent rows come last: keep the order of the others
            speaking = seats < len(rows)
            order = np.argsort(~speaking, axis=0, kind="stable")[: len(rows)]
            seats = np.take_along_axis(seats, order, axis=0)
        return np.take_along_axis(rows, seats, axis=0)


@dataclass(frozen=True)
class Endings:
    """How each game of a chunk ended.

    Attributes:
        decided: `[games]` the common value; that of the first honest agent where there is none.
        premature: stopped in round 1 without agreement.
        valid: agreed on an honest initial value.
        captured: agreed on a value that only liars had said.
        hull: agreed inside the honest range.
        first: stopped in round 1.
    """

    decided: Offsets
    premature: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    captured: NDArray[np.bool_]
    hull: NDArray[np.bool_]
    first: NDArray[np.bool_]


@dataclass(frozen=True)
class Counts:
    """Sums over games; what is neither valid, captured nor premature was fabricated."""

    games: int
    valid: int
    captured: int
    premature: int
    hull: int
    first: int

    @property
    def fabricated(self) -> int:
        """Agreed on a value that nobody had said."""
        return self.games - self.valid - self.captured - self.premature

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def simulate(
    rule: str | Policy,
    adversary: str | Policy = "silent",
    *,
    n_honest: int = 8,
    n_byzantine: int = 0,
    games: int = 100_000,
    seed: int = 0,
    low: int = 0,
    high: int = 50,
    stop: str = "rule",
) -> Counts:
    """Counts of endings over many games.

    Args:
        rule: what honest agents do.
        adversary: what Byzantine agents say in round 1.
        n_honest: H.
        n_byzantine: B.
        games: how many.
        seed: of all draws.
        low: smallest value.
        high: largest value.
        stop: `rule` is what agents can do (all but B values equal), which liars can trigger too
            early; `unanimity` ends a game when the honest agents agree, as only an observer could.

    Raises:
        ConfigError: a rule or adversary without a vectorised form, or so many Byzantine agents
            that the honest ones alone cannot reach the quota of two thirds.
    """
    if stop not in STOPS:
        raise ConfigError(f"stop is {stop!r}; it must be one of {', '.join(STOPS)}")
    setting = Setting.of(rule, adversary, n_honest, n_byzantine, low, high)
    total = Counts(0, 0, 0, 0, 0, 0)
    for draws in setting.chunks(games, seed):
        ends = setting.play(draws, stop)
        total += Counts(
            draws.honest.shape[1],
            *(
                int(np.count_nonzero(x))
                for x in (ends.valid, ends.captured, ends.premature, ends.hull, ends.first)
            ),
        )
    return total


@dataclass(frozen=True)
class Setting:
    """One kind of game, checked."""

    rule: one_round.OneRound
    adversary: Policy
    rules: Rules
    n_honest: int
    n_byzantine: int

    @classmethod
    def of(
        cls,
        rule: str | Policy,
        adversary: str | Policy,
        n_honest: int,
        n_byzantine: int,
        low: int,
        high: int,
    ) -> Setting:
        """From texts or objects; see `simulate`."""
        rule = policy(rule, role="honest") if isinstance(rule, str) else rule
        adversary = policy(adversary, role="byzantine") if isinstance(adversary, str) else adversary
        n = n_honest + n_byzantine
        if n_honest < 1 or n_byzantine < 0 or high < low:
            raise ConfigError(
                f"n_honest is {n_honest}, n_byzantine {n_byzantine}, the range {low} to {high}; "
                "at least one honest agent, no negative count and low <= high are needed"
            )
        if 3 * n_byzantine > n:
            raise ConfigError(
                f"{n_honest} honest agents of {n} cannot reach the quota of two thirds alone",
                hint="lower n_byzantine to a third of all agents, or play games one by one",
            )
        if not isinstance(rule, one_round.OneRound) or type(rule) not in RULES:
            known = names(RULES)
            raise ConfigError(f"{rule.label} has no vectorised form; those that have: {known}")
        if rule.q is not None:
            raise ConfigError(f"{rule.label}: q must be left at its default in simulations")
        if type(adversary) not in LIES:
            known = names(LIES)
            raise ConfigError(f"{adversary.label} has no vectorised form; those that have: {known}")
        if adversary.powers:
            raise ConfigError(f"{adversary.label} needs a fixed value here, e.g. collude:v=25")
        if isinstance(rule, averaging.Dlpsw) and isinstance(adversary, adversaries.Silent):
            raise ConfigError("dlpsw is no common rule where agents are silent; play games instead")
        quota = -(-2 * n // 3)
        rules = Rules(n, n_byzantine, low, high, max_rounds=2, quota=quota)
        for p in (rule, adversary):
            p.check(rules)
        return cls(rule, adversary, rules, n_honest, n_byzantine)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds all offsets and one more."""
        span = self.rules.high - self.rules.low
        return np.uint8 if span < 255 else np.uint16 if span < 65535 else np.uint32

    def chunks(self, games: int, seed: int) -> Iterator[Draws]:
        """Draws of games, chunk by chunk."""
        for number, start in enumerate(range(0, games, CHUNK)):
            rng = np.random.default_rng(derive(seed, "montecarlo", number))
            yield self.draw(rng, min(CHUNK, games - start))

    def draw(self, rng: np.random.Generator, games: int) -> Draws:
        """Initial values, lies and seats."""
        span = self.rules.high - self.rules.low + 1
        honest = rng.integers(0, span, (self.n_honest, games), dtype=self.dtype)
        lie = LIES[type(self.adversary)]
        byzantine = lie(self.adversary, rng, self.rules, (self.n_byzantine, games), self.dtype)
        return Draws(honest, byzantine, seatings(rng, self.n_honest, self.n_byzantine, games))

    def play(self, draws: Draws, stop: str = "rule") -> Endings:
        """The endings of drawn games."""
        rows = draws.rows
        said = draws.by_agent if type(self.rule) in BY_NUMBER else rows
        decided = RULES[type(self.rule)](said, self.rule, self.rules).astype(rows.dtype, copy=False)
        smallest, largest = draws.honest.min(axis=0), draws.honest.max(axis=0)
        unanimous = smallest == largest
        first = unanimous if stop == "unanimity" else self.stops_at_once(rows)
        decided = np.where(first, draws.honest[0], decided)
        agreed = ~first | unanimous
        valid = agreed & (draws.honest == decided).any(axis=0)
        lied = (draws.byzantine == decided).any(axis=0)
        return Endings(
            decided=decided,
            premature=~agreed,
            valid=valid,
            captured=agreed & ~valid & lied,
            hull=agreed & (smallest <= decided) & (decided <= largest),
            first=first,
        )

    def stops_at_once(self, rows: Offsets) -> NDArray[np.bool_]:
        """Whether all honest agents vote stop in round 1 (`policies.base.votes_stop`)."""
        silent = self.rules.agents - len(rows)
        allowed = max(self.n_byzantine - silent, 0)
        least = max(len(rows) - allowed, len(rows) // 2 + 1)
        return multiplicities(rows).max(axis=0) >= least


def names(classes: Iterable[type]) -> str:
    """Names of policies' classes, for messages."""
    return ", ".join(getattr(c, "name", c.__name__) for c in classes)


def seatings(rng: np.random.Generator, honest: int, byzantine: int, games: int) -> NDArray[Any]:
    """`[N, games]`: per number the row of the pool, all choices of liars equally likely."""
    n = honest + byzantine
    if byzantine == 0:
        return np.broadcast_to(
            np.arange(n, dtype=np.uint8 if n < 256 else np.intp)[:, None], (n, games)
        )
    if math.comb(n, byzantine) <= SEATINGS and n < 256:
        table = seating_table(honest, byzantine)
        return table[:, rng.integers(0, table.shape[1], games)]
    keys = rng.random((n, games))
    liars = np.argsort(np.argsort(keys, axis=0), axis=0) < byzantine
    return ranked(liars, honest)


@functools.lru_cache(maxsize=16)
def seating_table(honest: int, byzantine: int) -> NDArray[Any]:
    """`[N, seatings]` of all choices of Byzantine numbers."""
    n = honest + byzantine
    chosen = list(itertools.combinations(range(n), byzantine))
    liars = np.zeros((n, len(chosen)), dtype=bool)
    for column, numbers in enumerate(chosen):
        liars[list(numbers), column] = True
    return ranked(liars, honest).astype(np.uint8)


def ranked(liars: NDArray[np.bool_], honest: int) -> NDArray[Any]:
    """Rows of the pool by number: honest ones in order, Byzantine ones behind."""
    good = np.cumsum(~liars, axis=0) - 1
    bad = np.cumsum(liars, axis=0) - 1 + honest
    return np.where(liars, bad, good)


# --- what liars say ---------------------------------------------------------------------------

Lie = Callable[[Any, np.random.Generator, Rules, tuple[int, int], Any], Offsets]


def _uniform(who: Any, rng: np.random.Generator, rules: Rules, shape: Any, dtype: Any) -> Offsets:
    del who
    return rng.integers(0, rules.high - rules.low + 1, shape, dtype=dtype)


def _value(who: Any, rng: np.random.Generator, rules: Rules, shape: Any, dtype: Any) -> Offsets:
    del rng
    return np.full(shape, who.v - rules.low, dtype=dtype)


def _extreme(who: Any, rng: np.random.Generator, rules: Rules, shape: Any, dtype: Any) -> Offsets:
    del rng
    return np.full(shape, rules.high - rules.low if who.side == "max" else 0, dtype=dtype)


def _silent(who: Any, rng: np.random.Generator, rules: Rules, shape: Any, dtype: Any) -> Offsets:
    del who, rng, rules
    return np.empty((0, shape[1]), dtype=dtype)


LIES: Mapping[type, Lie] = {
    adversaries.Silent: _silent,
    adversaries.Fixed: _value,
    adversaries.Collude: _value,
    adversaries.Extreme: _extreme,
    adversaries.RandomLiar: _uniform,
}
"""Adversaries whose first words depend on nothing that they hear."""


# --- rules ------------------------------------------------------------------------------------


def multiplicities(said: Offsets) -> Offsets:
    """`[m, games]`: how often each row's value is said in its game."""
    m = len(said)
    counts = np.ones(said.shape, dtype=np.uint8 if m < 256 else np.uint32)
    for i, j in itertools.combinations(range(m), 2):
        equal = said[i] == said[j]
        counts[i] += equal
        counts[j] += equal
    return counts


@functools.lru_cache(maxsize=64)
def comparators(n: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge network: pairs `(i, j)`, i < j, that sort n values in this order."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(j, min(j + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs.append((i, i + k))
            k //= 2
        p *= 2
    return tuple(pairs)


def ordered(said: Offsets) -> Offsets:
    """Each column sorted: whole rows are compared at a time."""
    rows = said.copy()
    low = np.empty_like(rows[0])
    for i, j in comparators(len(rows)):
        np.minimum(rows[i], rows[j], out=low)
        np.maximum(rows[i], rows[j], out=rows[j])
        rows[i] = low
    return rows


def average(rows: Offsets, rounding: str = "half-up") -> Offsets:
    """Rounded mean of each column."""
    m = len(rows)
    total = rows.sum(axis=0, dtype=np.int64 if rows.dtype.itemsize > 2 else np.int32)
    return total // m if rounding == "floor" else (2 * total + m) // (2 * m)


def _mode_min(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    del rule, rules
    counts = multiplicities(said)
    return np.where(counts == counts.max(axis=0), said, np.iinfo(said.dtype).max).min(axis=0)


def _mode_minid(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    del rule, rules
    counts = multiplicities(said)
    top = counts.max(axis=0)
    winner = said[-1].copy()
    for row, count in zip(said[-2::-1], counts[-2::-1], strict=True):
        np.copyto(winner, row, where=count == top)
    return winner


def _kept(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    f = rules.faults if rule.f is None else rule.f
    rows = ordered(said)
    return rows[f : len(rows) - f] if len(rows) > 2 * f else rows


def _trimmed_median(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    kept = _kept(said, rule, rules)
    return kept[(len(kept) - 1) // 2]


def _dlpsw(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    f = rules.faults if rule.f is None else rule.f
    rows = ordered(said)
    return average(rows[f : len(rows) - f : f] if f else rows)


def _median(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    del rules
    rows = ordered(said)
    return average(rows[[(len(rows) - 1) // 2, len(rows) // 2]], rule.rounding)


def _midrange(said: Offsets, rule: Any, rules: Rules) -> Offsets:
    del rules
    return average(np.stack([said.min(axis=0), said.max(axis=0)]), rule.rounding)


RULES: Mapping[type, Callable[[Offsets, Any, Rules], Offsets]] = {
    one_round.Leader: lambda said, rule, rules: said[0],
    one_round.ModeMin: _mode_min,
    one_round.ModeMinId: _mode_minid,
    one_round.LowMedian: lambda said, rule, rules: ordered(said)[(len(said) - 1) // 2],
    one_round.TrimmedLowMedian: _trimmed_median,
    one_round.Mean: lambda said, rule, rules: average(said, rule.rounding),
    one_round.Median: _median,
    one_round.Midrange: _midrange,
    one_round.Min: lambda said, rule, rules: said.min(axis=0),
    one_round.Max: lambda said, rule, rules: said.max(axis=0),
    one_round.TrimmedMean: lambda said, rule, rules: average(
        _kept(said, rule, rules), rule.rounding
    ),
    one_round.Constant: lambda said, rule, rules: np.full_like(said[0], rule.v - rules.low),
    averaging.Dlpsw: _dlpsw,
}
"""Rules that give all honest agents the same value."""

BY_NUMBER: frozenset[type] = frozenset({one_round.Leader, one_round.ModeMinId})
"""Rules that depend on who said what."""
