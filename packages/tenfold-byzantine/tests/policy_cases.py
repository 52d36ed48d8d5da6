"""A small game loop for tests of policies, independent of the engine, and views made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold_byzantine.contracts import (
    Ballot,
    Message,
    Policy,
    Proposal,
    RoundLine,
    Rules,
    View,
)


def rules(agents: int, faults: int = 0, **other: Any) -> Rules:
    """Rules of the paper with this many agents."""
    settings = {"low": 0, "high": 50, "max_rounds": 50, "quota": -(-2 * agents // 3), **other}
    return Rules(agents, faults, **settings)


def messages(said: Mapping[int, int | None], round_: int = 1, **payloads: Any) -> tuple:
    """An inbox: sender → value."""
    return tuple(
        Message(s, round_, v, payload=payloads.get(f"p{s}")) for s, v in sorted(said.items())
    )


def view(
    said: Mapping[int, int | None],
    agent: int = 0,
    *,
    game: Rules | None = None,
    round_: int = 2,
    **other: Any,
) -> View:
    """What an agent sees in phase decide after it heard these values."""
    game = game or rules(max(len(said), agent + 1))
    held = said.get(agent)
    settings: dict[str, Any] = {
        "rules": game,
        "agent": agent,
        "role": "honest",
        "round": round_,
        "phase": "decide",
        "initial": held,
        "held": held,
        "neighbours": tuple(a for a in range(game.agents) if a != agent),
        "inbox": messages(said, round_ - 1),
        "history": (),
        "notes": (),
        "memory": None,
        "key": f"test/{round_}/{agent}",
    }
    return View(**{**settings, **other})


@dataclass
class Played:
    """The course of a game: rows per round."""

    held: list[list[int | None]] = field(default_factory=list)
    said: list[list[int | None]] = field(default_factory=list)
    votes: list[list[str]] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)
    payloads: list[list[Any]] = field(default_factory=list)
    stopped: bool = False


def play(
    game: Rules,
    policies: Sequence[Policy],
    initial: Sequence[int | None],
    *,
    graph: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
    rounds: int | None = None,
) -> Played:
    """Plays by the rules of the paper; agents without an initial value are Byzantine."""
    n = game.agents
    near = graph or {a: [b for b in range(n) if b != a] for a in range(n)}
    byzantine = [a for a in range(n) if initial[a] is None]
    held = list(initial)
    memory: list[Any] = [None] * n
    notes: list[tuple] = [()] * n
    inboxes: list[tuple] = [()] * n
    lines: list[list[RoundLine]] = [[] for _ in range(n)]
    played = Played()

    def seen(a: int, t: int, phase: Any, **other: Any) -> View:
        allies = ()
        if initial[a] is None and "collude" in game.powers:
            allies = tuple(b for b in byzantine if b != a)
        return View(
            game,
            a,
            "byzantine" if initial[a] is None else "honest",
            t,
            phase,
            initial[a],
            held[a],
            tuple(sorted(near[a])),
            inboxes[a],
            tuple(lines[a]),
            notes[a],
            memory[a],
            f"{seed}/{t}/{phase}/{a}",
            allies=allies,
            ally_notes=tuple((b, r, x) for b in allies for r, x in notes[b]),
            **other,
        )

    for t in range(1, (rounds or game.max_rounds) + 1):
        answers: list[Proposal] = [Proposal(None)] * n
        honest_first = sorted(range(n), key=lambda a: (initial[a] is None, a))
        for a in honest_first:
            heard = ()
            if initial[a] is None and "rushing" in game.powers:
                heard = tuple(
                    Message(b, t, answers[b].value)
                    for b in range(n)
                    if initial[b] is not None and answers[b].value is not None
                )
            (answers[a],) = policies[a].decide_many([seen(a, t, "decide", overheard=heard)])
        for a, answer in enumerate(answers):
            if answer.held is not None or answer.value is not None:
                held[a] = answer.value if answer.held is None else answer.held
            memory[a] = answer.memory
            if answer.note:
                notes[a] = (*notes[a], (t, answer.note))
        for a in range(n):
            box = []
            for b in sorted([*near[a], a]):
                value = answers[b].to.get(a, (answers[b].value, ""))[0]
                if value is not None or answers[b].payload is not None:
                    box.append(Message(b, t, value, payload=answers[b].payload))
            inboxes[a] = tuple(box)
            lines[a].append(RoundLine(t, inboxes[a]))
        ballots: list[Ballot] = []
        for a in range(n):
            (ballot,) = policies[a].vote_many([seen(a, t, "vote")])
            if ballot.memory is not None:
                memory[a] = ballot.memory
            ballots.append(ballot)
        played.held.append(list(held))
        played.said.append([p.value for p in answers])
        played.votes.append([b.vote for b in ballots])
        played.payloads.append([p.payload for p in answers])
        played.memory = list(memory)
        if sum(b.vote == "stop" for b in ballots) >= game.quota:
            played.stopped = True
            break
    return played
