"""Schemas of answers, and what is accepted as one (spec, 2.8)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold_byzantine.contracts import Phase, Role, Rules, Vote

NOTE, VALUE, REASONING, DECISION = "internal_strategy", "value", "public_reasoning", "decision"
ABSTAIN = "abstain"
LEAST_NOTE, LEAST_REASONING = 3, 10
"""Fewest characters that are not blank of a note, and of public reasoning."""
MOST_NOTE, MOST_REASONING = 400, 600
"""Characters kept; asked for where a schema's lengths are sent."""
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How local models lay out JSON: without choices about blanks, a vote takes one pass."""


def options(role: Role) -> list[Vote]:
    """What an agent may vote."""
    return ["stop", "continue", "abstain"] if role == "byzantine" else ["stop", "continue"]


def schema(phase: Phase, role: Role, rules: Rules, *, bounds: bool) -> dict[str, Any]:
    """The JSON schema of an answer.

    Args:
        phase: what is asked.
        role: who is asked.
        rules: for the range of values.
        bounds: with lengths, limits and a fixed layout, for decoders that respect them.
    """
    if phase == "vote":
        return _object({DECISION: {"type": "string", "enum": options(role)}}, [DECISION], bounds)
    value: dict[str, Any] = {"type": "integer"}
    note: dict[str, Any] = {"type": "string"}
    reasoning: dict[str, Any] = {"type": "string"}
    if bounds:
        value |= {"minimum": rules.low, "maximum": rules.high}
        note |= {"minLength": LEAST_NOTE, "maxLength": MOST_NOTE}
        reasoning |= {"minLength": LEAST_REASONING, "maxLength": MOST_REASONING}
    required = [NOTE, VALUE, REASONING]
    if role == "byzantine":
        value = {"anyOf": [value, {"type": "string", "enum": [ABSTAIN]}]}
        required.remove(REASONING)
    return _object({NOTE: note, VALUE: value, REASONING: reasoning}, required, bounds)


def _object(properties: dict[str, Any], required: list[str], bounds: bool) -> dict[str, Any]:
    table = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return {**table, "x-guidance": LAYOUT} if bounds else table


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it was read.

    Attributes:
        parsed: the object, or None.
        rejected: why it is no answer; empty where it is one.
        value: the proposed value; None is an abstention.
        clamped: the value was outside the range.
        note, text: as they are kept.
        vote: the vote.
    """

    parsed: Mapping[str, Any] | None
    rejected: str = ""
    value: int | None = None
    clamped: bool = False
    note: str = ""
    text: str = ""
    vote: Vote = "continue"


def read(text: str, phase: Phase, role: Role, rules: Rules) -> Reply:
    """Reads what a model wrote: accepted, or rejected with the reason."""
    parsed = json_object(text)
    if parsed is None:
        return Reply(None, "no JSON object")
    return _vote(parsed, role) if phase == "vote" else _decision(parsed, role, rules)


def _vote(parsed: Mapping[str, Any], role: Role) -> Reply:
    said = parsed.get(DECISION)
    word = said.strip().lower() if isinstance(said, str) else said
    for option in options(role):
        if word == option:
            return Reply(parsed, vote=option)
    allowed = ", ".join(options(role))
    return Reply(parsed, f"{DECISION} is {_short(said)}; it must be one of {allowed}")


def _decision(parsed: Mapping[str, Any], role: Role, rules: Rules) -> Reply:
    note, reasoning = _text(parsed.get(NOTE)), _text(parsed.get(REASONING))
    silent = role == "byzantine" and _is_abstention(parsed.get(VALUE))
    value = None if silent else whole_number(parsed.get(VALUE))
    problem = ""
    if value is None and not silent:
        problem = f"{VALUE} is {_short(parsed.get(VALUE))}, no whole number"
    elif len(note.strip()) < LEAST_NOTE:
        problem = f"{NOTE} is empty or too short"
    elif len(reasoning.strip()) < LEAST_REASONING and (role == "honest" or reasoning.strip()):
        problem = f"{REASONING} is empty or too short"
    if problem:
        return Reply(parsed, problem)
    near = None if value is None else rules.clamp(value)
    kept = note.strip()[:MOST_NOTE], reasoning.strip()[:MOST_REASONING]
    return Reply(parsed, "", near, near != value, *kept)


def _is_abstention(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() == ABSTAIN


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return "missing" if value is None else shown[:60]


def whole_number(value: Any) -> int | None:
    """25, 25.0 and "25" are 25; None for everything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        digits = text[1:] if text[:1] in ("-", "+") else text
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
            return None
        return int(text)
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1e18 else None
    return value if isinstance(value, int) and abs(value) < 10**18 else None


def json_object(text: str) -> dict[str, Any] | None:
    """The first whole JSON object in a text; models without constraints write around it."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    tried = 0
    while start >= 0 and tried < 20:
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return _writable(value)
        start = text.find("{", start + 1)
        tried += 1
    return None


def _writable(value: Any) -> Any:
    """The same without halves of surrogates, which no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_writable(part) for part in value]
    if isinstance(value, dict):
        return {_writable(key): _writable(part) for key, part in value.items()}
    return value
