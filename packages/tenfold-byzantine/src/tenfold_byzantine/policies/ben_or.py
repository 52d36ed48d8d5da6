"""Ben-Or's randomised agreement on two values (1983), Byzantine version, n > 5f.

A phase has a report round (send the value; wait for n - f reports; if more than (n+f)/2 say w,
propose w, else nothing) and a proposal round (if more than (n+f)/2 propose w, decide w; else if at
least f+1 propose w, adopt w; else toss a coin). It needs no synchrony: an agent acts on any n - f
messages of its phase. In the game odd rounds are report rounds; a proposal travels in the
payload, `[w]` or `[]`, so that proposing nothing is not silence.
"""

from __future__ import annotations

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
    require,
    require_faults,
    sent_in,
    unsafe_param,
)
from tenfold_byzantine.policies.phase_king import in_range


def propose(reports: Sequence[int], n: int, f: int) -> int | None:
    """The value that more than (n+f)/2 reports say, or None."""
    return next((w for w in sorted(set(reports)) if 2 * reports.count(w) > n + f), None)


def settle(proposals: Sequence[int | None], n: int, f: int) -> tuple[int | None, bool]:
    """`(value, decided)` after a proposal round; the value is None where the coin decides."""
    named = [w for w in proposals if w is not None]
    for w in sorted(set(named)):
        if 2 * named.count(w) > n + f:
            return w, True
    # Two values with f+1 proposals each cannot be: each would have an honest proposer.
    return next((w for w in sorted(set(named)) if named.count(w) >= f + 1), None), False


@dataclass(frozen=True)
class BenOr(Scripted):
    """Randomised binary agreement without synchrony."""

    name: ClassVar[str] = "ben-or"
    summary: ClassVar[str] = "randomised agreement on two values; needs no synchrony"
    guarantee: ClassVar[str] = (
        "agreement always, also under equivocation; the common value where all honest began with "
        "it; ends with probability 1"
    )
    bound: ClassVar[str] = "n > 5f, two values, every agent hears every other (delays allowed)"

    f: int | None = faults_param()
    unsafe: bool = unsafe_param()

    def check(self, rules: Rules) -> None:
        """n > 5f and a range of two values."""
        f = faults(self.f, rules)
        require(rules.agents > 5 * f, self.name, "n > 5f", rules, f, self.unsafe)
        require_faults(self.name, rules, f, self.unsafe)
        if rules.high - rules.low != 1:
            raise ConfigError(
                f"{self.name} agrees on one of two values; the game has the range "
                f"{rules.low} to {rules.high}",
                hint="set value_range = [0, 1]",
            )

    def decide(self, view: View) -> Proposal:
        """Reports in odd rounds, proposals in even ones; memory is true once decided."""
        n, f = view.rules.agents, faults(self.f, view.rules)
        value = current(view)
        assert value is not None  # honest agents begin with one
        if len(view.neighbours) + 1 < n and not self.unsafe:
            raise ConfigError(f"{self.name} needs that every agent hears every other")
        decided = bool(view.memory)
        if view.round == 1:
            return Proposal(value, memory=decided)
        heard = sent_in(view, view.round - 1)
        if view.round % 2 == 0:
            reports = [m.value for m in heard.values() if in_range(m.value, view.rules)]
            w = propose([v for v in reports if v is not None], n, f)
            if decided:
                w = value
            return Proposal(value, payload=[] if w is None else [w], memory=decided)
        if decided:
            return Proposal(value, memory=True)
        proposals = [proposal(m.payload, view.rules) for m in heard.values()]
        settled, decided = settle(proposals, n, f)
        if settled is None:
            settled = view.rules.low + view.draws("coin").randrange(2)
        return Proposal(settled, memory=decided)

    def vote(self, view: View) -> Ballot:
        """Stop once decided."""
        return VOTES["stop" if view.memory else "continue"]


def proposal(payload: object, rules: Rules) -> int | None:
    """What a payload proposes; None where it is malformed or proposes nothing."""
    if isinstance(payload, list | tuple) and len(payload) == 1:
        (w,) = payload
        if isinstance(w, int) and not isinstance(w, bool) and in_range(w, rules):
            return w
    return None
