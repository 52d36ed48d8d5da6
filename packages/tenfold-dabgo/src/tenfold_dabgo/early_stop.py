"""Early stopping: the top k groups by mean score, without scoring every sample.

A random part of each group is scored and grows by rounds; a group whose upper bound cannot reach
the top k, or whose lower bound is safely in it, is scored no further. With m of n samples of a
group scored, mean x and standard deviation s, the bounds are

    x ± t(1 - delta / (2 G R), m - 1) * s / sqrt(m) * sqrt(1 - m / n)

for G groups and R rounds (Bonferroni), so the set of the top k groups is that of the full pass
with probability 1 - delta, as far as means of m samples follow Student's t (m is at least 8 for a
group that is not scored completely). Completely scored groups have exact means; with ties or tiny
differences everything is scored, and the result is exact. Groups are values of a metadata column,
or documents. The promise is about groups: a single text of a dropped group may go unseen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from tenfold.errors import ConfigError
from tenfold.seeds import derive

FIRST = 8
"""Samples of each group in the first round; smaller groups are scored completely. Each later
round doubles the number."""


@dataclass(frozen=True, slots=True)
class StopReport:
    """What early stopping did: the column, k, delta; samples scored of all that have a score;
    groups, how many of them were not scored completely, and rounds."""

    column: str
    k: int
    delta: float
    scored: int
    of: int
    groups: int
    dropped: int
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


class TopGroups:
    """Decides which samples to score next; see the module's text.

    Args:
        labels: `[N]` group of each sample.
        usable: `[N]` bool: samples that have a score.
        k: how many groups are wanted.
        delta: accepted probability that the set of the top k is wrong.
        seed: of the order in which a group's samples are taken.

    Raises:
        ConfigError: delta outside (0, 1), or k < 1.
    """

    def __init__(
        self, labels: Sequence[str], usable: np.ndarray, k: int, delta: float, seed: int = 0
    ) -> None:
        if not 0 < delta < 1:
            raise ConfigError(f"early_stop is {delta}; it must be a probability between 0 and 1")
        if k < 1:
            raise ConfigError(f"k is {k}; it must be at least 1")
        self.k, self.delta = k, delta
        members: dict[str, list[int]] = {}
        for i in np.flatnonzero(usable):
            members.setdefault(str(labels[i]), []).append(int(i))
        self.names = sorted(members)
        self.orders = [_shuffled(members[name], seed, name) for name in self.names]
        self.sizes = np.array([len(order) for order in self.orders])
        self.taken = np.zeros(len(self.names), dtype=np.int64)
        self.open = np.ones(len(self.names), dtype=bool)
        largest = int(self.sizes.max(initial=1))
        self.rounds = 1 + max(math.ceil(math.log2(largest / FIRST)), 0)
        self.round = 0

    def next(self) -> np.ndarray:
        """Sorted samples to score in the next round; empty when the top k are known."""
        want = np.minimum(self.sizes, FIRST * 2**self.round)
        chosen: list[int] = []
        for g in np.flatnonzero(self.open):
            chosen += self.orders[g][self.taken[g] : want[g]]
            self.taken[g] = want[g]
        self.round += 1
        return np.sort(np.asarray(chosen, dtype=np.int64))

    def judge(self, scores: np.ndarray) -> None:
        """Closes groups whose place inside or outside of the top k is settled.

        Args:
            scores: `[N]`, finite where a sample has been scored.
        """
        low, high = self._bounds(scores)
        k = min(self.k, len(self.names))
        self.open &= self.taken < self.sizes
        if k == len(self.names):
            self.open[:] = False  # every group is among the top k
            return
        # In: fewer than k others can be above it. Out: k others are above it for certain.
        order = np.sort(high)[::-1]
        others = np.where(high >= order[k - 1], order[k], order[k - 1])
        inside = low > others
        outside = high < np.sort(low)[::-1][k - 1]
        self.open &= ~(inside | outside)

    def _bounds(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.zeros(len(self.names)), np.zeros(len(self.names))
        level = 1 - self.delta / (2 * len(self.names) * self.rounds)
        for g, order in enumerate(self.orders):
            m, n = int(self.taken[g]), int(self.sizes[g])
            values = scores[order[:m]]
            half = 0.0
            if m < n:
                spread = float(values.std(ddof=1)) / math.sqrt(m) * math.sqrt(1 - m / n)
                half = student_quantile(level, m - 1) * spread
            low[g], high[g] = values.mean() - half, values.mean() + half
        return low, high

    def report(self, column: str) -> StopReport:
        """What was done so far."""
        return StopReport(
            column,
            self.k,
            self.delta,
            int(self.taken.sum()),
            int(self.sizes.sum()),
            len(self.names),
            int((self.taken < self.sizes).sum()),
            self.round,
        )


def _shuffled(members: list[int], seed: int, name: str) -> list[int]:
    generator = np.random.default_rng(derive(seed, "early-stop", name))
    return [members[i] for i in generator.permutation(len(members))]


def student_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t by the expansion in 1 / freedom (for freedom of 7 and more)."""
    z, v = NormalDist().inv_cdf(level), float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
