"""A recorded game played again by the engine (spec, 6.2, 7.2).

`replay` rebuilds the game from its record and lets the engine run on the recorded answers: values
held, votes, state hash of every round, outcome and metrics must come out the same. `Record` also
lets a killed game go on: it answers what was answered before, so that no call is made twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError, TenfoldError

from tenfold_byzantine.cast import Cast, Players
from tenfold_byzantine.contracts import (
    Attempt,
    Ballot,
    Policy,
    Proposal,
    Role,
    Rules,
    View,
    Vote,
)
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog, EventSink, KeepPrompts, part_of, read_events
from tenfold_byzantine.result import GameResult, Outcome, Properties
from tenfold_byzantine.rules import GameConfig

Question = tuple[int, str, int]
"""Round, phase, agent."""


class ReplayMismatch(TenfoldError):
    """A record whose game comes out differently when it is played again."""


class RecordEnds(ConfigError):
    """A record has no answer to a question: the game was not played that far."""


@dataclass(frozen=True)
class RecordedPolicy:
    """A policy that reads its answers from a record.

    It is as if it were the recorded one: same label, powers and identity, so that the game keeps
    its id.
    """

    label: str
    powers: frozenset[str]
    identity: Any
    answers: Mapping[Question, Proposal | Ballot]

    def check(self, rules: Rules) -> None:
        """The recorded policy was checked when it played."""

    def decide_many(self, views: Sequence[View]) -> list[Any]:
        """The recorded proposals."""
        return [self._answer(view) for view in views]

    def vote_many(self, views: Sequence[View]) -> list[Any]:
        """The recorded ballots."""
        return [self._answer(view) for view in views]

    def _answer(self, view: View) -> Proposal | Ballot:
        try:
            return self.answers[view.round, view.phase, view.agent]
        except KeyError:
            raise RecordEnds(
                f"the record has no answer of {view.name} in round {view.round}, phase {view.phase}"
            ) from None


class Record:
    """What an event file says about a game, finished or not.

    Args:
        path: the event file; a finished game's last line must be whole, a torn one in a
            `.part` file is left out.

    Raises:
        ConfigError: no such file, or a damaged line, which is named by number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start: Mapping[str, Any] = {}
        self.end: Mapping[str, Any] | None = None
        self.rounds: list[Mapping[str, Any]] = []
        self.answers: dict[Question, Proposal | Ballot] = {}
        self.votes: dict[tuple[int, int], Vote] = {}
        attempts: dict[Question, list[dict[str, Any]]] = {}
        for event in read_events(path, torn=path.name.endswith(".part")):
            match event["event"]:
                case "game_start":
                    self.start = event
                case "request":
                    attempts.setdefault(_question(event), []).append({"request": event})
                case "response" | "reject":
                    attempts[_question(event)][-1][event["event"]] = event
                case "proposal":
                    key = (event["round"], "decide", event["agent"])
                    self.answers[key] = _proposal(event, attempts.pop(key, []))
                case "vote":
                    key = (event["round"], "vote", event["agent"])
                    self.answers[key] = _ballot(event, attempts.pop(key, []))
                    self.votes[event["round"], event["agent"]] = event["vote"]
                case "round_end":
                    self.rounds.append(event)
                case "game_end":
                    self.end = event
        if not self.start:
            raise ConfigError(f"{path} has no whole line", hint="delete it and play the game again")

    @property
    def config(self) -> GameConfig:
        """The game's settings, with the seed that it was played with."""
        config = GameConfig.from_table(self.start["settings"], source=str(self.path))
        return config.with_seed(self.start["seed"])

    def policies(self) -> dict[Role, Players]:
        """The recorded players, one policy for each that played."""
        known = [
            RecordedPolicy(p["label"], frozenset(p["powers"]), p.get("identity"), self.answers)
            for p in self.start["policies"]
        ]
        seats: dict[Role, list[tuple[int, Policy]]] = {"honest": [], "byzantine": []}
        # Groups sit in the order in which they are dealt, which is not that of the agents.
        for role, numbers in self._dealt().items():
            seats[role] = [(1, known[self.start["seats"][agent]]) for agent in numbers]
        return {role: players for role, players in seats.items() if players}

    def _dealt(self) -> dict[Role, Sequence[int]]:
        config = self.config
        byzantine, honest = Game.dealt(config, config.seed)
        return {"honest": honest, "byzantine": byzantine}

    def game(self, log: EventSink | None = None) -> Game:
        """The game at its beginning, with recorded players."""
        config = self.config
        return Game(config, Cast(config, self.policies()), config.seed, log=log)

    def result(self) -> GameResult:
        """The result as recorded, without playing.

        Raises:
            ConfigError: the game is not finished.
        """
        if self.end is None:
            raise ConfigError(f"{self.path}: the game is not finished; it has no game_end")
        rounds, agents = self.end["rounds"], range(len(self.start["roles"]))
        votes = self.votes
        properties = self.end["properties"]
        return GameResult(
            game_id=self.start["game"],
            settings=self.start["settings"],
            seed=self.start["seed"],
            roles=tuple(self.start["roles"]),
            initial=tuple(self.start["initial"]),
            held=tuple(tuple(event["held"]) for event in self.rounds[:rounds]),
            proposed=tuple(tuple(event["said"]) for event in self.rounds[:rounds]),
            votes=tuple(tuple(votes[t, a] for a in agents) for t in range(1, rounds + 1)),
            stopped=self.end["stopped"],
            outcome=Outcome(self.end["outcome"]),
            flags=self.end["flags"],
            properties=None if properties is None else Properties(**properties),
            metrics=self.end["metrics"],
            counters=self.end["counters"],
            error=self.end["error"],
            state_hash=self.end["state"],
        )


