"""How a language model plays: what it is shown, how it is asked, what counts as an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tenfold.errors import ConfigError, nearest

from tenfold_byzantine.rules import AWARENESS, Context

PHASES = ("decide", "vote")
VOTE_MODES = ("generate", "score")
OFFICIAL_RETRY_TEMPERATURE = 0.8
"""Of the published code's single-agent retries (spec, 2.9)."""


@dataclass(frozen=True)
class LanguageSettings:
    """Settings of a `LanguagePolicy`; defaults are the paper's (spec, 2.6-2.9).

    Attributes:
        awareness: preset of prompts instead of the game's; empty: the game's.
        context: what of the past is shown.
        temperature: per phase.
        max_new_tokens: per phase.
        attempts: most calls for one answer.
        same_temperature: further attempts are drawn like the first; otherwise at 0.8, as in the
            published code.
        vote_mode: `generate` a vote, or `score` the options: the vote is then drawn from the
            model's probabilities of the whole answers, which the record keeps.
        prompt_order: `paper`, or `shared`: agents are named last, so that all prompts of a phase
            begin alike and are read once. A measured variant, not for reproduction.
        prompts: version of the wording.
        bounds: send lengths and bounds with the schema; None: to local models, whose decoding
            is known to respect them.

    Raises:
        ConfigError: a value that is not allowed.
    """

    awareness: str = ""
    context: Context = field(default_factory=Context)
    temperature: Mapping[str, float] = field(default_factory=lambda: {"decide": 0.5, "vote": 0.3})
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: {"decide": 300, "vote": 200})
    attempts: int = 3
    same_temperature: bool = True
    vote_mode: str = "generate"
    prompt_order: str = "paper"
    prompts: str = "v1"
    bounds: bool | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("awareness", self.awareness, ("", *AWARENESS)),
            ("vote_mode", self.vote_mode, VOTE_MODES),
            ("prompt_order", self.prompt_order, ("paper", "shared")),
            ("context.history_order", self.context.history_order, ("newest_first", "append")),
        ):
            if value not in allowed:
                known = ", ".join(a for a in allowed if a)
                raise ConfigError(f"{name} is {value!r}{nearest(value, allowed)}; known: {known}")
        if self.attempts < 1:
            raise ConfigError(f"attempts is {self.attempts}; at least 1 is needed")
        for phase in PHASES:
            self._check_phase(phase)

    def _check_phase(self, phase: str) -> None:
        for name, table, least in (
            ("temperature", self.temperature, 0),
            ("max_new_tokens", self.max_new_tokens, 1),
        ):
            if phase not in table:
                raise ConfigError(f"{name} has no {phase!r}; it needs {', '.join(PHASES)}")
            if table[phase] < least:
                raise ConfigError(f"{name}.{phase} is {table[phase]}; it must be {least} or more")

    def temperature_of(self, phase: str, attempt: int) -> float:
        """The temperature of an attempt, counted from 0."""
        if attempt and not self.same_temperature:
            return OFFICIAL_RETRY_TEMPERATURE
        return float(self.temperature[phase])

    def to_json(self) -> dict[str, Any]:
        """All values, for hashes."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["context"] = {n: getattr(self.context, n) for n in Context.__dataclass_fields__}
        for name in ("temperature", "max_new_tokens"):
            plain[name] = dict(plain[name])
        return plain
