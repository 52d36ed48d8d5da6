"""Approximate agreement: averages that f liars cannot pull out of the honest range (§2.13).

DLPSW needs a complete network and tolerates equivocation; W-MSR runs on any graph and asks
robustness of it (`policies.robustness`). Messages are integers as in the game; with `exact` they
carry the unrounded value in their payload, so that diameters can shrink below one, and only what
is said and held is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tenfold.errors import ConfigError

from tenfold_byzantine.contracts import Proposal, Rules, View
from tenfold_byzantine.policies.base import (
    current,
    faults,
    faults_param,
    param,
    require,
    require_complete,
    require_faults,
    unsafe_param,
)
from tenfold_byzantine.policies.one_round import OneRound, quotient


def dlpsw_selection(values: Sequence[float], f: int) -> list[float]:
    """What DLPSW averages: sorted, without the f smallest and largest, every f-th of the rest.

    f = 0 keeps all. Falls back to all values where 2f or fewer came.
    """
    ordered = sorted(values)
    if f == 0 or len(ordered) <= 2 * f:
        return ordered
    return ordered[f : len(ordered) - f : f]


def dlpsw_contraction(n: int, f: int) -> float:
    """1/c with `c = ⌊(n - 2f - 1)/f⌋ + 1`: how much of the diameter a round can leave, at most.

    Raises:
        ConfigError: n < 3f + 1.
    """
    if n < 3 * f + 1:
        raise ConfigError(f"DLPSW needs n >= 3f + 1; n = {n}, f = {f}")
    return 0.0 if f == 0 else 1 / ((n - 2 * f - 1) // f + 1)


def own_exactly(view: View) -> float:
    """The unrounded value the agent holds."""
    return float(view.memory if view.memory is not None else current(view) or 0)


def exact_values(view: View) -> dict[int, float]:
    """Unrounded values of the others, by sender; the rounded one where a payload is no value."""
    found = {}
    for m in view.inbox if view.round > 1 else ():
        if m.value is None or m.sender == view.agent:
            continue
        p = m.payload
        usable = isinstance(p, int | float) and view.rules.low <= p <= view.rules.high
        found[m.sender] = float(p) if usable else float(m.value)
    return found


@dataclass(frozen=True)
class Averaging(OneRound):
    """A rule on the own value and the others', with integers or with exact values."""

    exact: bool = param(False, "exchange unrounded values (in the payload)")
    unsafe: bool = unsafe_param()

    def kept(self, own: float, others: Sequence[float], view: View) -> list[float]:
        """The values to average (not empty)."""
        raise NotImplementedError

    def update(self, values: Sequence[int], view: View) -> int:
        """The rounded average."""
        del values
        others = [m.value for m in view.inbox if m.sender != view.agent and m.value is not None]
        kept = self.kept(current(view) or 0, others, view)
        return quotient(int(sum(kept)), len(kept))

    def decide(self, view: View) -> Proposal:
        """As `update`, or with the exact average beside the rounded one."""
        if not self.exact:
            return super().decide(view)
        own = own_exactly(view)
        others = list(exact_values(view).values())
        if others:
            kept = self.kept(own, others, view)
            own = sum(kept) / len(kept)
        return Proposal(view.rules.clamp(own), payload=own, memory=own)


@dataclass(frozen=True)
class Dlpsw(Averaging):
    """Approximate agreement of Dolev, Lynch, Pinter, Stark and Weihl (1986)."""

    name: ClassVar[str] = "dlpsw"
    summary: ClassVar[str] = "approximate agreement: trimmed at both ends, every f-th averaged"
    guarantee: ClassVar[str] = (
        "the honest diameter shrinks to 1/c, c = ⌊(n-2f-1)/f⌋+1, each round, even under "
        "equivocation (before rounding); never leaves the honest range"
    )
    bound: ClassVar[str] = "n >= 3f+1, complete network"

    f: int | None = faults_param()

    def check(self, rules: Rules) -> None:
        """n ≥ 3f+1 on a complete network."""
        f = faults(self.f, rules)
        require(rules.agents > 3 * f, self.name, "n >= 3f+1", rules, f, self.unsafe)
        require_faults(self.name, rules, f, self.unsafe)
        require_complete(self.name, rules, self.unsafe)

    def kept(self, own: float, others: Sequence[float], view: View) -> list[float]:
        """The selection; a silent neighbour counts as one that said the own value."""
        silent = len(view.neighbours) - len(others)
        return dlpsw_selection([own] * (1 + silent) + list(others), faults(self.f, view.rules))


def wmsr_kept(own: float, others: Sequence[float], f: int) -> list[float]:
    """What W-MSR averages: the own value, and the others' without the F largest of those above
    it and the F smallest of those below it (all, where there are fewer)."""
    above = sorted(v for v in others if v > own)
    below = sorted(v for v in others if v < own)
    equal = [v for v in others if v == own]
    return [*below[f:], *equal, own, *above[: max(len(above) - f, 0)]]


@dataclass(frozen=True)
class Wmsr(Averaging):
    """Weighted mean-subsequence-reduced of LeBlanc, Zhang, Koutsoukos and Sundaram (2013)."""

    name: ClassVar[str] = "wmsr"
    summary: ClassVar[str] = "mean of own and neighbours' values without F larger and F smaller"
    guarantee: ClassVar[str] = (
        "approaches agreement inside the honest range with F liars beside each agent on "
        "(2F+1)-robust graphs, or F in all that tell everybody the same on (F+1, F+1)-robust ones"
    )
    bound: ClassVar[str] = (
        "complete networks: n >= 2F+1, with equivocation n >= 3F+1; others: see robustness"
    )

    F: int | None = param(None, "liars to tolerate; default: the game's faults", minimum=0)

    def check(self, rules: Rules) -> None:
        """What a complete network needs; other graphs are not known here.

        There (F+1, F+1)-robustness means n ≥ 2F+1; under equivocation the honest agents alone
        must be (F+1)-robust, which means n ≥ 3F+1.
        """
        f = faults(self.F, rules)
        if not rules.complete:
            return
        factor, when = (3, " under equivocation") if "equivocate" in rules.powers else (2, "")
        needs = f"n >= {factor}F+1{when}"
        require(rules.agents > factor * f, self.name, needs, rules, f, self.unsafe)
        require_faults(self.name, rules, f, self.unsafe)

    def kept(self, own: float, others: Sequence[float], view: View) -> list[float]:
        """Trimmed around the own value."""
        return wmsr_kept(own, others, faults(self.F, view.rules))