def replay(path: Path | str) -> GameResult:
    """Plays a recorded game again and compares it with its record, round by round.

    Raises:
        ReplayMismatch: something came out differently; it names the first difference.
        ConfigError: the file is damaged, or the game is not finished.
    """
    record = Record(Path(path))
    if record.end is None:
        raise ConfigError(
            f"{path}: the game is not finished; it has no game_end",
            hint="resume it first: play it again into the same folder",
        )
    game = record.game()
    where = f"{path}: game {record.start['game']}"
    _compare(where, "game", record.start["game"], game.game_id)
    _compare(where, "roles", record.start["roles"], list(game.roles))
    _compare(where, "initial values", record.start["initial"], list(game.initial))
    while not game.finished:
        rounds = len(game.state_hashes)
        answers = _recorded(record, game)
        if answers is None and record.end["error"]:
            game.fail(record.end["error"])
            break
        if answers is None:
            raise ReplayMismatch(
                f"{where}: the record has no more answers, but the game goes on in round "
                f"{game.round}"
            )
        game.submit(answers)
        if len(game.state_hashes) > rounds:
            _compare_round(where, record, game, rounds)
    result = game.result()
    _compare(where, "rounds", len(record.rounds), result.rounds)
    for name, value in (
        ("outcome", result.outcome.value),
        ("stopped", result.stopped),
        ("counters", dict(result.counters)),
        ("metrics", dict(result.metrics)),
        ("flags", dict(result.flags)),
        ("state", result.state_hash),
    ):
        _compare(where, name, record.end[name], value)
    return result


def _compare_round(where: str, record: Record, game: Game, index: int) -> None:
    if index >= len(record.rounds):
        raise ReplayMismatch(f"{where}: the record ends before round {index + 1}")
    recorded = record.rounds[index]
    for name, value in (
        ("held", list(game.held_rows[index])),
        ("said", list(game.proposed_rows[index])),
        ("state", game.state_hashes[index]),
    ):
        _compare(f"{where}, round {index + 1}", name, recorded[name], value)


