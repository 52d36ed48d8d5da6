"""Adversaries that say what they like, without looking far (§2.14).

Every adversary declares the powers it needs beyond saying anything to everybody; the engine
refuses it where the threat model lacks one. Unless said, it votes continue, so that honest agents
must reach the quota alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from tenfold_byzantine.contracts import Ballot, Policy, Proposal, Role, Rules, View, Vote
from tenfold_byzantine.policies.base import NO_POWERS, VOTES, Scripted, param, says
from tenfold_byzantine.policies.one_round import LowMedian, check_allowed

VOTE_CHOICES = ("continue", "stop", "abstain")


def vote_param(default: str = "continue") -> str:
    """The field `vote` of adversaries."""
    return param(default, "what it votes every round", choices=VOTE_CHOICES)


@dataclass(frozen=True)
class Adversary(Scripted):
    """A Byzantine agent that always votes the same."""

    role: ClassVar[Role] = "byzantine"
    guarantee: ClassVar[str] = ""

    vote_as: ClassVar[Vote] = "continue"

    @abstractmethod
    def choose(self, view: View) -> int | None:
        """What it says to everybody."""

    def decide(self, view: View) -> Proposal:
        """Says the chosen value."""
        return says(self.choose(view))

    def vote(self, view: View) -> Ballot:
        """The parameter `vote`, where there is one."""
        vote: Vote = getattr(self, "votes", self.vote_as)
        return VOTES[vote]


@dataclass(frozen=True)
class Silent(Adversary):
    """Never says anything."""

    name: ClassVar[str] = "silent"
    summary: ClassVar[str] = "says nothing and abstains"
    vote_as: ClassVar[Vote] = "abstain"

    def choose(self, view: View) -> None:
        """Nothing."""
        return


@dataclass(frozen=True)
class Fixed(Adversary):
    """Always the same value."""

    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "always says v"

    v: int = param(25, "the value")
    votes: str = vote_param()

    def check(self, rules: Rules) -> None:
        """The value must be allowed in the game."""
        check_allowed(self.name, "v", self.v, rules)

    def choose(self, view: View) -> int:
        """The value."""
        return self.v


@dataclass(frozen=True)
class Extreme(Adversary):
    """Always an end of the range."""

    name: ClassVar[str] = "extreme"
    summary: ClassVar[str] = "always says the largest (or smallest) allowed value"

    side: str = param("max", "which end", choices=("max", "min"))
    votes: str = vote_param()

    def choose(self, view: View) -> int:
        """The end of the range."""
        return view.rules.high if self.side == "max" else view.rules.low


@dataclass(frozen=True)
class RandomLiar(Adversary):
    """A fresh uniform value every round."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "says a uniform value, anew every round (and to each, if it may)"

    equivocate: bool = param(False, "another value to each receiver")
    votes: str = vote_param()

    @property
    def powers(self) -> frozenset[str]:
        """Only what the parameter asks for."""
        return frozenset({"equivocate"}) if self.equivocate else NO_POWERS

    def choose(self, view: View) -> int:
        """Uniform in the game's range."""
        return view.draws("random").randint(view.rules.low, view.rules.high)

    def decide(self, view: View) -> Proposal:
        """One value, or one per neighbour."""
        if not self.equivocate:
            return super().decide(view)
        draws = view.draws("random")
        low, high = view.rules.low, view.rules.high
        first = draws.randint(low, high)
        return Proposal(first, to={n: (draws.randint(low, high), "") for n in view.neighbours})


