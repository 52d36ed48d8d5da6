"""Oral messages OM(f) of Lamport, Shostak and Pease (1982) as exponential information gathering.

Every agent is the commander of one broadcast of its initial value; all n run at once. After round
r an agent knows, for every path of r different agents, what the last one claims that the one
before claimed ... that the first said. Round r+1 relays the values of all paths that do not hold
the sender itself. After f+1 rounds the tree is resolved from the leaves by strict majority, the
default on ties, and every honest agent has the same vector of n values, to which a one-round rule
is applied.

A level is a flat list along `permutations(range(n), r)`, which is also how it is sent.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from tenfold_byzantine.policies.one_round import CommonRule, LowMedian
from tenfold_byzantine.policies.phase_king import in_range, majority, require_rounds

NODE_LIMIT = 10**6
"""Leaves above which a tree is refused: n (n-1) ... (n-f)."""


def leaves(n: int, f: int) -> int:
    """Size of the last level, n·(n-1)···(n-f)."""
    return math.perm(n, f + 1)


@functools.lru_cache(maxsize=64)
def paths(n: int, length: int) -> tuple[tuple[int, ...], ...]:
    """All paths of a level in its order."""
    return tuple(itertools.permutations(range(n), length))


@functools.lru_cache(maxsize=64)
def places(n: int, length: int) -> Mapping[tuple[int, ...], int]:
    """Position of every path in its level."""
    return {path: i for i, path in enumerate(paths(n, length))}


@functools.lru_cache(maxsize=1024)
def relayed(n: int, length: int, agent: int) -> tuple[int, ...]:
    """Positions in a level that an agent relays: the paths without itself, in order."""
    return tuple(i for i, path in enumerate(paths(n, length)) if agent not in path)


def relay(level: Sequence[int], n: int, length: int, agent: int) -> list[int]:
    """What an agent sends of a level."""
    return [level[i] for i in relayed(n, length, agent)]


def next_level(
    level: Sequence[int], claims: Mapping[int, Any], n: int, length: int, rules: Rules, agent: int
) -> list[int]:
    """The level of paths one longer, from what each other agent relayed.

    Args:
        level: the agent's own level of paths of this length.
        claims: sender → its payload; what is missing or malformed counts as the default.
        n: agents.
        length: length of `level`'s paths.
        rules: the range of values; its low end is the default.
        agent: who receives.
    """
    told: dict[int, list[int]] = {agent: relay(level, n, length, agent)}
    for sender, claim in claims.items():
        expected = len(relayed(n, length, sender))
        if sender != agent and isinstance(claim, list | tuple) and len(claim) == expected:
            told[sender] = [v if proper(v, rules) else rules.low for v in claim]
    spread = {
        sender: dict(zip(relayed(n, length, sender), values, strict=True))
        for sender, values in told.items()
    }
    where = places(n, length)
    nothing: dict[int, int] = {}
    return [
        spread.get(path[-1], nothing).get(where[path[:-1]], rules.low)
        for path in paths(n, length + 1)
    ]


def proper(value: Any, rules: Rules) -> bool:
    """Whether a claim is an integer of the game."""
    return isinstance(value, int) and not isinstance(value, bool) and in_range(value, rules)


def resolve(last: Sequence[int], n: int, length: int, default: int) -> list[int]:
    """One value per commander, from the last level: strict majorities, bottom up."""
    level = list(last)
    for depth in range(length - 1, 0, -1):
        where = places(n, depth)
        children: list[list[int]] = [[] for _ in where]
        for path, value in zip(paths(n, depth + 1), level, strict=True):
            children[where[path[:-1]]].append(value)
        level = [majority(c, len(c), default)[0] for c in children]
    return level


@dataclass(frozen=True)
class Eig(Scripted):
    """Vector agreement by oral messages, then a one-round rule on the vector."""

    name: ClassVar[str] = "eig"
    summary: ClassVar[str] = "every value broadcast by oral messages OM(f), then a rule"
    guarantee: ClassVar[str] = (
        "agreement, also under equivocation, on a vector with every honest initial value in it"
    )
    bound: ClassVar[str] = "n > 3f, complete network, n(n-1)...(n-f) <= 10^6, deadline >= f+2"

    f: int | None = faults_param()
    rule: CommonRule = field(
        default=LowMedian(), metadata={"help": "one-round rule applied to the agreed vector"}
    )
    unsafe: bool = unsafe_param()

    def check(self, rules: Rules) -> None:
        """n > 3f on a complete network, a tree that fits, and time to send it."""
        f = faults(self.f, rules)
        require(rules.agents > 3 * f, self.name, "n > 3f", rules, f, self.unsafe)
        require_faults(self.name, rules, f, self.unsafe)
        require_complete(self.name, rules, self.unsafe)
        require_tree(self.name, rules.agents, f)
        require_rounds(self.name, f + 2, rules)
        self.rule.check(rules)

    def decide(self, view: View) -> Proposal:
        """Relays for f+1 rounds, then decides; memory is the level, then the decision."""
        rules, n, f = view.rules, view.rules.agents, faults(self.f, view.rules)
        own = current(view)
        assert own is not None  # honest agents begin with one
        if view.round == 1:
            return Proposal(own)
        if view.round > f + 2:
            return Proposal(own)
        length = view.round - 1
        heard = sent_in(view, length)
        if length == 1:
            said = {s: m.value for s, m in heard.items() if proper(m.value, rules)}
            said[view.agent] = view.initial
            level = [rules.low if (v := said.get(s)) is None else v for s in range(n)]
        else:
            claims = {s: m.payload for s, m in heard.items()}
            level = next_level(view.memory, claims, n, length - 1, rules, view.agent)
        if length <= f:
            payload = relay(level, n, length, view.agent)
            return Proposal(own, payload=payload, memory=level)
        vector = resolve(level, n, f + 1, rules.low)
        return Proposal(self.rule.pick(vector, rules), memory=[])

    def vote(self, view: View) -> Ballot:
        """Stop once decided."""
        return VOTES["stop" if view.round > faults(self.f, view.rules) + 1 else "continue"]


def require_tree(policy: str, n: int, f: int) -> None:
    """Raises ConfigError where the tree has too many leaves."""
    if leaves(n, f) > NODE_LIMIT:
        raise ConfigError(
            f"{policy}: n = {n} and f = {f} need a tree of {leaves(n, f):,} leaves; "
            f"at most {NODE_LIMIT:,} are built",
            hint="use phase-king (n > 4f), whose messages stay small, or fewer faults",
        )
