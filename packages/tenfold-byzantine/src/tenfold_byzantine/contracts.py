"""What passes between the game and its players.

The engine owns all state. In each phase it hands every active agent a `View`, which holds what
that agent may know and nothing else, and receives a `Proposal` (phase decide) or a `Ballot`
(phase vote). A `Policy` answers many views at once, of many seats and many games, so that a
language model sees one batch; it keeps no state between calls: what a seat must remember travels
in `View.memory`. A game is then a function of its settings, its seed and its policies' answers,
and a recorded game is replayed by a policy that reads the record.

Agents are numbered `0 ... N-1` and called `agent_0 ...` in texts. Values are integers in
`[low, high]`; None means silence. Rounds count from 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from tenfold_byzantine.quick import speed_up

Role = Literal["honest", "byzantine"]
Phase = Literal["decide", "vote"]
Vote = Literal["stop", "continue", "abstain"]

POWERS = frozenset({"equivocate", "rushing", "collude", "suppress"})
"""What a threat model may allow Byzantine agents beyond saying anything to everybody."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What every agent is told about the game (no role, no seed).

    Attributes:
        agents: N.
        faults: the number of Byzantine agents that algorithms are configured for; prompts never
            mention it.
        low: smallest value.
        high: largest value.
        max_rounds: deadline.
        quota: stop votes that end the game, over all N agents.
        awareness: preset of prompts, e.g. `may_exist` or `none_exist`.
        powers: what the threat model allows (subset of `POWERS`).
        complete: every agent hears every other without delay or loss.
    """

    agents: int
    faults: int
    low: int
    high: int
    max_rounds: int
    quota: int
    awareness: str = "may_exist"
    powers: frozenset[str] = frozenset()
    complete: bool = True

    def clamp(self, value: float) -> int:
        """The nearest allowed integer, halves rounded up."""
        return min(max(math.floor(value + 0.5), self.low), self.high)


@dataclass(frozen=True, slots=True)
class Message:
    """What one agent said, as one receiver got it.

    `payload` carries what algorithms with richer messages relay (JSON-able); language models
    neither write nor see it.
    """

    sender: int
    sent_round: int
    value: int | None
    text: str = ""
    payload: Any = None


@dataclass(frozen=True, slots=True)
class RoundLine:
    """A finished round as one agent heard it: messages by sender, silent senders left out."""

    round: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class View:
    """All that one agent knows when it must answer.

    Attributes:
        rules: the public rules.
        agent: the agent's own number.
        role: its own role; nobody else's.
        round: the current round, from 1.
        phase: what is asked.
        initial: own initial value; None for Byzantine agents.
        held: the value it holds now; None before a Byzantine agent has one.
        neighbours: agents that it hears, in order, without itself.
        inbox: the newest message of every sender heard so far, by sender, its own included.
            In phase vote that is this round's; in phase decide what came until the last round,
            empty in round 1.
        history: round lines, oldest first, as many as are stored.
        notes: its own private notes `(round, text)`, oldest first.
        memory: what its policy returned last (JSON-able); None at first.
        key: names this question: game, agent, round and phase, hashed with the seed.
        overheard: with the power rushing, this round's honest messages (Byzantine agents, phase
            decide); otherwise empty.
        allies: with the power collude, the other Byzantine agents' numbers; otherwise empty.
        ally_notes: with the power collude, their private notes `(agent, round, text)`.
    """

    rules: Rules
    agent: int
    role: Role
    round: int
    phase: Phase
    initial: int | None
    held: int | None
    neighbours: tuple[int, ...]
    inbox: tuple[Message, ...]
    history: Sequence[RoundLine]
    notes: Sequence[tuple[int, str]]
    memory: Any
    key: str
    overheard: tuple[Message, ...] = ()
    allies: tuple[int, ...] = ()
    ally_notes: tuple[tuple[int, int, str], ...] = ()

    @property
    def name(self) -> str:
        """The agent's name in texts."""
        return agent_name(self.agent)

    def values(self) -> list[int]:
        """Values heard (own included), by sender; silence left out."""
        return [m.value for m in self.inbox if m.value is not None]

    def draws(self, *labels: object) -> random.Random:
        """Random numbers of this question and these labels; equal questions draw equal ones."""
        text = "\x1f".join((self.key, *map(str, labels)))
        return random.Random(hashlib.sha256(text.encode()).digest())


def agent_name(agent: int) -> str:
    """`agent_3`; says nothing about the role."""
    return f"agent_{agent}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of a language model on the way to an answer, for the event log.

    Attributes:
        system: system prompt.
        user: user prompt.
        text: what came back.
        parsed: the object read from it, or None.
        rejected: why it was not accepted; empty when it was.
        tokens: tokens written.
        prompt_tokens: tokens read, 0 when unknown.
        seconds: its share of the call's wall time; never part of the state hash.
        scores: probability per option, for votes that were scored.
        prompt_hash: stands for the prompts where a record does not keep them.
    """

    system: str
    user: str
    text: str
    parsed: Mapping[str, Any] | None
    rejected: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] | None = None
    prompt_hash: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts."""
        if self.prompt_hash:
            return self.prompt_hash
        text = f"{self.system}\x1e{self.user}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Proposal:
    """Answer to phase decide.

    Attributes:
        value: what is said to everybody; None is silence (abstention).
        text: public reasoning.
        note: private note for the agent's own next rounds.
        held: the value the agent holds afterwards; None means `value` (or, for silence, what it
            held before). Algorithms whose messages are not their values use it.
        memory: replaces `View.memory`.
        payload: see `Message`.
        to: with the power equivocate, other `(value, text)` for some receivers.
        withheld: with the power suppress, senders whose messages the agent does not pass on.
        attempts: calls made, in order.
        forced: the agent said nothing usable and the abstention is the engine's.
        clamped: a value outside the range was moved to its edge.
    """

    value: int | None
    text: str = ""
    note: str = ""
    held: int | None = None
    memory: Any = None
    payload: Any = None
    to: Mapping[int, tuple[int | None, str]] = field(default_factory=dict)
    withheld: tuple[int, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    forced: bool = False
    clamped: bool = False


@dataclass(frozen=True, slots=True)
class Ballot:
    """Answer to phase vote; `memory` replaces `View.memory` unless it is None."""

    vote: Vote
    memory: Any = None
    attempts: tuple[Attempt, ...] = ()
    forced: bool = False


for _record in (Message, RoundLine, View, Proposal, Ballot):
    speed_up(_record)


@runtime_checkable
class Policy(Protocol):
    """How agents behave: a scripted rule, an algorithm, an adversary or a language model."""

    @property
    def label(self) -> str:
        """Name with its parameters, as in a game file, e.g. `dlpsw:f=2`; part of the game id."""
        ...

    @property
    def powers(self) -> frozenset[str]:
        """Powers that it needs of the threat model (subset of `POWERS`)."""
        ...

    def check(self, rules: Rules) -> None:
        """Raises ConfigError where the rules are outside of what it is proven or made for."""
        ...

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """One proposal per view, a function of that view alone."""
        ...

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """One ballot per view, a function of that view alone."""
        ...
