"""The event log of a game, `byz-events/1` (spec, 6.4).

One JSON object per line. A game in progress is written to `<game id>.jsonl.part`, flushed after
every phase, and renamed when it has its `game_end`; nothing finished is ever lost, and what a
killed game had is read back up to its last whole line. Times stand in objects named `timing` of
their own; everything else is the same in every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from tenfold.errors import ConfigError
from tenfold.files import disk_full_is_an_error

from tenfold_byzantine import __version__
from tenfold_byzantine.contracts import Attempt, Ballot, Message, Phase, Policy, Proposal, Vote
from tenfold_byzantine.result import GameResult, Properties

if TYPE_CHECKING:
    from tenfold_byzantine.engine import Game
    from tenfold_byzantine.mail import Delivered

SCHEMA = "byz-events/1"
KeepPrompts = Literal["full", "hash", "none"]
Event = Mapping[str, Any]


class EventSink(Protocol):
    """What a game tells about itself while it is played."""

    def start(self, game: Game) -> None:
        """The game begins."""
        ...

    def proposal(self, game: Game, round_: int, agent: int, proposal: Proposal) -> None:
        """An agent's answer to phase decide."""
        ...

    def delivered(self, game: Game, round_: int, messages: Sequence[Message]) -> None:
        """A round's messages, heard by everybody."""
        ...

    def delivered_apart(self, game: Game, round_: int, delivered: Delivered) -> None:
        """A round's messages where receivers do not all get the same."""
        ...

    def voted(self, game: Game, round_: int, agent: int, vote: Vote, ballot: Ballot | None) -> None:
        """An agent's vote; `ballot` where there is more to it."""
        ...

    def tallied(self, game: Game, round_: int, votes: Sequence[Vote], stop: bool) -> None:
        """All votes of a round are counted, and the round ends."""
        ...

    def end(self, game: Game, result: GameResult) -> None:
        """The game is finished."""
        ...

    def flush(self) -> None:
        """A phase is over: what came until now must survive the process."""
        ...

    def hold(self, held: bool) -> None:
        """While held, flushing waits: a resumed game repeats what its file already has."""
        ...