@dataclass(frozen=True)
class Collude(Adversary):
    """All Byzantine agents say one value.

    With `v` they have agreed on it beforehand, which needs no power. Without, the one with the
    lowest number draws a value and tells the others in its private notes; these are silent until
    they have read it.
    """

    name: ClassVar[str] = "collude"
    summary: ClassVar[str] = "all Byzantine agents always say v"

    v: int | None = param(None, "the value; default: drawn by one and told in shared notes")
    votes: str = vote_param()

    @property
    def powers(self) -> frozenset[str]:
        """Shared notes, unless the value is fixed beforehand."""
        return NO_POWERS if self.v is not None else frozenset({"collude"})

    def check(self, rules: Rules) -> None:
        """The value must be allowed in the game."""
        if self.v is not None:
            check_allowed(self.name, "v", self.v, rules)

    def choose(self, view: View) -> int | None:
        """The agreed value."""
        return self.decide(view).value

    def decide(self, view: View) -> Proposal:
        """The agreed value; the one that draws it writes it down."""
        if self.v is not None:
            return says(self.v)
        rules = view.rules
        if view.memory is not None:
            v = int(view.memory)
            return Proposal(v, memory=v)
        if all(view.agent < ally for ally in view.allies):
            v = view.draws("collude").randint(rules.low, rules.high)
            return Proposal(v, note=f"say {v}", memory=v)
        leader = min((view.agent, *view.allies))
        for agent, _, text in view.ally_notes:
            said = text.removeprefix("say ")
            if agent == leader and said != text:
                return Proposal(int(said), memory=int(said))
        return says(None)


@dataclass(frozen=True)
class Mimic(Scripted):
    """Plays an honest policy with an initial value of its own making."""

    name: ClassVar[str] = "mimic"
    role: ClassVar[Role] = "byzantine"
    summary: ClassVar[str] = "acts honestly with a made-up initial value, votes too"

    rule: Policy = field(default=LowMedian(), metadata={"help": "honest policy that it plays"})

    @property
    def identity(self) -> Any:
        """What else distinguishes the rule; part of the game id."""
        return getattr(self.rule, "identity", None)

    @property
    def powers(self) -> frozenset[str]:
        """The rule's."""
        return self.rule.powers

    def check(self, rules: Rules) -> None:
        """The rule's bounds."""
        self.rule.check(rules)

    def disguised(self, view: View) -> tuple[View, int]:
        """The view as an honest agent with the made-up value would have it, and that value."""
        initial, inner = view.memory if view.memory is not None else (None, None)
        if initial is None:
            initial = view.draws("mimic").randint(view.rules.low, view.rules.high)
        held = view.held if view.held is not None else initial
        honest = replace(view, role="honest", initial=initial, held=held, memory=inner)
        return honest, initial

    def decide(self, view: View) -> Proposal:
        """The rule's answer; memory keeps the initial value and the rule's memory."""
        honest, initial = self.disguised(view)
        (answer,) = self.rule.decide_many([honest])
        return replace(answer, memory=[initial, answer.memory])

    def vote(self, view: View) -> Ballot:
        """The rule's vote."""
        honest, initial = self.disguised(view)
        (ballot,) = self.rule.vote_many([honest])
        if ballot.memory is None:
            return ballot
        return replace(ballot, memory=[initial, ballot.memory])


@dataclass(frozen=True)
class Crash(Mimic):
    """Honest until it stops."""

    name: ClassVar[str] = "crash"
    summary: ClassVar[str] = "acts honestly until round t, then says nothing and abstains"

    t: int = param(3, "first round without a word", minimum=1)

    def decide(self, view: View) -> Proposal:
        """As an honest agent, then silence."""
        return super().decide(view) if view.round < self.t else says(None)

    def vote(self, view: View) -> Ballot:
        """As an honest agent, then abstention."""
        return super().vote(view) if view.round < self.t else VOTES["abstain"]


@dataclass(frozen=True)
class NeverStop(Mimic):
    """Honest in all but its vote."""

    name: ClassVar[str] = "never-stop"
    summary: ClassVar[str] = "acts honestly but always votes continue"

    def vote(self, view: View) -> Ballot:
        """Continue."""
        return VOTES["continue"]


ADVERSARIES: Sequence[type[Scripted]] = (
    Silent,
    Crash,
    Fixed,
    Extreme,
    RandomLiar,
    Mimic,
    NeverStop,
    Collude,
)
