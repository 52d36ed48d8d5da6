"""A random stand-in for a language model: for power analysis and load tests only.

Its parameters describe what agents were seen to do (follow the most common value, average, stay);
what it yields is never a result about language models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tenfold.errors import ConfigError

from tenfold_byzantine.contracts import Ballot, Proposal, View
from tenfold_byzantine.policies.base import VOTES, Scripted, current, param, plurality, says
from tenfold_byzantine.policies.one_round import quotient


def probability(default: float, help: str) -> float:
    """A parameter between 0 and 1."""
    return param(default, help, minimum=0, maximum=1)


@dataclass(frozen=True)
class Surrogate(Scripted):
    """Follows, averages, stays, or copies somebody, at random; votes by how equal values are."""

    name: ClassVar[str] = "surrogate"
    summary: ClassVar[str] = "random stand-in for a language model (power analysis, load tests)"
    guarantee: ClassVar[str] = "none; never reported as a language model's result"

    follow: float = probability(0.6, "probability of taking the most common value")
    average: float = probability(0.1, "probability of taking the rounded mean")
    stay: float = probability(0.2, "probability of keeping the own value")
    stop: float = probability(0.9, "probability of a stop vote when all heard values are equal")
    near_stop: float = probability(0.1, "probability of a stop vote when nearly all are equal")
    near: float = probability(0.8, "share of equal values that counts as nearly all")

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.follow + self.average + self.stay
        if total > 1 + 1e-9:
            raise ConfigError(
                f"{self.name}: follow + average + stay is {total:g}; it must be at most 1 "
                "(the rest copies somebody at random)"
            )

    def decide(self, view: View) -> Proposal:
        """One draw says which of the four moves."""
        own = current(view)
        values = view.values() if view.round > 1 else []
        if not values or own is None:
            return says(own)
        draws = view.draws("surrogate")
        u = draws.random()
        if u < self.follow:
            return says(plurality(values)[1][0])
        if u < self.follow + self.average:
            return says(quotient(sum(values), len(values)))
        if u < self.follow + self.average + self.stay:
            return says(own)
        return says(draws.choice(values))

    def vote(self, view: View) -> Ballot:
        """Stop with a probability that depends on the largest share of equal values."""
        values = view.values()
        if not values:
            return VOTES["continue"]
        share = plurality(values)[0] / len(values)
        chance = self.stop if share == 1 else self.near_stop if share >= self.near else 0.0
        return VOTES["stop" if view.draws("surrogate").random() < chance else "continue"]
