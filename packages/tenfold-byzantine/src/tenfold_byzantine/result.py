"""What a finished game is: its outcome, its course, and what is counted about it.

Outcomes are decided by the engine from roles and values, never by a language model. The paper's
text and its figures group them differently; `GROUPINGS` has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tenfold_byzantine.contracts import Role, Vote


class Outcome(StrEnum):
    """How a game ended; exactly one holds (spec of the classification: `classify`)."""

    VALID = "VALID"
    INVALID_CAPTURED = "INVALID.captured"
    INVALID_FABRICATED = "INVALID.fabricated"
    PREMATURE = "PREMATURE"
    TIMEOUT_AGREED = "TIMEOUT.agreed"
    TIMEOUT_NEAR = "TIMEOUT.near"
    TIMEOUT_STALLED = "TIMEOUT.stalled"
    TIMEOUT_MOVING = "TIMEOUT.moving"
    ERROR_BACKEND = "ERROR.backend"

    @property
    def top(self) -> str:
        """`VALID`, `INVALID`, `PREMATURE`, `TIMEOUT` or `ERROR`."""
        return self.value.partition(".")[0]


GROUPINGS: Mapping[str, Mapping[str, str]] = {
    "full": {name: name.lower() for name in ("VALID", "INVALID", "PREMATURE", "TIMEOUT")},
    "paper-text": {
        "VALID": "valid",
        "INVALID": "invalid",
        "PREMATURE": "invalid",
        "TIMEOUT": "no consensus",
    },
    "paper-figures": {
        "VALID": "valid",
        "INVALID": "invalid",
        "PREMATURE": "no consensus",
        "TIMEOUT": "no consensus",
    },
}
"""Grouping → top-level outcome → label; games that ended in an error are in none."""


@dataclass(frozen=True, slots=True)
class Properties:
    """The classical properties, next to the outcome.

    Attributes:
        termination: ended by vote.
        agreement: honest agents hold one value at the end.
        strong_validity: agreement on an honest initial value (the paper's).
        hull_validity: agreement within the range of honest initial values.
        unanimity_validity: where all honest agents began with one value, they agreed on it.
    """

    termination: bool
    agreement: bool
    strong_validity: bool
    hull_validity: bool
    unanimity_validity: bool


@dataclass(frozen=True, slots=True)
class GameResult:
    """One finished game.

    Attributes:
        game_id: hash of settings, policies and seed.
        settings: the game's settings, as in a game file.
        seed: the game's seed.
        roles: per agent.
        initial: per agent; None for Byzantine ones.
        held: `[rounds][N]` value held after phase decide of each round.
        proposed: `[rounds][N]` value broadcast; None is silence.
        votes: `[rounds][N]`.
        stopped: ended by vote in the last round.
        outcome: see `Outcome`.
        flags: attributes of the outcome (`in_hull`, `period`, `bloc`, ...).
        properties: see `Properties`.
        metrics: the published formulas and ours, by name; None where undefined.
        counters: messages, calls, tokens, parse failures, retries, forced abstentions, clamps.
        error: what the backend said, for ERROR.backend.
        state_hash: SHA-256 of everything but times.
        timing: seconds that players' calls took, per phase; not part of equality or hashes.
    """

    game_id: str
    settings: Mapping[str, Any]
    seed: int
    roles: tuple[Role, ...]
    initial: tuple[int | None, ...]
    held: tuple[tuple[int | None, ...], ...]
    proposed: tuple[tuple[int | None, ...], ...]
    votes: tuple[tuple[Vote, ...], ...]
    stopped: bool
    outcome: Outcome
    flags: Mapping[str, Any] = field(default_factory=dict)
    properties: Properties | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    state_hash: str = ""
    timing: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def rounds(self) -> int:
        """Rounds played."""
        return len(self.held)

    @property
    def honest(self) -> list[int]:
        """Numbers of the honest agents."""
        return [i for i, role in enumerate(self.roles) if role == "honest"]
