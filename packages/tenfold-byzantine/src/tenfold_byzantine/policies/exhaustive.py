"""Model checks: every behaviour of one traitor, on the same code that plays in games.

`oral_messages` runs OM(1) for one commander; `phase_king` runs f = 1 with its two phases. A run is
one choice of the traitor, the honest inputs and every message that the traitor sends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tenfold_byzantine.contracts import Rules
from tenfold_byzantine.policies import eig
from tenfold_byzantine.policies import phase_king as king

BITS = (0, 1)


@dataclass(frozen=True)
class Check:
    """How many runs there are, and in how many an honest agent was wronged."""

    runs: int
    violations: int


def _count(verdicts: Iterator[bool]) -> Check:
    good = list(verdicts)
    return Check(len(good), good.count(False))


def oral_messages(n: int) -> Check:
    """OM(1) with commander 0, two values and one traitor among n.

    Violated where honest lieutenants differ, or differ from an honest commander.
    """
    return _count(_oral_runs(n))


def _oral_runs(n: int) -> Iterator[bool]:
    for said in itertools.product(BITS, repeat=n - 1):  # traitor 0: to each lieutenant
        told = dict(zip(range(1, n), said, strict=True))
        decided = {a: _lieutenant(n, a, told[a], {**told}) for a in told}
        yield len(set(decided.values())) == 1
    for traitor, order in itertools.product(range(1, n), BITS):
        honest = [a for a in range(1, n) if a != traitor]
        for said in itertools.product(BITS, repeat=n - 2):
            lies = dict(zip(honest, said, strict=True))
            decided = [
                _lieutenant(n, a, order, {**dict.fromkeys(honest, order), traitor: lies[a]})
                for a in honest
            ]
            yield all(v == order for v in decided)


def _lieutenant(n: int, agent: int, heard: int, relays: dict[int, int]) -> int:
    """What an honest lieutenant resolves for commander 0, after one round of relays.

    Broadcasts of the other commanders run along in the same tree and are all 0 here.
    """
    rules = Rules(n, 1, *BITS, max_rounds=3, quota=n)
    level = [heard] + [0] * (n - 1)
    claims = {s: [v] + [0] * (n - 2) for s, v in relays.items() if s != agent}
    last = eig.next_level(level, claims, n, 1, rules, agent)
    return eig.resolve(last, n, 2, 0)[0]


def phase_king(n: int) -> Check:
    """Phase King for f = 1 on two values, every traitor's position, input and message.

    Violated where honest agents end with different values, or with another one than all began
    with.
    """
    return _count(_king_runs(n))


def _king_runs(n: int) -> Iterator[bool]:
    starts = list(itertools.product(BITS, repeat=n - 1))
    for traitor in range(n):
        honest = [a for a in range(n) if a != traitor]
        ends = {
            (phase, values): list(_phase(n, honest, phase, values))
            for phase in (0, 1)
            for values in starts
        }
        for start in starts:
            for middle in ends[0, start]:
                for end in ends[1, middle]:
                    yield len(set(end)) == 1 and (len(set(start)) > 1 or end[0] == start[0])


def _phase(
    n: int, honest: Sequence[int], phase: int, values: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """What honest agents hold after a phase, once for each choice of the traitor's messages."""
    lies = list(itertools.product(BITS, repeat=len(honest)))
    for said in lies:
        mine = [king.majority((*values, lie), n, 0) for lie in said]
        kings = lies
        if phase in honest:
            kings = [(mine[honest.index(phase)][0],) * len(honest)]
        for heard in kings:
            yield tuple(
                maj if king.keeps(mult, n, 1) else k
                for (maj, mult), k in zip(mine, heard, strict=True)
            )
