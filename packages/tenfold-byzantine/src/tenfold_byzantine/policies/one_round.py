"""One-round rules: what each agent makes of the values it received, its own included (§2.13).

In round 1 every agent says its initial value. Rounding is half up unless said. On a complete
graph without equivocation all agents hear the same values, so that a rule that depends on these
alone agrees in round 2; such rules are computed once per inbox.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tenfold.errors import ConfigError

from tenfold_byzantine.contracts import Ballot, Proposal, Rules, View
from tenfold_byzantine.policies.base import (
    VOTES,
    Scripted,
    current,
    faults,
    faults_param,
    param,
    plurality,
    require,
    require_faults,
    says,
    unsafe_param,
    votes_stop,
)

ROUNDINGS = ("half-up", "floor")


def quotient(total: int, count: int, rounding: str = "half-up") -> int:
    """`total / count` as an integer, without passing through floats."""
    if rounding == "floor":
        return total // count
    return (2 * total + count) // (2 * count)


def quota_param() -> float | None:
    """The field `q` of the stop rule."""
    return param(
        None,
        "vote stop when this share of the heard values is equal; default: all but f",
        minimum=0,
        maximum=1,
    )


def rounding_param() -> str:
    """The field `rounding` of rules that average."""
    return param("half-up", "how fractions become integers", choices=ROUNDINGS)


@dataclass(frozen=True)
class OneRound(Scripted):
    """A rule applied every round to what was heard in the round before."""

    q: float | None = quota_param()

    @abstractmethod
    def update(self, values: Sequence[int], view: View) -> int:
        """The new value, from the values heard by sender (not empty)."""

    def decide(self, view: View) -> Proposal:
        """The initial value in round 1, then the rule; with nothing heard, the value held."""
        values = view.values() if view.round > 1 else []
        return says(self.update(values, view) if values else current(view))

    def vote(self, view: View) -> Ballot:
        """Stop when what was heard is equal enough (`base.votes_stop`)."""
        return VOTES["stop" if votes_stop(view, self.q) else "continue"]

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """Once per inbox."""
        seen: dict[tuple[int, int], Ballot] = {}
        ballots = []
        for view in views:
            key = id(view.inbox), len(view.neighbours)
            ballot = seen.get(key)
            # The empty tuple is one object in all games, and always means continue.
            if ballot is None:
                ballot = seen[key] = self.vote(view)
            ballots.append(ballot)
        return ballots


@dataclass(frozen=True)
class CommonRule(OneRound):
    """A rule that depends on the values heard and on nothing of the agent's own."""

    guarantee: ClassVar[str] = "agreement in round 2 where all hear the same values"

    @abstractmethod
    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """The rule on a non-empty list of values, ordered by sender."""

    def update(self, values: Sequence[int], view: View) -> int:
        """As `pick`."""
        return self.pick(values, view.rules)

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """Once per inbox."""
        seen: dict[int, Proposal] = {}
        proposals = []
        for view in views:
            inbox = view.inbox
            proposal = seen.get(id(inbox)) if view.round > 1 else None
            if proposal is None:
                values = view.values() if view.round > 1 else None
                if values:
                    proposal = seen[id(inbox)] = says(self.pick(values, view.rules))
                else:
                    proposal = says(view.initial if view.held is None else view.held)
            proposals.append(proposal)
        return proposals


@dataclass(frozen=True)
class Leader(CommonRule):
    """Value of the lowest number heard."""

    name: ClassVar[str] = "leader"
    summary: ClassVar[str] = "the value of the agent with the lowest number"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """The first sender's."""
        return values[0]


