"""Trimming around any policy, language models included: `filter = "wmsr:F=1"` (§2.13).

On the view, an agent does not get to see the values that the filter drops; on the proposal, what
it says is moved into the range of the values that the filter keeps. The own message always stays.
After the remedy of *Resilient Consensus in Agentic AI* (arXiv:2606.15024).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tenfold_byzantine.contracts import Ballot, Message, Policy, Proposal, RoundLine, Rules, View
from tenfold_byzantine.policies.base import (
    Named,
    current,
    faults,
    faults_param,
    param,
    require,
    require_faults,
    unsafe_param,
)

SIDES = ("view", "proposal")


@dataclass(frozen=True)
class Filter(Named):
    """Which messages of others an agent may trust."""

    on: str = param("view", "what is filtered: what the agent sees, or says", choices=SIDES)
    unsafe: bool = unsafe_param()

    @abstractmethod
    def check(self, rules: Rules) -> None:
        """Raises ConfigError outside of the bound."""

    @abstractmethod
    def dropped(self, own: int | None, others: Sequence[tuple[int, int]], rules: Rules) -> set[int]:
        """Senders to drop, of `(value, sender)` in ascending order."""

    def kept(self, messages: Sequence[Message], agent: int, own: int | None, rules: Rules) -> tuple:
        """The messages without those of dropped senders."""
        others = sorted(
            (m.value, m.sender) for m in messages if m.value is not None and m.sender != agent
        )
        dropped = self.dropped(own, others, rules)
        return tuple(m for m in messages if m.sender not in dropped) if dropped else tuple(messages)


@dataclass(frozen=True)
class WmsrFilter(Filter):
    """Drops up to F values above the own and up to F below it, the farthest first."""

    name: ClassVar[str] = "wmsr"
    summary: ClassVar[str] = "drops up to F values above the own and F below it"
    bound: ClassVar[str] = "complete networks: n >= 2F+1"

    F: int | None = param(None, "liars to tolerate; default: the game's faults", minimum=0)

    def check(self, rules: Rules) -> None:
        """As the policy `wmsr` without equivocation."""
        f = faults(self.F, rules)
        what = f"filter {self.name}"
        if rules.complete:
            require(rules.agents > 2 * f, what, "n >= 2F+1", rules, f, self.unsafe)
            require_faults(what, rules, f, self.unsafe)

    def dropped(self, own: int | None, others: Sequence[tuple[int, int]], rules: Rules) -> set[int]:
        """Around the own value; nothing where the agent has none."""
        if own is None:
            return set()
        f = faults(self.F, rules)
        below = [s for v, s in others if v < own]
        above = [s for v, s in others if v > own]
        return {*below[:f], *above[max(len(above) - f, 0) :]}


@dataclass(frozen=True)
class DlpswFilter(Filter):
    """Drops the f smallest and the f largest of the others' values."""

    name: ClassVar[str] = "dlpsw"
    summary: ClassVar[str] = "drops the f smallest and the f largest values heard"
    bound: ClassVar[str] = "n >= 3f+1"

    f: int | None = faults_param()

    def check(self, rules: Rules) -> None:
        """n ≥ 3f+1."""
        f = faults(self.f, rules)
        what = f"filter {self.name}"
        require(rules.agents > 3 * f, what, "n >= 3f+1", rules, f, self.unsafe)
        require_faults(what, rules, f, self.unsafe)

    def dropped(self, own: int | None, others: Sequence[tuple[int, int]], rules: Rules) -> set[int]:
        """Both ends; all of them where 2f or fewer came."""
        f = faults(self.f, rules)
        return {s for _, s in [*others[:f], *others[max(len(others) - f, 0) :]]}


@dataclass(frozen=True)
class Filtered:
    """A policy behind a filter."""

    policy: Policy
    filter: Filter

    @property
    def label(self) -> str:
        """Both labels."""
        return f"{self.policy.label} behind {self.filter.label}"

    @property
    def identity(self) -> Any:
        """What else distinguishes the policy (a model, its prompts); part of the game id."""
        return getattr(self.policy, "identity", None)

    @property
    def powers(self) -> frozenset[str]:
        """The policy's."""
        return self.policy.powers

    def check(self, rules: Rules) -> None:
        """Both bounds."""
        self.policy.check(rules)
        self.filter.check(rules)

    def trimmed_view(self, view: View) -> View:
        """The view without what the filter drops from the inbox and from every round line."""
        lines = []
        for line in view.history:
            own = next((m.value for m in line.messages if m.sender == view.agent), None)
            kept = self.filter.kept(line.messages, view.agent, own, view.rules)
            lines.append(RoundLine(line.round, kept))
        inbox = self.filter.kept(view.inbox, view.agent, current(view), view.rules)
        return replace(view, inbox=inbox, history=tuple(lines))

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """The policy's answers to trimmed views, or its answers trimmed."""
        if self.filter.on == "view":
            return self.policy.decide_many([self.trimmed_view(v) for v in views])
        answers = self.policy.decide_many(views)
        return [self.trimmed_proposal(v, a) for v, a in zip(views, answers, strict=True)]

    def trimmed_proposal(self, view: View, answer: Proposal) -> Proposal:
        """The answer's value moved into the range of the values kept."""
        if answer.value is None or view.round == 1 or not view.inbox:
            return answer
        own = current(view)
        kept = self.filter.kept(view.inbox, view.agent, own, view.rules)
        values = [m.value for m in kept if m.value is not None]
        if own is not None:
            values.append(own)
        if not values:
            return answer
        value = min(max(answer.value, min(values)), max(values))
        if value == answer.value:
            return answer
        return replace(answer, value=value, held=None)

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """On trimmed views where the view is filtered."""
        if self.filter.on == "view":
            views = [self.trimmed_view(v) for v in views]
        return self.policy.vote_many(views)
