"""A recorded game, read back from its event log: who said what, held what and voted how.

The course is rebuilt from the events alone, without playing the game again (`replay` does that).
Prompts and answers are shown where the log kept them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError
from tenfold.report import Block, Details, Heading, Preformatted, Table

from tenfold_byzantine.contracts import agent_name
from tenfold_byzantine.events import read_events
from tenfold_byzantine.result import GameResult, Outcome, Properties

_CUT_OFF: Mapping[str, Any] = {
    "outcome": "ERROR.backend",
    "error": "the game was cut off",
    "stopped": False,
}
MOST_CALLS = 400
"""Calls of a game whose prompts and answers a report shows."""


@dataclass(slots=True)
class Call:
    """One call of a language model.

    Attributes:
        round: from 1.
        phase: decide or vote.
        agent: its number.
        attempt: from 1.
        request: the event: prompt hash, prompts where they were kept.
        response: the event: text, parsed object, tokens; empty where it is missing.
        rejected: why the answer was not accepted.
    """

    round: int
    phase: str
    agent: int
    attempt: int
    request: Mapping[str, Any] = field(default_factory=dict)
    response: Mapping[str, Any] = field(default_factory=dict)
    rejected: str = ""


@dataclass(slots=True)
class Transcript:
    """A recorded game.

    Attributes:
        result: the game; of one that was cut off, what there is of it, with `error` saying so.
        policies: label per agent.
        texts: `[rounds][N]` public reasoning, empty where there was none.
        notes: `[rounds][N]` private notes.
        forced: `(round, agent)` of abstentions that the engine put in.
        calls: all calls in order.
        complete: whether the log has its end.
    """

    result: GameResult
    policies: list[str]
    texts: list[list[str]]
    notes: list[list[str]]
    forced: set[tuple[int, int]]
    calls: list[Call]
    complete: bool

    def calls_of(self, agent: int | None = None, round_: int | None = None) -> list[Call]:
        """The calls of an agent, of a round, or both."""
        return [c for c in self.calls if agent in (None, c.agent) and round_ in (None, c.round)]


def read_transcript(path: Path) -> Transcript:
    """Reads an event file; a torn last line is left out.

    Raises:
        ConfigError: no such file, another schema, or a damaged line, named by its number.
    """
    start: Mapping[str, Any] = {}
    end: Mapping[str, Any] | None = None
    reader = _Reader()
    for event in read_events(path):
        kind = event["event"]
        if kind == "game_start":
            start = event
            reader.start(len(event["roles"]))
        elif kind == "game_end":
            end = event
        else:
            reader.take(event)
    if not start:
        raise ConfigError(f"{path} holds no game: it is empty")
    labels = [start["policies"][i]["label"] for i in start["seats"]]
    return Transcript(
        _result(start, end, reader),
        labels,
        reader.texts,
        reader.notes,
        reader.forced,
        list(reader.calls.values()),
        end is not None,
    )


class _Reader:
    """Collects events by round."""

    def __init__(self) -> None:
        self.agents = 0
        self.held: list[tuple[int | None, ...]] = []
        self.proposed: list[list[int | None]] = []
        self.votes: list[list[Any]] = []
        self.texts: list[list[str]] = []
        self.notes: list[list[str]] = []
        self.forced: set[tuple[int, int]] = set()
        self.calls: dict[tuple[int, str, int, int], Call] = {}

    def start(self, agents: int) -> None:
        self.agents = agents

    def take(self, event: Mapping[str, Any]) -> None:
        """One event between start and end; kinds that a transcript does not show are skipped."""
        take = getattr(self, f"_{event['event']}", None)
        if take is not None:
            take(event, event["round"] - 1)

    def _grow(self, t: int) -> None:
        while len(self.proposed) <= t:
            self.proposed.append([None] * self.agents)
            self.texts.append([""] * self.agents)
            self.notes.append([""] * self.agents)
            self.votes.append(["continue"] * self.agents)

    def _proposal(self, event: Mapping[str, Any], t: int) -> None:
        self._grow(t)
        agent = event["agent"]
        self.proposed[t][agent] = event["value"]
        self.texts[t][agent] = event.get("text", "")
        self.notes[t][agent] = event.get("note", "")
        if event.get("forced"):
            self.forced.add((t + 1, agent))

    def _deliver(self, event: Mapping[str, Any], t: int) -> None:
        # An agent that repeats itself when it has nothing to say is heard, though it did not speak.
        sent = event["sent_round"] - 1
        self._grow(sent)
        if self.proposed[sent][event["sender"]] is None:
            self.proposed[sent][event["sender"]] = event["value"]

    def _vote(self, event: Mapping[str, Any], t: int) -> None:
        self._grow(t)
        self.votes[t][event["agent"]] = event["vote"]

    def _round_end(self, event: Mapping[str, Any], t: int) -> None:
        self.held.append(tuple(event["held"]))

    def _call(self, event: Mapping[str, Any]) -> Call:
        key = (event["round"], event["phase"], event["agent"], event["attempt"])
        return self.calls.setdefault(key, Call(*key))

    def _request(self, event: Mapping[str, Any], t: int) -> None:
        self._call(event).request = event

    def _response(self, event: Mapping[str, Any], t: int) -> None:
        self._call(event).response = event

    def _reject(self, event: Mapping[str, Any], t: int) -> None:
        self._call(event).rejected = event["reason"]


def _result(start: Mapping[str, Any], end: Mapping[str, Any] | None, reader: _Reader) -> GameResult:
    rounds = len(reader.held)
    last = end or _CUT_OFF
    properties = last.get("properties")
    return GameResult(
        game_id=start["game"],
        settings=start["settings"],
        seed=start["seed"],
        roles=tuple(start["roles"]),
        initial=tuple(start["initial"]),
        held=tuple(reader.held),
        proposed=tuple(tuple(row) for row in reader.proposed[:rounds]),
        votes=tuple(tuple(row) for row in reader.votes[:rounds]),
        stopped=last["stopped"],
        outcome=Outcome(last["outcome"]),
        flags=last.get("flags", {}),
        properties=None if properties is None else Properties(**properties),
        metrics=last.get("metrics", {}),
        counters=last.get("counters", {}),
        error=last.get("error", ""),
        state_hash=last.get("state", ""),
    )


def round_line(transcript: Transcript, round_: int) -> str:
    """A round in one line: blocs of honest values, then votes."""
    result = transcript.result
    held = Counter(result.held[round_ - 1][a] for a in result.honest)
    blocs = ", ".join(f"{n} hold {'–' if v is None else v}" for v, n in _by_size(held))
    votes = Counter(result.votes[round_ - 1])
    shown = ", ".join(f"{votes[v]} {v}" for v in ("stop", "continue", "abstain") if votes[v])
    return f"Round {round_}: {blocs}; votes: {shown}"


def _by_size(counts: Counter[int | None]) -> list[tuple[int | None, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0] is None, pair[0] or 0))


def transcript_blocks(transcript: Transcript, *, calls: bool = True) -> Iterator[Block]:
    """Round after round, folded: a table of all agents, and their calls where there were any."""
    yield Heading("Round by round", 3)
    left = MOST_CALLS
    for t in range(transcript.result.rounds):
        blocks: list[Block] = [_round_table(transcript, t)]
        made = transcript.calls_of(round_=t + 1) if calls else []
        blocks += [_call_block(call) for call in made[: max(left, 0)]]
        left -= len(made)
        yield Details(round_line(transcript, t + 1), blocks)
    if left < 0:
        yield Details(f"{-left} more calls are in the event log", [])


def _round_table(transcript: Transcript, t: int) -> Table:
    result, rows = transcript.result, []
    for agent, role in enumerate(result.roles):
        said = result.proposed[t][agent]
        forced = " (gave no usable answer)" if (t + 1, agent) in transcript.forced else ""
        rows.append(
            [
                agent_name(agent),
                role,
                transcript.policies[agent],
                ("silent" if said is None else str(said)) + forced,
                result.held[t][agent],
                result.votes[t][agent],
                transcript.texts[t][agent],
                transcript.notes[t][agent],
            ]
        )
    columns = ["agent", "role", "plays", "says", "holds", "vote", "public reasoning", "note"]
    spoken = [i for i in range(8) if i < 6 or any(row[i] for row in rows)]
    return Table([columns[i] for i in spoken], [[row[i] for i in spoken] for row in rows])


def _call_block(call: Call) -> Details:
    title = f"{agent_name(call.agent)}, {call.phase}, attempt {call.attempt}"
    if call.rejected:
        title += f": rejected, {call.rejected}"
    blocks: list[Block] = []
    for name in ("system", "user"):
        if text := call.request.get(name):
            blocks.append(Preformatted(text, f"{name} prompt"))
    blocks.append(Preformatted(str(call.response.get("text", "")), "answer"))
    if scores := call.response.get("scores"):
        blocks.append(Table(["vote", "probability"], [[k, v] for k, v in sorted(scores.items())]))
    return Details(title, blocks)
