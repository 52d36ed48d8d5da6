"""What theory says about n agents with f faulty ones (§2.16): statements with their conditions.

Everything here is a known theorem or simple arithmetic of the game's vote; nothing is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from tenfold.errors import ConfigError

from tenfold_byzantine.policies.averaging import dlpsw_contraction
from tenfold_byzantine.policies.eig import NODE_LIMIT, leaves


@dataclass(frozen=True)
class Statement:
    """One thing that theory says.

    Attributes:
        name: what it is about; the policy's name where it is one.
        holds: whether the condition is met.
        condition: in n, f and m, with the numbers put in.
        says: what follows where it holds; where not, what is lost.
        source: where it is proven.
    """

    name: str
    holds: bool
    condition: str
    says: str
    source: str


def bounds(
    n: int, f: int, values: int = 51, quota: Fraction | float | int = Fraction(2, 3)
) -> list[Statement]:
    """What is possible with n agents, f of them Byzantine, and so many possible values.

    Args:
        n: all agents.
        f: Byzantine ones among them.
        values: m, possible initial values.
        quota: share of stop votes that ends the game (a whole number above 1 is a count).

    Raises:
        ConfigError: impossible counts.
    """
    if n < 1 or not 0 <= f < n or values < 1:
        raise ConfigError(
            f"n is {n}, f {f} and values {values}; needed are n >= 1, 0 <= f < n and values >= 1"
        )
    return [
        *of_the_vote(n, f, quota),
        *of_validity(n, f, values),
        *of_agreement(n, f),
        *of_averaging(n, f),
    ]


def of_the_vote(n: int, f: int, quota: Fraction | float | int) -> list[Statement]:
    """Arithmetic of the stop vote."""
    whole = isinstance(quota, int) and quota > 1
    needed = quota if whole else math.ceil(Fraction(quota).limit_denominator(10**6) * n)
    honest = n - f
    spare = honest - int(needed)
    live = (
        f"honest agents can stop the game alone; {spare} of them may vote otherwise"
        if spare >= 0
        else "Byzantine agents that never vote stop keep the game going to its deadline"
    )
    early = max(int(needed) - f, 0)
    return [
        Statement(
            "liveness of the vote",
            spare >= 0,
            f"n - f >= quota: {honest} >= {needed}",
            live,
            "arithmetic of the quota over all n agents",
        ),
        Statement(
            "safety of the vote",
            early > honest // 2,
            f"quota - f > (n - f)/2: {early} > {honest / 2:g}",
            f"{early} honest stop votes end the game when all Byzantine agents vote stop",
            "arithmetic of the quota over all n agents",
        ),
    ]


def of_validity(n: int, f: int, m: int) -> list[Statement]:
    """Which validity can be guaranteed."""
    strong = n > max(3, m) * f
    hull = n > 3 * f
    return [
        Statement(
            "strong validity",
            strong,
            f"n > max(3, m) f: {n} > {max(3, m) * f}",
            "a protocol can guarantee that the decision is an honest initial value"
            if strong
            else "no protocol can guarantee in the worst case that the decision is an honest "
            "initial value",
            "Neiger 1994, strong consensus",
        ),
        Statement(
            "hull validity",
            hull,
            f"n > 3f: {n} > {3 * f}",
            "trimming keeps decisions inside the range of the honest initial values"
            if hull
            else "no protocol can keep every decision inside the honest range under equivocation",
            "Dolev, Lynch, Pinter, Stark and Weihl 1986",
        ),
        Statement(
            "one common multiset",
            True,
            "complete network, no loss, no equivocation: any n, f",
            "every agent hears the same values, so that any common rule of them agrees in round 2; "
            "what is hard is validity",
            "the paper's threat model (arXiv:2603.01213)",
        ),
    ]


def of_agreement(n: int, f: int) -> list[Statement]:
    """Exact agreement."""
    oral, king, ben_or = n > 3 * f, n > 4 * f, n > 5 * f
    size = leaves(n, f) if f + 1 <= n else 0
    fits = size <= NODE_LIMIT
    return [
        Statement(
            "agreement under equivocation",
            oral,
            f"n > 3f: {n} > {3 * f}",
            "exact agreement is possible without signatures"
            if oral
            else "exact agreement is impossible without signatures",
            "Pease, Shostak and Lamport 1980",
        ),
        Statement(
            "rounds",
            n >= f + 2,
            f"n >= f + 2: {n} >= {f + 2}",
            f"no deterministic protocol decides in fewer than {f + 1} rounds in the worst case",
            "Fischer and Lynch 1982",
        ),
        Statement(
            "eig",
            oral and fits,
            f"n > 3f: {n} > {3 * f}; n(n-1)...(n-f) = {size:,} <= {NODE_LIMIT:,}",
            f"oral messages: agreement on a vector after {f + 1} rounds, decision in round {f + 2}",
            "Lamport, Shostak and Pease 1982",
        ),
        Statement(
            "phase-king",
            king,
            f"n > 4f: {n} > {4 * f}",
            f"agreement after {2 * (f + 1)} rounds with short messages, decision in round "
            f"{2 * (f + 1) + 1}",
            "Berman, Garay and Perry 1989",
        ),
        Statement(
            "ben-or",
            ben_or,
            f"n > 5f, two values: {n} > {5 * f}",
            "agreement without synchrony, ends with probability 1",
            "Ben-Or 1983",
        ),
        Statement(
            "asynchrony",
            f == 0,
            f"f = 0: {f} = 0",
            "a deterministic protocol can decide without synchrony"
            if f == 0
            else "no deterministic protocol decides without synchrony, be the fault only a crash",
            "Fischer, Lynch and Paterson 1985",
        ),
    ]


def of_averaging(n: int, f: int) -> list[Statement]:
    """Approximate agreement and robust filters."""
    fits = n > 3 * f
    contraction = dlpsw_contraction(n, f) if fits else 1.0
    return [
        Statement(
            "dlpsw",
            fits,
            f"n >= 3f+1: {n} >= {3 * f + 1}",
            f"a round leaves at most {contraction:.4g} of the honest diameter, also under "
            "equivocation"
            if fits
            else "approximate agreement is impossible under equivocation",
            "Dolev, Lynch, Pinter, Stark and Weihl 1986",
        ),
        Statement(
            "wmsr",
            n >= 2 * f + 1,
            f"complete network, n >= 2F+1: {n} >= {2 * f + 1}",
            f"approaches agreement; other networks must be ({f + 1}, {f + 1})-robust, or "
            f"{2 * f + 1}-robust where liars differ from neighbour to neighbour",
            "LeBlanc, Zhang, Koutsoukos and Sundaram 2013",
        ),
        Statement(
            "trimming and medians",
            n > 2 * f,
            f"n > 2f: {n} > {2 * f}",
            "low-median and trimmed rules stay inside the honest range where all hear the same",
            "order statistics",
        ),
    ]