class EventWriter:
    """Makes the lines of the log; where they go is `write`'s business.

    Args:
        keep_prompts: `full` prompts, only their `hash`, or `none`.
    """

    def __init__(self, keep_prompts: KeepPrompts = "hash") -> None:
        if keep_prompts not in ("full", "hash", "none"):
            raise ConfigError(f"keep_prompts is {keep_prompts!r}; it must be full, hash or none")
        self._keep = keep_prompts
        self.lines: list[str] = []

    def add(self, event: str, **fields: Any) -> None:
        """One event."""
        self.lines.append(_encode({"event": event, **fields}))

    def start(self, game: Game) -> None:
        """`game_start`: the only event, with `game_end`, that says who is Byzantine."""
        distinct = {id(p): p for p in game.policies}
        numbers = {key: i for i, key in enumerate(distinct)}
        self.add(
            "game_start",
            schema=SCHEMA,
            game=game.game_id,
            seed=game.seed,
            version=__version__,
            settings=game.config.settings,
            roles=game.roles,
            initial=game.initial,
            policies=[_described(p) for p in distinct.values()],
            seats=[numbers[id(p)] for p in game.policies],
            keep_prompts=self._keep,
        )

    def proposal(self, game: Game, round_: int, agent: int, proposal: Proposal) -> None:
        """Calls and the `proposal` that came of them; fields that say nothing are left out."""
        if proposal.attempts:
            self._attempts(round_, "decide", agent, proposal.attempts)
        fields: dict[str, Any] = {"round": round_, "agent": agent, "value": proposal.value}
        if proposal.text:
            fields["text"] = proposal.text
        if proposal.note:
            fields["note"] = proposal.note
        if proposal.held is not None:
            fields["held"] = proposal.held
        if proposal.memory is not None:
            fields["memory"] = proposal.memory
        if proposal.payload is not None:
            fields["payload"] = proposal.payload
        if proposal.to:
            fields["to"] = [[r, *version] for r, version in sorted(proposal.to.items())]
        if proposal.withheld:
            fields["withheld"] = sorted(proposal.withheld)
        if proposal.forced:
            fields["forced"] = True
        if proposal.clamped:
            fields["clamped"] = True
        self.add("proposal", **fields)

    def delivered(self, game: Game, round_: int, messages: Sequence[Message]) -> None:
        """One `deliver` event per sender, heard by `all`."""
        for m in messages:
            self.add(
                "deliver",
                round=round_,
                sender=m.sender,
                receivers="all",
                sent_round=m.sent_round,
                value=m.value,
            )

    def delivered_apart(self, game: Game, round_: int, delivered: Delivered) -> None:
        """One `deliver` event per sender and version, with its receivers; `drop` where lost."""
        versions: dict[str, tuple[Message, list[int]]] = {}
        for receiver, m in delivered.arrivals:
            key = _encode([m.sender, m.sent_round, m.value, m.text, m.payload])
            versions.setdefault(key, (m, []))[1].append(receiver)
        for m, receivers in sorted(
            versions.values(), key=lambda pair: (pair[0].sender, pair[0].sent_round, pair[1])
        ):
            self.add(
                "deliver",
                round=round_,
                sender=m.sender,
                receivers=receivers,
                sent_round=m.sent_round,
                value=m.value,
            )
        for sender, receiver in sorted(delivered.lost):
            self.add("drop", round=round_, sender=sender, receiver=receiver)

    def voted(self, game: Game, round_: int, agent: int, vote: Vote, ballot: Ballot | None) -> None:
        """Calls and the `vote` that came of them."""
        fields: dict[str, Any] = {"round": round_, "agent": agent, "vote": vote}
        if ballot is not None:
            if ballot.attempts:
                self._attempts(round_, "vote", agent, ballot.attempts)
            if ballot.memory is not None:
                fields["memory"] = ballot.memory
            if ballot.forced:
                fields["forced"] = True
        self.add("vote", **fields)

    def tallied(self, game: Game, round_: int, votes: Sequence[Vote], stop: bool) -> None:
        """`tally` and `round_end`."""
        self.add(
            "tally",
            round=round_,
            stop=votes.count("stop"),
            quota=game.rules.quota,
            stopped=stop,
        )
        self.add(
            "round_end",
            round=round_,
            held=game.held_rows[round_ - 1],
            said=game.proposed_rows[round_ - 1],
            blocs=_blocs(game.held_rows[round_ - 1]),
            state=game.state_hashes[round_ - 1],
        )

    def end(self, game: Game, result: GameResult) -> None:
        """`game_end`."""
        self.add(
            "game_end",
            game=game.game_id,
            rounds=result.rounds,
            stopped=result.stopped,
            outcome=result.outcome.value,
            flags=dict(result.flags),
            properties=_properties(result.properties),
            metrics=dict(result.metrics),
            counters=dict(result.counters),
            roles=result.roles,
            error=result.error,
            state=result.state_hash,
        )

    def _attempts(self, round_: int, phase: Phase, agent: int, attempts: Sequence[Attempt]) -> None:
        where = {"round": round_, "phase": phase, "agent": agent}
        for number, attempt in enumerate(attempts, 1):
            request: dict[str, Any] = {**where, "attempt": number}
            if self._keep != "none":
                request["prompt_sha256"] = attempt.digest
            if self._keep == "full":
                request |= {"system": attempt.system, "user": attempt.user}
            self.add("request", **request)
            response: dict[str, Any] = {
                **where,
                "attempt": number,
                "text": attempt.text,
                "parsed": attempt.parsed,
                "tokens": attempt.tokens,
                "prompt_tokens": attempt.prompt_tokens,
            }
            if attempt.scores is not None:
                response["scores"] = dict(attempt.scores)
            if attempt.seconds:
                response["timing"] = {"ms": round(1000 * attempt.seconds, 3)}
            self.add("response", **response)
            if attempt.rejected:
                self.add("reject", **where, attempt=number, reason=attempt.rejected)

    def flush(self) -> None:
        """Nothing to do: the lines stay in memory."""

    def hold(self, held: bool) -> None:
        """Nothing to do."""


