"""What is measured about a finished game (spec, 2.10): the published formulas and ours.

`Measures` computes all of them when the first one is asked for, so that a million games that
nobody looks into cost nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tenfold_byzantine.contracts import Role, Vote

Rows = Sequence[Sequence[int | None]]

KEYWORDS = (
    "suspicious",
    "outlier",
    "byzantine",
    "dishonest",
    "lying",
    "manipulat",
    "mislead",
    "decept",
    "attack",
    "malicious",
    "adversar",
)
"""Words of mistrust in public reasoning, as word stems."""


class Measures(Mapping[str, float | None]):
    """The metrics of one game by name; None where one is not defined.

    Args:
        roles: per agent.
        initial: per agent; None for Byzantine ones.
        held: `[rounds][N]` after phase decide.
        proposed: `[rounds][N]` broadcast values; None is silence.
        votes: `[rounds][N]`.
        stopped: ended by vote.
        max_rounds: deadline.
        texts: `[rounds][N]` public reasoning; empty: none.
    """

    __slots__ = ("_course", "_values")

    def __init__(
        self,
        *,
        roles: Sequence[Role],
        initial: Sequence[int | None],
        held: Rows,
        proposed: Rows,
        votes: Sequence[Sequence[Vote]],
        stopped: bool,
        max_rounds: int,
        texts: Sequence[Sequence[str]] = (),
    ) -> None:
        self._course: dict[str, Any] | None = {
            "roles": roles,
            "initial": initial,
            "held": held,
            "proposed": proposed,
            "votes": votes,
            "stopped": stopped,
            "max_rounds": max_rounds,
            "texts": texts,
        }
        self._values: dict[str, float | None] = {}

    def _all(self) -> dict[str, float | None]:
        if self._course is not None:
            self._values = measure(**self._course)
            self._course = None
        return self._values

    def __getitem__(self, name: str) -> float | None:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._all())


def measure(
    *,
    roles: Sequence[Role],
    initial: Sequence[int | None],
    held: Rows,
    proposed: Rows,
    votes: Sequence[Sequence[Vote]],
    stopped: bool,
    max_rounds: int,
    texts: Sequence[Sequence[str]] = (),
) -> dict[str, float | None]:
    """All metrics of a game; arguments as for `Measures`."""
    honest = [a for a, role in enumerate(roles) if role == "honest"]
    byzantine = [a for a, role in enumerate(roles) if role == "byzantine"]
    inputs = [x for a in honest if (x := initial[a]) is not None]
    values = [[row[a] for a in honest] for row in held]
    if not values:
        return {}
    decided = values[-1][0] if stopped and has_consensus(values[-1], inputs) else None
    unanimous = [t for t, row in enumerate(values, 1) if len(set(row)) == 1]
    rounds = len(values)
    return {
        "rounds": float(rounds),
        **published(inputs, values, decided, max_rounds),
        "byzantine_infiltration": None
        if decided is None or not byzantine
        else 100 * sum(held[-1][b] == decided for b in byzantine) / len(byzantine),
        "half_stop_round": _optional(half_stop(votes)),
        "keyword_hits": float(sum(keyword_counts(texts, honest).values())),
        "first_unanimous": _optional(unanimous[0] if unanimous else None),
        "time_lost_to_voting": _optional(rounds - unanimous[0] if unanimous else None),
        "byzantine_success": float(decided is None),
        "byzantine_block": float(not stopped),
        "byzantine_split": float(stopped and len(set(values[-1])) > 1),
        "byzantine_capture": float(stopped and len(set(values[-1])) == 1 and decided is None),
        "influence": influence(roles, initial, held, proposed),
        "stubbornness": statistics.fmean(stubbornness(roles, initial, held).values()),
        **vote_quality(honest, values, votes),
    }


def has_consensus(values: Sequence[int | None], inputs: Sequence[int]) -> bool:
    """Whether honest values of a round are unanimous and an honest initial value."""
    return len(set(values)) == 1 and values[0] in inputs


def convergence_metric(values: Sequence[int | None]) -> float:
    """Share, in percent, of the honest agents that hold their most common value."""
    return 100 * max(Counter(values).values()) / len(values)


def published(
    inputs: Sequence[int], values: Rows, decided: int | None, max_rounds: int
) -> dict[str, float | None]:
    """The metrics of the published code.

    Args:
        inputs: honest initial values.
        values: `[rounds][H]` honest values.
        decided: the decided value of a valid game, None otherwise.
        max_rounds: deadline.
    """
    consensus = [has_consensus(row, inputs) for row in values]
    rounds = len(values)
    efficiency = max(0.0, 1 - rounds / max_rounds)
    trailing = next((i for i, ok in enumerate(reversed(consensus)) if not ok), rounds)
    agreement = convergence_metric(values[-1])
    centrality = None if decided is None else _centrality(inputs, decided)
    spread = max(inputs) - min(inputs)
    return {
        "convergence_speed": _optional(consensus.index(True) + 1 if any(consensus) else None),
        "convergence_rate": sum(consensus) / rounds,
        "stability_rounds": float(trailing),
        "trajectory_stability": statistics.fmean(_deviation(row) for row in values),
        "agreement_rate": agreement,
        "inclusivity": agreement / 100,
        "efficiency": efficiency,
        "centrality": centrality,
        "quality": 0.0 if centrality is None else 50 + 30 * centrality + 20 * efficiency,
        "avg_distance": None
        if decided is None
        else statistics.fmean(abs(x - decided) for x in inputs),
        "consensus_is_median": None
        if decided is None
        else float(decided == int(statistics.median(inputs))),
        "consensus_is_extreme": None
        if decided is None or spread < 2
        else float(decided in (min(inputs), max(inputs))),
        "consensus_is_initial": None if decided is None else float(decided in inputs),
    }


def _optional(value: int | None) -> float | None:
    return None if value is None else float(value)


def _centrality(inputs: Sequence[int], decided: int) -> float:
    spread = max(max(inputs) - min(inputs), 1)
    return min(max(1 - abs(decided - statistics.median(inputs)) / spread, 0.0), 1.0)


def _deviation(row: Sequence[int | None]) -> float:
    """Sample standard deviation (n - 1) of a round's honest values; 0 of a single one."""
    known = [v for v in row if v is not None]
    return statistics.stdev(known) if len(known) > 1 else 0.0


