"""Adversaries that react to what they hear (§2.14): blocs, drift, defection, greedy blocking.

They judge by the newest values of the others, without allies they know of: those of the round
before, or with the power rushing the honest ones of this round. A bloc is a value and those who
say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from tenfold_byzantine.contracts import Ballot, Message, Proposal, View
from tenfold_byzantine.policies.adversaries import Adversary, vote_param
from tenfold_byzantine.policies.base import (
    NO_POWERS,
    VOTES,
    Scripted,
    param,
    plurality,
    says,
    votes_stop,
)
from tenfold_byzantine.policies.one_round import LowMedian, OneRound


def others(view: View) -> dict[int, int]:
    """Newest values of those who may be honest, by sender."""
    insiders = {view.agent, *view.allies}
    messages = view.overheard or view.inbox
    return {m.sender: m.value for m in messages if m.value is not None and m.sender not in insiders}


def blocs(values: Sequence[int]) -> list[int]:
    """Values from the most to the least common, smaller ones first where equal."""
    counts: dict[int, int] = {}
    for v in values:
        counts[v] = counts.get(v, 0) + 1
    return sorted(counts, key=lambda v: (-counts[v], v))


def anything(view: View, label: str) -> int:
    """A uniform value, for when nothing was heard yet."""
    return view.draws(label).randint(view.rules.low, view.rules.high)


@dataclass(frozen=True)
class Reacting(Adversary):
    """Chooses by the blocs among the others; a uniform value before it heard any."""

    votes: str = vote_param()

    def choose(self, view: View) -> int | None:
        """By the blocs."""
        heard = list(others(view).values())
        return self.react(heard, view) if heard else anything(view, self.name)

    def react(self, heard: Sequence[int], view: View) -> int:
        """The value to say, from the values heard (not empty)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Oscillate(Reacting):
    """Feeds the two largest blocs in turn."""

    name: ClassVar[str] = "oscillate"
    summary: ClassVar[str] = "alternates between the two largest blocs"

    def react(self, heard: Sequence[int], view: View) -> int:
        """Largest in even rounds, second in odd ones (or the same where there is one)."""
        ranked = blocs(heard)
        return ranked[min(view.round % 2, len(ranked) - 1)]


@dataclass(frozen=True)
class AntiMode(Reacting):
    """Strengthens the second bloc."""

    name: ClassVar[str] = "anti-mode"
    summary: ClassVar[str] = "says the second most common value (beside the only one, a neighbour)"

    def react(self, heard: Sequence[int], view: View) -> int:
        """Second largest bloc; with one bloc only, the value next to it."""
        ranked = blocs(heard)
        if len(ranked) > 1:
            return ranked[1]
        return ranked[0] + 1 if ranked[0] < view.rules.high else ranked[0] - 1


@dataclass(frozen=True)
class Drift(Reacting):
    """Pulls the largest bloc towards the nearer end of the range."""

    name: ClassVar[str] = "drift"
    summary: ClassVar[str] = "says the most common value moved outwards by step"

    step: int = param(1, "how far it pulls each round", minimum=1)

    def react(self, heard: Sequence[int], view: View) -> int:
        """Outwards from the centre of the range."""
        mode, rules = blocs(heard)[0], view.rules
        outwards = 1 if 2 * mode >= rules.low + rules.high else -1
        return rules.clamp(mode + outwards * self.step)


@dataclass(frozen=True)
class CopycatDefect(Reacting):
    """A model agent until it defects."""

    name: ClassVar[str] = "copycat-defect"
    summary: ClassVar[str] = "agrees with the most common value until round t, then opposes it"

    t: int = param(5, "first round of defection", minimum=1)

    def react(self, heard: Sequence[int], view: View) -> int:
        """The mode, then the end of the range that is farther from it."""
        mode, rules = blocs(heard)[0], view.rules
        if view.round < self.t:
            return mode
        return rules.low if mode - rules.low > rules.high - mode else rules.high

    def vote(self, view: View) -> Ballot:
        """As an honest agent, then the parameter."""
        if view.round < self.t:
            return VOTES["stop" if votes_stop(view) else "continue"]
        return super().vote(view)


@dataclass(frozen=True)
class EarlyStop(Reacting):
    """Wants the game to end before the honest agents agree."""

    name: ClassVar[str] = "early-stop"
    summary: ClassVar[str] = "says the most common value, votes stop from round 1"

    votes: str = vote_param("stop")

    def react(self, heard: Sequence[int], view: View) -> int:
        """The mode."""
        return blocs(heard)[0]