class EventLog(EventWriter):
    """A game's event file.

    Args:
        folder: where event files lie.
        game_id: names the file.
        keep_prompts: see `EventWriter`.
    """

    def __init__(self, folder: Path, game_id: str, keep_prompts: KeepPrompts = "hash") -> None:
        super().__init__(keep_prompts)
        self.path = folder / f"{game_id}.jsonl"
        self.part = part_of(self.path)
        self._file: TextIO | None = None
        self._ended = False
        self._named = False
        self._held = False

    def end(self, game: Game, result: GameResult) -> None:
        """`game_end`; the next flush gives the file its name."""
        super().end(game, result)
        self._ended = True

    def flush(self) -> None:
        """Writes what came since the last time; a finished game's file gets its name."""
        if self._held or self._named:
            return
        with disk_full_is_an_error(self.path):
            if self._file is None:
                self._open()
            else:
                self._write()
            if self._ended:
                self.close()
                self.part.replace(self.path)
                self._named = True

    def hold(self, held: bool) -> None:
        """While held, nothing is written; the end of it writes all that waited."""
        self._held = held
        if not held and self.lines:
            self.flush()

    def _open(self) -> None:
        if not self.part.exists():
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("w", encoding="ascii", newline="\n")
            self._write()
            return
        # Not over the file of a killed game, which is all that is left of it: beside it, and
        # renamed once as much as before is written.
        fresh = self.part.with_name(self.part.name + ".new")
        self._file = fresh.open("w", encoding="ascii", newline="\n")
        self._write()
        fresh.replace(self.part)

    def _write(self) -> None:
        assert self._file is not None
        self._file.write("".join(line + "\n" for line in self.lines))
        self._file.flush()
        self.lines = []

    def close(self) -> None:
        """Closes the file of a game that stops here; it can be resumed."""
        if self._file is not None:
            self._file.close()
            self._file = None


def part_of(path: Path) -> Path:
    """The file of a game that is not finished."""
    return path.with_name(path.name + ".part")


def read_events(path: Path, *, torn: bool = True) -> Iterator[dict[str, Any]]:
    """The events of a file.

    Args:
        path: an event file.
        torn: a last line that was cut off is left out; otherwise it is an error.

    Raises:
        ConfigError: no such file, another schema, or a damaged line, which is named by number.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no event file {path}") from None
    lines = data.split(b"\n")
    last = len(lines)
    for number, line in enumerate(lines, 1):
        if number == last and (torn or not line):
            return  # without its newline a line is not whole, even if it happens to parse
        event = _decode(path, number, line)
        if number == 1:
            _check_schema(path, event)
        yield event


def _decode(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"{path}, line {number}: damaged: {error}",
            hint="restore the file from a copy, or delete it and play the game again",
        ) from None
    if not isinstance(event, dict) or "event" not in event:
        raise ConfigError(f"{path}, line {number}: not an event: {line[:60]!r}")
    return event


def _check_schema(path: Path, event: Event) -> None:
    if event["event"] != "game_start" or event.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path}, line 1: it must be a game_start of schema {SCHEMA!r}, but is "
            f"{event['event']!r} of schema {event.get('schema')!r}"
        )


def _encode(value: Any) -> str:
    # ASCII: a model's text may hold what UTF-8 cannot encode.
    return _ENCODER.encode(value)


_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def _blocs(row: Sequence[int | None]) -> list[list[int]]:
    """`[value, agents that hold it]`, largest first, then smallest value."""
    counts: dict[int, int] = {}
    for value in row:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    return [[v, n] for v, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def _properties(properties: Properties | None) -> dict[str, bool] | None:
    if properties is None:
        return None
    return {f.name: getattr(properties, f.name) for f in fields(Properties)}


def _described(policy: Policy) -> dict[str, Any]:
    described: dict[str, Any] = {"label": policy.label, "powers": sorted(policy.powers)}
    identity = getattr(policy, "identity", None)
    return described if identity is None else {**described, "identity": identity}
