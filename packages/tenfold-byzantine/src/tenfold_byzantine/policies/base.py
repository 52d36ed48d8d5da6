"""What all scripted policies share: parameters as dataclass fields, labels, bounds, stop votes.

A scripted policy is stateless; what a seat must remember travels in `View.memory`. Answers that
are equal are one shared object, since a simulation makes them by the million.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from tenfold.errors import ConfigError

from tenfold_byzantine.contracts import Ballot, Message, Proposal, Role, Rules, View, Vote

NO_POWERS: frozenset[str] = frozenset()


def param(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is a policy's parameter, with what is allowed."""
    return field(
        default=default,
        metadata={"help": help, "minimum": minimum, "maximum": maximum, "choices": choices},
    )


def faults_param() -> Any:
    """The field `f` of the algorithms."""
    return param(None, "faults to tolerate; default: the game's", minimum=0)


def unsafe_param() -> Any:
    """The field `unsafe` of algorithms with a bound."""
    return param(False, "run outside of the bound too, where nothing is guaranteed")


@dataclass(frozen=True)
class Named:
    """What a game file names with parameters, which are the fields.

    Raises:
        ConfigError: a parameter outside of its range.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    bound: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(self.name, f.name, getattr(self, f.name), dict(f.metadata))

    @property
    def label(self) -> str:
        """The name with the parameters that differ from their defaults."""
        parts = [
            f"{f.name}={as_text(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}:{','.join(parts)}" if parts else self.name


@dataclass(frozen=True)
class Scripted(Named, ABC):
    """A policy without a language model."""

    role: ClassVar[Role] = "honest"
    guarantee: ClassVar[str] = ""

    @property
    def powers(self) -> frozenset[str]:
        """None, unless a class says otherwise."""
        return NO_POWERS

    def check(self, rules: Rules) -> None:
        """Most rules may be used anywhere."""
        del rules

    @abstractmethod
    def decide(self, view: View) -> Proposal:
        """The proposal for one view."""

    @abstractmethod
    def vote(self, view: View) -> Ballot:
        """The ballot for one view."""

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """One by one."""
        decide = self.decide
        return [decide(view) for view in views]

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """One by one."""
        vote = self.vote
        return [vote(view) for view in views]


def check_range(policy: str, name: str, value: Any, allowed: dict[str, Any]) -> None:
    """Raises ConfigError where a parameter's value is not one of the allowed ones."""
    if value is None or isinstance(value, bool):
        return
    if allowed.get("choices") and value not in allowed["choices"]:
        raise ConfigError(
            f"{policy}: {name} is {value!r}; it must be one of {', '.join(allowed['choices'])}"
        )
    low, high = allowed.get("minimum"), allowed.get("maximum")
    if low is not None and value < low:
        raise ConfigError(f"{policy}: {name} is {value}; it must be at least {low:g}")
    if high is not None and value > high:
        raise ConfigError(f"{policy}: {name} is {value}; it must be at most {high:g}")


def as_text(value: Any) -> str:
    """A parameter's value as `registry.policy` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    label = getattr(value, "label", None)
    if label is not None:
        return f"({label})" if ":" in label else label
    return str(value)


@functools.lru_cache(maxsize=4096)
def says(value: int | None) -> Proposal:
    """A proposal of this value and nothing else, one object per value."""
    return Proposal(value)


VOTES: dict[Vote, Ballot] = {v: Ballot(v) for v in ("stop", "continue", "abstain")}
"""A ballot per vote."""


def current(view: View) -> int | None:
    """What the agent holds, or its initial value before it holds any."""
    return view.held if view.held is not None else view.initial


def faults(f: int | None, rules: Rules) -> int:
    """The parameter, or what the game says."""
    return rules.faults if f is None else f


def sent_in(view: View, round_: int) -> dict[int, Message]:
    """Messages that were sent in a round, by sender, also where newer ones have come since."""
    found: dict[int, Message] = {}
    for line in view.history:
        if line.round == round_:
            found.update((m.sender, m) for m in line.messages if m.sent_round == round_)
    found.update((m.sender, m) for m in view.inbox if m.sent_round == round_)
    return dict(sorted(found.items()))


def plurality(values: Sequence[int]) -> tuple[int, list[int]]:
    """The largest count and the values that reach it, smallest first."""
    counts: dict[int, int] = {}
    for v in values:
        counts[v] = counts.get(v, 0) + 1
    top = max(counts.values())
    return top, sorted(v for v, n in counts.items() if n == top)


def votes_stop(view: View, q: float | None = None) -> bool:
    """Whether the values heard (own included) are equal enough to stop.

    With `q`, at least the share q of them must be equal. Without, all but f: with f configured
    faults that is the share 1 - f/N of a full inbox; silent neighbours count as faulty first,
    and on sparse graphs more than half of the inbox must agree in any case.
    """
    values = view.values()
    if not values:
        return False
    heard, first = len(values), values[0]
    top = heard if values.count(first) == heard else max(map(values.count, set(values)))
    if q is not None:
        return top >= q * heard
    silent = max(len(view.neighbours) + 1 - heard, 0)
    allowed = max(view.rules.faults - silent, 0)
    return top >= max(heard - allowed, heard // 2 + 1)


def require(holds: bool, what: str, needs: str, rules: Rules, f: int, unsafe: bool) -> None:
    """Raises ConfigError where an algorithm's bound does not hold, unless `unsafe` is set."""
    if holds or unsafe:
        return
    raise ConfigError(
        f"{what} needs {needs}; the game has n = {rules.agents} agents and f = {f}",
        hint="add agents, lower f, or set unsafe=true to run it without its guarantee",
    )


def require_faults(what: str, rules: Rules, f: int, unsafe: bool) -> None:
    """Raises ConfigError where f is below the number of faults the game is configured for."""
    require(f >= rules.faults, what, f"f >= {rules.faults}, the game's faults", rules, f, unsafe)


def require_complete(what: str, rules: Rules, unsafe: bool) -> None:
    """Raises ConfigError on networks where not every message arrives in its round."""
    if not rules.complete and not unsafe:
        raise ConfigError(
            f"{what} needs a complete network without delay or loss",
            hint="use wmsr on other graphs, or set unsafe=true",
        )