@dataclass(frozen=True)
class ModeMin(CommonRule):
    """Plurality, ties to the smallest value."""

    name: ClassVar[str] = "mode-min"
    summary: ClassVar[str] = "the most common value; of tied ones the smallest"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Smallest of the most common."""
        return plurality(values)[1][0]


@dataclass(frozen=True)
class ModeMinId(CommonRule):
    """Plurality, ties to the value that the lowest number says."""

    name: ClassVar[str] = "mode-minid"
    summary: ClassVar[str] = "the most common value; of tied ones that of the lowest number"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """First sender's among the most common."""
        tied = set(plurality(values)[1])
        return next(v for v in values if v in tied)


@dataclass(frozen=True)
class ModeOwn(OneRound):
    """Plurality, ties to the own value where it is among them, else to the smallest."""

    name: ClassVar[str] = "mode-own"
    summary: ClassVar[str] = "the most common value; of tied ones the own, else the smallest"
    guarantee: ClassVar[str] = "none: ties can keep agents apart for ever"

    def update(self, values: Sequence[int], view: View) -> int:
        """Own among the most common, else the smallest of them."""
        tied = plurality(values)[1]
        own = view.held
        return own if own in tied else tied[0]


@dataclass(frozen=True)
class LowMedian(CommonRule):
    """Element of rank ⌊(m-1)/2⌋, counted from 0."""

    name: ClassVar[str] = "low-median"
    summary: ClassVar[str] = "the lower median, always a value that somebody said"
    guarantee: ClassVar[str] = "agreement in round 2; inside the honest range for n > 2f"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """The lower median."""
        return sorted(values)[(len(values) - 1) // 2]


@dataclass(frozen=True)
class Rounded(CommonRule):
    """A rule whose result must be rounded to an integer."""

    rounding: str = rounding_param()


@dataclass(frozen=True)
class Mean(Rounded):
    """Rounded mean."""

    name: ClassVar[str] = "mean"
    summary: ClassVar[str] = "the mean, rounded; mostly nobody's initial value"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Mean of all."""
        return quotient(sum(values), len(values), self.rounding)


@dataclass(frozen=True)
class Median(Rounded):
    """Rounded mean of the middle pair."""

    name: ClassVar[str] = "median"
    summary: ClassVar[str] = "the middle value, or the rounded mean of the middle pair"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Mean of the two middle ranks."""
        ordered = sorted(values)
        m = len(ordered)
        return quotient(ordered[(m - 1) // 2] + ordered[m // 2], 2, self.rounding)


@dataclass(frozen=True)
class Midrange(Rounded):
    """Rounded centre of the range heard."""

    name: ClassVar[str] = "midrange"
    summary: ClassVar[str] = "the centre between the smallest and the largest, rounded"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Mean of the extremes."""
        return quotient(min(values) + max(values), 2, self.rounding)


@dataclass(frozen=True)
class Min(CommonRule):
    """Smallest value."""

    name: ClassVar[str] = "min"
    summary: ClassVar[str] = "the smallest value"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Smallest."""
        return min(values)


@dataclass(frozen=True)
class Max(CommonRule):
    """Largest value."""

    name: ClassVar[str] = "max"
    summary: ClassVar[str] = "the largest value"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Largest."""
        return max(values)


@dataclass(frozen=True)
class Constant(CommonRule):
    """The same value whatever was heard, from round 2 on."""

    name: ClassVar[str] = "constant"
    summary: ClassVar[str] = "a fixed value from round 2 on"
    guarantee: ClassVar[str] = "agreement in round 2; valid only by luck"

    v: int = param(25, "the value")

    def check(self, rules: Rules) -> None:
        """The value must be allowed in the game."""
        check_allowed(self.name, "v", self.v, rules)

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """The constant."""
        return self.v


def check_allowed(policy: str, name: str, value: int, rules: Rules) -> None:
    """Raises ConfigError where a value is outside of the game's range."""
    if not rules.low <= value <= rules.high:
        raise ConfigError(
            f"{policy}: {name} is {value}; the game's values go from {rules.low} to {rules.high}"
        )


def trimmed(values: Sequence[int], f: int) -> list[int]:
    """Sorted values without the f smallest and f largest; all of them where too few are left."""
    ordered = sorted(values)
    return ordered[f : len(ordered) - f] if len(ordered) > 2 * f else ordered


@dataclass(frozen=True)
class Trimming(CommonRule):
    """A rule that first drops f values at both ends; needs n > 2f."""

    bound: ClassVar[str] = "n > 2f"

    f: int | None = faults_param()
    unsafe: bool = unsafe_param()

    def check(self, rules: Rules) -> None:
        """n > 2f, and f no smaller than the game's faults."""
        f = faults(self.f, rules)
        require(rules.agents > 2 * f, self.name, "n > 2f", rules, f, self.unsafe)
        require_faults(self.name, rules, f, self.unsafe)


@dataclass(frozen=True)
class TrimmedLowMedian(Trimming):
    """Lower median of what trimming leaves."""

    name: ClassVar[str] = "trimmed-low-median"
    summary: ClassVar[str] = "the lower median without the f smallest and f largest"
    guarantee: ClassVar[str] = "agreement in round 2, inside the honest range"

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Lower median of the rest."""
        kept = trimmed(values, faults(self.f, rules))
        return kept[(len(kept) - 1) // 2]


@dataclass(frozen=True)
class TrimmedMean(Trimming):
    """Rounded mean of what trimming leaves."""

    name: ClassVar[str] = "trimmed-mean"
    summary: ClassVar[str] = "the rounded mean without the f smallest and f largest"
    guarantee: ClassVar[str] = "agreement in round 2, inside the honest range"

    rounding: str = rounding_param()

    def pick(self, values: Sequence[int], rules: Rules) -> int:
        """Mean of the rest."""
        kept = trimmed(values, faults(self.f, rules))
        return quotient(sum(kept), len(kept), self.rounding)


@dataclass(frozen=True)
class Voter(OneRound):
    """Copies somebody heard, at random."""

    name: ClassVar[str] = "voter"
    summary: ClassVar[str] = "copies a neighbour drawn at random"
    guarantee: ClassVar[str] = "agrees sooner or later without faults; no bound on the time"

    def update(self, values: Sequence[int], view: View) -> int:
        """One of the others' values; with nobody heard, the own."""
        others = [m.value for m in view.inbox if m.sender != view.agent and m.value is not None]
        return view.draws("voter").choice(others or list(values))


@dataclass(frozen=True)
class ThreeMajority(OneRound):
    """Majority of three values drawn with replacement, else the first drawn."""

    name: ClassVar[str] = "three-majority"
    summary: ClassVar[str] = "the majority of three values drawn at random, else the first"
    guarantee: ClassVar[str] = "agrees fast with high probability without faults"

    def update(self, values: Sequence[int], view: View) -> int:
        """Two equal of three win."""
        draws = view.draws("three-majority")
        first, second, third = (draws.choice(values) for _ in range(3))
        return second if second == third else first


@dataclass(frozen=True)
class Stubborn(OneRound):
    """Keeps its value with probability p, else follows the plurality."""

    name: ClassVar[str] = "stubborn"
    summary: ClassVar[str] = "keeps its value with probability p, else takes the most common"
    guarantee: ClassVar[str] = "none: one stubborn agent decides how long a game lasts"

    p: float = param(0.9, "probability of keeping the own value", minimum=0, maximum=1)

    def update(self, values: Sequence[int], view: View) -> int:
        """One draw per round."""
        own = current(view)
        if own is not None and view.draws("stubborn").random() < self.p:
            return own
        return plurality(values)[1][0]


@dataclass(frozen=True)
class Random(OneRound):
    """A fresh uniform value every round."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "a uniform value, anew every round"
    guarantee: ClassVar[str] = "none: the floor of every comparison"

    def update(self, values: Sequence[int], view: View) -> int:
        """Uniform in the game's range."""
        return view.draws("random").randint(view.rules.low, view.rules.high)
