"""Phase King (Berman, Garay and Perry 1989): agreement in f+1 phases of two rounds, n > 4f.

Round A: all send their value; `maj` is the value that more than half hold (else the default), and
`mult` its count. Round B: the phase's king (agents 0 ... f in turn) sends its maj; everybody keeps
its own maj where mult > n/2 + f and takes the king's otherwise. Values may be any integers of the
game. In the game agents other than the king are silent in round B; what they hold stays. The
decision stands in round 2(f+1) + 1, where all say it and vote stop.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    require_complete,
    require_faults,
    sent_in,
    unsafe_param,
)


def majority(values: Iterable[int], n: int, default: int) -> tuple[int, int]:
    """`(maj, mult)`: the value held by more than n/2 of n, else the default, and its count."""
    counts: dict[int, int] = {}
    for v in values:
        counts[v] = counts.get(v, 0) + 1
    for v, count in counts.items():
        if 2 * count > n:
            return v, count
    return default, counts.get(default, 0)


def keeps(mult: int, n: int, f: int) -> bool:
    """Whether `mult > n/2 + f`: so many that every other honest agent has the same maj."""
    return 2 * mult > n + 2 * f


@dataclass(frozen=True)
class PhaseKing(Scripted):
    """Deterministic exact agreement with unanimity validity."""

    name: ClassVar[str] = "phase-king"
    summary: ClassVar[str] = "f+1 kings in turn break ties; 2(f+1) rounds"
    guarantee: ClassVar[str] = (
        "agreement, also under equivocation, and the common value where all honest began with it"
    )
    bound: ClassVar[str] = "n > 4f, complete network, deadline >= 2(f+1)+1"

    f: int | None = faults_param()
    unsafe: bool = unsafe_param()

    def check(self, rules: Rules) -> None:
        """n > 4f on a complete network, with time for all phases."""
        f = faults(self.f, rules)
        require(rules.agents > 4 * f, self.name, "n > 4f", rules, f, self.unsafe)
        require_faults(self.name, rules, f, self.unsafe)
        require_complete(self.name, rules, self.unsafe)
        require_rounds(self.name, 2 * (f + 1) + 1, rules)

    def decide(self, view: View) -> Proposal:
        """Odd rounds send the value, even rounds the king's maj; memory is `[value, mult]`."""
        rules, f = view.rules, faults(self.f, view.rules)
        phase, second = divmod(view.round - 1, 2)
        value = int(view.memory[0]) if view.memory is not None else current(view)
        assert value is not None  # honest agents begin with one
        if phase > f + 1 or (phase == f + 1 and second):
            return Proposal(value, memory=[value, 0])
        heard = sent_in(view, view.round - 1)
        if second:
            allowed = [m.value for m in heard.values() if in_range(m.value, rules)]
            value, mult = majority([v for v in allowed if v is not None], rules.agents, rules.low)
            says_it = value if view.agent == phase else None
            return Proposal(says_it, held=value, memory=[value, mult])
        if view.round > 1 and not keeps(int(view.memory[1]), rules.agents, f):
            king = heard.get(phase - 1)
            said = king.value if king is not None else None
            value = said if said is not None and in_range(said, rules) else rules.low
        return Proposal(value, memory=[value, 0])

    def vote(self, view: View) -> Ballot:
        """Stop once the last king has spoken."""
        done = view.round > 2 * (faults(self.f, view.rules) + 1)
        return VOTES["stop" if done else "continue"]


def in_range(value: int | None, rules: Rules) -> bool:
    """Whether a message says a value of the game."""
    return value is not None and rules.low <= value <= rules.high


def require_rounds(policy: str, rounds: int, rules: Rules) -> None:
    """Raises ConfigError where the deadline comes before an algorithm ends."""
    if rules.max_rounds < rounds:
        raise ConfigError(
            f"{policy} decides in round {rounds}; the game ends after {rules.max_rounds}",
            hint=f"set max_rounds to {rounds} or more",
        )