@dataclass(frozen=True)
class SplitVote(Adversary):
    """Tells each camp that it is winning.

    The others are ordered by value and cut in two halves; each half is told its own most common
    value. Where all hold the same, the upper half is told the value beside it.
    """

    name: ClassVar[str] = "split-vote"
    summary: ClassVar[str] = "tells each half of the others their own camp's value"

    votes: str = vote_param()

    @property
    def powers(self) -> frozenset[str]:
        """Different words to different receivers."""
        return frozenset({"equivocate"})

    def choose(self, view: View) -> int | None:
        """What the lower half is told."""
        return self.decide(view).value

    def decide(self, view: View) -> Proposal:
        """One value per half."""
        heard = others(view)
        if not heard:
            rules = view.rules
            ends = (rules.low, rules.high)
            return Proposal(
                rules.low, to={n: (ends[i % 2], "") for i, n in enumerate(view.neighbours)}
            )
        ordered = sorted(heard, key=lambda s: (heard[s], s))
        half = (len(ordered) + 1) // 2
        lower = blocs([heard[s] for s in ordered[:half]])[0]
        upper = blocs([heard[s] for s in ordered[half:]] or [lower])[0]
        if lower == upper:
            upper = lower + 1 if lower < view.rules.high else lower - 1
        camp = set(ordered[half:])
        told = {n: (upper if n in camp else lower, "") for n in view.neighbours}
        return Proposal(lower, to=told)


@dataclass(frozen=True)
class KeepAlive(Adversary):
    """Greedy: says what leaves the smallest honest bloc in the next round, under a known rule.

    It applies the rule to what every other agent would hear (the newest values of the others, its
    own candidate, and the same from allies that it knows of) and tries all values; of equal blocs
    it takes the one that moves most agents, then the smaller value. With `equivocate` each
    receiver in turn gets the value that keeps the largest bloc smallest so far. Without, a rule
    that depends on the values alone cannot be split where all hear the same: there it can only
    keep the agents moving.
    """

    name: ClassVar[str] = "keep-alive"
    summary: ClassVar[str] = "says what keeps the next honest bloc smallest, under a given rule"

    rule: OneRound = field(
        default=LowMedian(), metadata={"help": "rule that it believes the honest agents follow"}
    )
    equivocate: bool = param(False, "another value to each receiver")
    votes: str = vote_param()

    @property
    def powers(self) -> frozenset[str]:
        """Only what the parameter asks for."""
        return frozenset({"equivocate"}) if self.equivocate else NO_POWERS

    def choose(self, view: View) -> int:
        """The candidate with the smallest bloc."""
        heard = others(view)
        if not heard:
            return anything(view, self.name)
        candidates = range(view.rules.low, view.rules.high + 1)
        return min(candidates, key=lambda c: (*self.cost(c, heard, view), c))

    def cost(self, c: int, heard: Mapping[int, int], view: View) -> tuple[int, int]:
        """Largest bloc that the candidate leaves, and how many it does not move."""
        after = {r: self.imagined(r, c, heard, view) for r in heard}
        unmoved = sum(after[r] == heard[r] for r in heard)
        return plurality(list(after.values()))[0], unmoved

    def decide(self, view: View) -> Proposal:
        """One value for all, or the greedy one for each receiver."""
        heard = others(view)
        if not self.equivocate or not heard:
            return says(self.choose(view))
        sizes: dict[int, int] = {}
        told: dict[int, tuple[int | None, str]] = {}
        for receiver in sorted(heard):
            outcomes: dict[int, int] = {}
            for c in range(view.rules.low, view.rules.high + 1):
                outcomes.setdefault(self.imagined(receiver, c, heard, view), c)
            # Fewest followers so far; of those the smallest value.
            outcome = min(outcomes, key=lambda v: (sizes.get(v, 0), v))
            sizes[outcome] = sizes.get(outcome, 0) + 1
            told[receiver] = (outcomes[outcome], "")
        value = told[min(told)][0]
        return Proposal(value, to=told)

    def imagined(self, receiver: int, c: int, heard: Mapping[int, int], view: View) -> int:
        """What the rule makes a receiver hold after the candidate c."""
        said = {**heard, **dict.fromkeys((view.agent, *view.allies), c)}
        inbox = tuple(Message(s, view.round, said[s]) for s in sorted(said))
        its = replace(
            view,
            agent=receiver,
            role="honest",
            round=view.round + 1,
            initial=heard[receiver],
            held=heard[receiver],
            inbox=inbox,
            memory=None,
            overheard=(),
            allies=(),
        )
        return self.rule.update([m.value for m in inbox if m.value is not None], its)


@dataclass(frozen=True)
class Censor(EarlyStop):
    """Passes nothing on."""

    name: ClassVar[str] = "censor"
    summary: ClassVar[str] = "agrees with the most common value and passes nobody's messages on"

    votes: str = vote_param("continue")

    @property
    def powers(self) -> frozenset[str]:
        """Dropping what it should relay."""
        return frozenset({"suppress"})

    def decide(self, view: View) -> Proposal:
        """The mode, with everything heard withheld."""
        return Proposal(self.choose(view), withheld=view.neighbours)


ADAPTIVE: Sequence[type[Scripted]] = (
    Oscillate,
    AntiMode,
    Drift,
    SplitVote,
    CopycatDefect,
    EarlyStop,
    KeepAlive,
    Censor,
)
