"""How a game ended: the classification, step by step (spec, 2.4 and Appendix B).

Only roles, values and votes decide; no language model is asked.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tenfold_byzantine.contracts import Role, Vote
from tenfold_byzantine.result import Outcome, Properties
from tenfold_byzantine.rules import Thresholds

Rows = Sequence[Sequence[int | None]]
Exposed = Sequence[Sequence[frozenset[int]] | None]
"""Per round and receiver the values that Byzantine agents' messages in its inbox had; None where
everybody heard everybody."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome, its attributes, and the classical properties (None after an error).

    The flags, where they apply: `value` (unanimous value), `in_hull`, `agreed_round` (first round
    since which the honest agents agree without a break), `bloc` (size of the largest honest
    bloc), `byzantine_stop_votes`, `honest_stop_votes`, `honest_quota` (honest votes alone reached
    the quota), `adversary_values` (what Byzantine agents held last), `first_held` (round in which
    an honest agent first held a foreign value), `valid_value` (of a time-out in agreement),
    `moves` (honest moves in the window), `oscillating`, `period`.
    """

    outcome: Outcome
    flags: Mapping[str, Any]
    properties: Properties | None


def classify(
    *,
    roles: Sequence[Role],
    initial: Sequence[int | None],
    held: Rows,
    proposed: Rows,
    votes: Sequence[Sequence[Vote]],
    stopped: bool,
    quota: int,
    thresholds: Thresholds | None = None,
    exposed: Exposed | None = None,
    rushing: bool = False,
    error: str = "",
) -> Verdict:
    """Classifies a finished game.

    Args:
        roles: per agent.
        initial: per agent; None for Byzantine ones.
        held: `[rounds][N]` after phase decide.
        proposed: `[rounds][N]` broadcast values; None is silence.
        votes: `[rounds][N]`.
        stopped: ended by vote in the last round.
        quota: stop votes needed.
        thresholds: window, share of a near miss, longest period.
        exposed: what reached whom; None: everybody heard everybody.
        rushing: Byzantine agents spoke after the honest ones of their round.
        error: what the backend said when it died; then nothing else counts.
    """
    thresholds = thresholds or Thresholds()
    if error or not held:
        return Verdict(Outcome.ERROR_BACKEND, {}, None)
    honest = [a for a, role in enumerate(roles) if role == "honest"]
    inputs = {x for a in honest if (x := initial[a]) is not None}
    last = [held[-1][a] for a in honest]
    unanimous = len(set(last)) == 1
    value = last[0] if unanimous else None
    flags: dict[str, Any] = {
        "bloc": len(last) if unanimous else max(Counter(last).values()),
        "adversary_values": [],
    }
    if len(honest) < len(roles):
        adversaries = [a for a, role in enumerate(roles) if role == "byzantine"]
        flags["adversary_values"] = [held[-1][a] for a in adversaries]
    if unanimous:
        flags["value"] = value
        flags["in_hull"] = _in_hull(value, inputs)
        flags["agreed_round"] = _agreed_since(held, honest)
    if stopped:
        outcome = _after_a_stop(
            value, inputs, honest, roles, held, proposed, exposed, rushing, flags
        )
        final = votes[-1]
        by_honest = sum([final[a] == "stop" for a in honest])
        flags["honest_stop_votes"] = by_honest
        flags["byzantine_stop_votes"] = list(final).count("stop") - by_honest
        flags["honest_quota"] = by_honest >= quota
    else:
        outcome = _after_the_deadline(value, inputs, honest, initial, held, thresholds, flags)
    return Verdict(outcome, flags, _properties(stopped, value, inputs))


def _in_hull(value: int | None, inputs: set[int]) -> bool:
    return value is not None and min(inputs) <= value <= max(inputs)


def _properties(stopped: bool, value: int | None, inputs: set[int]) -> Properties:
    return Properties(
        termination=stopped,
        agreement=value is not None,
        strong_validity=value in inputs,
        hull_validity=_in_hull(value, inputs),
        unanimity_validity=len(inputs) > 1 or value in inputs,
    )


def _agreed_since(held: Rows, honest: Sequence[int]) -> int:
    since, value = len(held), held[-1][honest[0]]
    while since > 1 and all(held[since - 2][a] == value for a in honest):
        since -= 1
    return since


def _after_a_stop(
    value: int | None,
    inputs: set[int],
    honest: Sequence[int],
    roles: Sequence[Role],
    held: Rows,
    proposed: Rows,
    exposed: Exposed | None,
    rushing: bool,
    flags: dict[str, Any],
) -> Outcome:
    if value is None:
        return Outcome.PREMATURE
    if value in inputs:
        return Outcome.VALID
    first = next(t for t, row in enumerate(held, 1) if any(row[a] == value for a in honest))
    flags["first_held"] = first
    holders = [a for a in honest if held[first - 1][a] == value]
    byzantine = [a for a, role in enumerate(roles) if role == "byzantine"]
    for t in range(first if rushing else first - 1):
        reached = exposed[t] if exposed else None
        said = {proposed[t][b] for b in byzantine}
        if any(value in (said if reached is None else reached[a]) for a in holders):
            return Outcome.INVALID_CAPTURED
    return Outcome.INVALID_FABRICATED


def _after_the_deadline(
    value: int | None,
    inputs: set[int],
    honest: Sequence[int],
    initial: Sequence[int | None],
    held: Rows,
    thresholds: Thresholds,
    flags: dict[str, Any],
) -> Outcome:
    if value is not None:
        flags["valid_value"] = value in inputs
        return Outcome.TIMEOUT_AGREED
    if flags["bloc"] >= math.ceil(Fraction(str(thresholds.near)) * len(honest)):
        return Outcome.TIMEOUT_NEAR
    vectors = [[row[a] for a in honest] for row in (initial, *held)]
    window = vectors[-thresholds.window - 1 :]
    flags["moves"] = sum(
        a != b
        for before, after in itertools.pairwise(window)
        for a, b in zip(before, after, strict=True)
    )
    if flags["moves"] <= 1:
        return Outcome.TIMEOUT_STALLED
    period = _period(vectors[1:], thresholds.max_period)
    flags["oscillating"] = period is not None
    if period is not None:
        flags["period"] = period
    return Outcome.TIMEOUT_MOVING


def _period(vectors: Sequence[Sequence[int | None]], longest: int) -> int | None:
    """Smallest period from 2 on whose block ends the game twice in a row; None: no such."""
    for period in range(2, longest + 1):
        block = vectors[-period:]
        if len(vectors) < 2 * period:
            return None
        if block == vectors[-2 * period : -period] and any(v != block[0] for v in block):
            return period
    return None
