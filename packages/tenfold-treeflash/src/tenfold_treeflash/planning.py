"""`tree_size = auto`: whether to draft, how wide the tables are, and how many nodes are verified.

A round of `n` nodes is expected to give `E(n) = 1 + sum of g_d P_i` tokens: `P_i` are the path
probabilities, and `g_d` corrects them at depth `d` by what earlier trees promised there and kept.
Decoding writes most in the long run when every round takes the `n` with the largest
`E(n) - rate x seconds(n)`, where `rate` is the tokens per second that decoding reaches (renewal
reward). Seconds by size come from a `CostModel`; the rates of drafted and of plain rounds are
measured as they go. Where plain rounds are faster, drafting pauses, and is tried again now and
then, at growing intervals; while it goes on, a plain round now and then keeps the other rate fresh.

None of this touches what is written: trees decide how many tokens a pass gives, never which.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tenfold_treeflash.costs import CostModel, TableSize
from tenfold_treeflash.tree import DraftTree, TransitionTables, build_tree

TRIAL = 6
"""Drafted rounds before a verdict, unless it is clear before."""
CLEAR = 0.75
"""Share of the plain rate below which a verdict is clear."""
PAUSES = (16, 1024)
"""Plain rounds of the first and of the longest pause."""
PLAIN_EVERY = 96
"""Drafted rounds between two plain ones."""
TRIES = (6, 512)
"""Rounds that the widths of tables are compared over, and rounds until they are again."""
_MEMORY = 0.97
"""What a round leaves of the weight of earlier ones."""
_PRIOR = 2.0
_OUTLIER = 4.0
"""A round so many times slower than the others was interrupted."""


class Rate:
    """Tokens per second, newer rounds counting more; begins with `rounds` rounds as given."""

    def __init__(self, tokens: float, seconds: float, rounds: float = _PRIOR) -> None:
        self._tokens, self._seconds, self._rounds = tokens * rounds, seconds * rounds, rounds

    def book(self, tokens: float, seconds: float) -> None:
        """One more round."""
        seconds = min(seconds, _OUTLIER * self._seconds / self._rounds)
        self._tokens = self._tokens * _MEMORY + tokens
        self._seconds = self._seconds * _MEMORY + seconds
        self._rounds = self._rounds * _MEMORY + 1.0

    def fade(self) -> None:
        """Halves the weight of what is known."""
        self._tokens, self._seconds, self._rounds = (
            self._tokens / 2, self._seconds / 2, self._rounds / 2,
        )  # fmt: skip

    @property
    def value(self) -> float:
        """Tokens per second."""
        return self._tokens / max(self._seconds, 1e-9)


@dataclass(slots=True)
class Promises:
    """What trees promised at a depth, and what they kept."""

    promised: float = 0.0
    kept: float = 0.0

    def factor(self, above: float) -> float:
        """What a probability of the drafter is worth here; without evidence as much as one depth
        above."""
        return (self.kept + _PRIOR * above) / (self.promised + _PRIOR)


class Planner:
    """Decisions for rounds of `rows` texts side by side; see the module.

    Args:
        costs: measured seconds.
        rows: texts per pass.
        largest: most nodes per text.
    """

    def __init__(self, costs: CostModel, rows: int = 1, largest: int = 64) -> None:
        self.costs, self.rows, self.largest = costs.for_rows(rows), rows, largest
        self._sizes = sorted(self.costs.tables, key=lambda size: -size.top_m)
        self._chosen = self._sizes[0] if self._sizes else None
        self._scores: dict[TableSize, float] = {}
        self._seen = 0
        self._depths: list[Promises] = []
        """From depth 1."""
        one = self.costs.verify[1]
        self._plain = Rate(rows, one)
        # As fast as plain ones until rounds tell otherwise.
        drafted = self.costs.cost(8)
        self._drafted = Rate(rows * drafted / max(one, 1e-9), drafted)
        self._since_plain = 0
        self._trial, self._pause, self._left = TRIAL, PAUSES[0], 0

    # --- Before a round -----------------------------------------------------------------------

    @property
    def drafts(self) -> bool:
        """Whether the next round drafts."""
        return self._left == 0

    @property
    def rate(self) -> float:
        """Tokens per second that are reached."""
        return max(self._plain.value, self._drafted.value)

    @property
    def table_size(self) -> TableSize | None:
        """Tables of the next drafted round: the widest while widths are compared; None where
        there is no choice."""
        return self._sizes[0] if self._comparing else self._chosen

    @property
    def _comparing(self) -> bool:
        return len(self._sizes) > 1 and self._seen < TRIES[0]

    def expected(self, tree: DraftTree) -> list[float]:
        """Tokens expected of the first `n` nodes, for every `n` from 1."""
        factors = [1.0]
        for record in self._depths:
            factors.append(record.factor(factors[-1]))
        while len(factors) <= max(tree.depths):
            factors.append(factors[-1])
        worth = map(factors.__getitem__, tree.depths)
        terms = (f * math.exp(p) for f, p in zip(worth, tree.log_probs, strict=True))
        return list(itertools.accumulate(terms))

    def size(self, tree: DraftTree) -> int:
        """Nodes of a drafted tree that are worth verifying."""
        return self._best(tree)[0]

    def _best(self, tree: DraftTree) -> tuple[int, float]:
        """The size with the largest gain, and the gain before drafting is paid."""
        best, most = 1, -math.inf
        for nodes, tokens in enumerate(self.expected(tree), start=1):
            gain = tokens * self.rows - self.rate * self.costs.verified(nodes)
            if gain > most:
                best, most = nodes, gain
        return best, most

    def look(self, tables: TransitionTables, anchor: int) -> None:
        """Compares what narrower tables would have been worth, while that is open."""
        if not self._comparing:
            return
        for size in self._sizes:
            tree = build_tree(tables.within(size.top_m), anchor, self.largest)
            gain = self._best(tree)[1] - self.rate * self.costs.tables[size]
            self._scores[size] = self._scores.get(size, 0.0) + gain
        if self._seen + 1 == TRIES[0]:
            self._chosen = max(self._sizes, key=lambda size: self._scores[size])
            self._scores = {}

    # --- After a round ------------------------------------------------------------------------

    def book(self, trees: Sequence[DraftTree], accepted: Sequence[int], seconds: float) -> None:
        """A round is over: its trees as verified, tokens that each gave, and its seconds."""
        tokens = float(sum(accepted)) * self.rows / len(accepted)
        if not self.drafts:
            self._plain.book(tokens, seconds)
            self._left -= 1
            return
        for tree, count in zip(trees, accepted, strict=True):
            self._learn(tree, count)
        self._drafted.book(tokens, seconds)
        self._seen = 0 if self._seen + 1 >= TRIES[1] else self._seen + 1
        self._since_plain += 1
        self._trial = max(self._trial - 1, 0)
        share = self._drafted.value / self._plain.value
        if share < (1.0 if self._trial == 0 else CLEAR):
            self._left, self._trial = self._pause, TRIAL
            self._pause = min(2 * self._pause, PAUSES[1])
            self._drafted.fade()
            self._since_plain = 0
            self._depths = []  # small trees would never disprove what was learned
        elif self._trial == 0 and self._since_plain >= PLAIN_EVERY:
            self._left, self._since_plain = 1, 0
            self._pause = PAUSES[0]

    def _learn(self, tree: DraftTree, accepted: int) -> None:
        """Compares promises with what came of them, by depth."""
        if len(tree) == 1:
            return
        promised: dict[int, float] = {}
        for depth, log_prob in zip(tree.depths[1:], tree.log_probs[1:], strict=True):
            promised[depth] = promised.get(depth, 0.0) + math.exp(log_prob)
        while len(self._depths) < max(promised):
            self._depths.append(Promises())
        for depth, value in promised.items():
            record = self._depths[depth - 1]
            record.promised = record.promised * _MEMORY + value
            record.kept = record.kept * _MEMORY + float(accepted > depth)


class Planners:
    """A planner for every number of texts side by side, and for greedy and for sampled texts (of
    which a tree holds less); they last from text to text."""

    def __init__(self, costs: CostModel, largest: int = 64) -> None:
        self.costs, self._largest = costs, largest
        self._known: dict[tuple[int, bool], Planner] = {}

    def of(self, rows: int = 1, greedy: bool = True) -> Planner:
        """The planner of passes over `rows` texts."""
        key = rows, greedy
        if key not in self._known:
            self._known[key] = Planner(self.costs, rows, self._largest)
        return self._known[key]