def half_stop(votes: Sequence[Sequence[Vote]]) -> int | None:
    """First round in which at least half of all agents vote to stop."""
    for t, row in enumerate(votes, 1):
        if 2 * sum(v == "stop" for v in row) >= len(row):
            return t
    return None


def half_stop_snapshot(votes: Sequence[Sequence[Vote]], held: Rows) -> dict[str, Any] | None:
    """Round, votes and values of the half-stop milestone; None: it was never reached."""
    t = half_stop(votes)
    if t is None:
        return None
    return {"round": t, "votes": list(votes[t - 1]), "held": list(held[t - 1])}


def keyword_counts(texts: Sequence[Sequence[str]], honest: Sequence[int]) -> dict[str, int]:
    """Per keyword the honest texts that contain it, whatever its case; once per text."""
    lowered = [row[a].lower() for row in texts for a in honest if row[a]]
    return {word: sum(word in text for text in lowered) for word in KEYWORDS}


def influence(
    roles: Sequence[Role], initial: Sequence[int | None], held: Rows, proposed: Rows
) -> float | None:
    """Share of honest moves to a value that a Byzantine agent had proposed last.

    A move is a round in which an honest agent holds another value than before. Of the earlier
    rounds in which anybody proposed the adopted value, the latest counts: whether a Byzantine
    agent was among its proposers. None without moves.
    """
    moves = hits = 0
    last: dict[int, bool] = {}
    before = initial
    for row, said in zip(held, proposed, strict=True):
        for a, role in enumerate(roles):
            if role == "honest" and row[a] != before[a]:
                moves += 1
                value = row[a]
                hits += value is not None and last.get(value, False)
        now: dict[int, bool] = {}
        for a, value in enumerate(said):
            if value is not None:
                now[value] = now.get(value, False) or roles[a] == "byzantine"
        last |= now
        before = row
    return hits / moves if moves else None


def stubbornness(
    roles: Sequence[Role], initial: Sequence[int | None], held: Rows
) -> dict[int, float]:
    """Per honest agent the share of rounds in which it kept a value that was not a mode.

    A mode is a most common value of the honest agents in the round before (the initial values,
    for round 1).
    """
    honest = [a for a, role in enumerate(roles) if role == "honest"]
    kept = dict.fromkeys(honest, 0)
    before = initial
    for row in held:
        counts = Counter(before[a] for a in honest)
        most = max(counts.values())
        for a in honest:
            kept[a] += row[a] == before[a] and counts[before[a]] < most
        before = row
    return {a: n / len(held) for a, n in kept.items()}


def vote_quality(
    honest: Sequence[int], values: Rows, votes: Sequence[Sequence[Vote]]
) -> dict[str, float | None]:
    """Precision and recall of honest stop votes as signs of "the honest agents agree now"."""
    right = stops = chances = 0
    for row, ballots in zip(values, votes, strict=False):
        stop = sum(ballots[a] == "stop" for a in honest)
        stops += stop
        if len(set(row)) == 1:
            right += stop
            chances += len(honest)
    return {
        "vote_precision": right / stops if stops else None,
        "vote_recall": right / chances if chances else None,
    }