def _compare(where: str, what: str, recorded: Any, replayed: Any) -> None:
    if recorded != replayed:
        raise ReplayMismatch(
            f"{where}: {what} differs: recorded {recorded!r}, replayed {replayed!r}",
            hint="the record was changed, or this version of the engine behaves differently",
        )


def resume(game: Game, path: Path) -> int:
    """Lets a game go on from the record of a killed one.

    Args:
        game: the game at its beginning.
        path: its event file; what counts is the `.part` file of a game that was killed, and
            otherwise the file itself, of a game that died of an error or is over. Without either
            nothing happens.

    Returns:
        How many phases were taken from the record.

    Raises:
        ConfigError: the record is damaged or is another game's.
    """
    part = part_of(path)
    if part.exists() and b"\n" in part.read_bytes():
        record = Record(part)
    elif path.exists() and (record := Record(path)).end is not None:
        part = path
    else:
        return 0
    if record.start["game"] != game.game_id:
        raise ConfigError(
            f"{part} is the record of game {record.start['game']}, not of {game.game_id}",
            hint="its settings or players have changed; move the file away",
        )
    phases = 0
    with game.held_log():
        while not game.finished and (answers := _recorded(record, game)) is not None:
            game.submit(answers)
            phases += 1
    return phases


def recorded_game(
    cast: Cast, seed: int, folder: Path, *, keep_prompts: KeepPrompts = "hash"
) -> Game | GameResult:
    """A game that writes to a folder, as far as it was played into it before.

    Args:
        cast: its players and settings.
        seed: its seed.
        folder: where event files lie.
        keep_prompts: see `EventWriter`.

    Returns:
        The result where the game was finished without an error, and otherwise the game, which
        goes on from the last phase that its record has whole.
    """
    path = folder / f"{cast.game_id(seed)}.jsonl"
    if path.exists():
        record = Record(path)
        if record.end is not None and not record.end["error"]:
            return record.result()
    log = EventLog(folder, path.stem, keep_prompts)
    game = Game(cast.config, cast, seed, log=log)
    resume(game, path)
    return game.result() if game.finished else game


def _recorded(record: Record, game: Game) -> list[list[Any]] | None:
    answers = []
    for _, views in game.pending():
        keys = [(view.round, view.phase, view.agent) for view in views]
        if any(key not in record.answers for key in keys):
            return None
        answers.append([record.answers[key] for key in keys])
    return answers


def _question(event: Mapping[str, Any]) -> Question:
    return (event["round"], event["phase"], event["agent"])


def _attempts(recorded: Sequence[Mapping[str, Any]]) -> tuple[Attempt, ...]:
    return tuple(_attempt(r["request"], r["response"], r.get("reject", {})) for r in recorded)


def _attempt(
    request: Mapping[str, Any], response: Mapping[str, Any], reject: Mapping[str, Any]
) -> Attempt:
    return Attempt(
        system=request.get("system", ""),
        user=request.get("user", ""),
        text=response["text"],
        parsed=response["parsed"],
        rejected=reject.get("reason", ""),
        tokens=response["tokens"],
        prompt_tokens=response["prompt_tokens"],
        seconds=response.get("timing", {}).get("ms", 0.0) / 1000,
        scores=response.get("scores"),
        prompt_hash=request.get("prompt_sha256", ""),
    )


def _proposal(event: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> Proposal:
    return Proposal(
        value=event["value"],
        text=event.get("text", ""),
        note=event.get("note", ""),
        held=event.get("held"),
        memory=event.get("memory"),
        payload=event.get("payload"),
        to={receiver: (value, text) for receiver, value, text in event.get("to", ())},
        withheld=tuple(event.get("withheld", ())),
        attempts=_attempts(attempts),
        forced=event.get("forced", False),
        clamped=event.get("clamped", False),
    )


def _ballot(event: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> Ballot:
    return Ballot(
        vote=event["vote"],
        memory=event.get("memory"),
        attempts=_attempts(attempts),
        forced=event.get("forced", False),
    )
