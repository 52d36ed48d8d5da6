"""Games whose answers have everything that answers can have, written to event files."""

from __future__ import annotations

from engine_cases import Rule, finish, low_median, never, stochastic
from tenfold_byzantine.contracts import Attempt, Ballot, Proposal
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog
from tenfold_byzantine.networks import Links
from tenfold_byzantine.rules import GameConfig, Group, Threat


def wordy(view):
    """An answer with everything in it that an answer can have."""
    attempts = (
        Attempt("system", f"user {view.key}", "}{", None, "no JSON", tokens=3, seconds=0.25),
        Attempt("system", f"user {view.key}", '{"value": 1}', {"value": 1}, tokens=5),
    )
    to = {}
    if view.role == "byzantine" and "equivocate" in view.rules.powers:
        to = {view.neighbours[0]: (view.draws("to").randint(0, 50), "other é\ud800")}
    return Proposal(
        stochastic(view) if view.draws("silent").random() < 0.8 else None,
        text=f"because of {len(view.inbox)} messages",
        note=f"note {view.round}",
        memory={"seen": view.values(), "before": view.memory and view.memory["seen"]},
        payload=[view.round],
        to=to,
        attempts=attempts,
        forced=view.agent == 1,
        clamped=view.agent == 0,
    )


def wordy_vote(view):
    scored = Attempt("s", "u", '{"decision": "stop"}', {"decision": "stop"}, scores={"stop": 0.5})
    vote = "stop" if view.draws("vote").random() < 0.4 else "continue"
    return Ballot(vote, attempts=(scored,), forced=view.agent == 2)


CONFIGS = [
    GameConfig(n_honest=4, n_byzantine=1, max_rounds=6, seed=3),
    GameConfig(
        n_honest=4,
        n_byzantine=2,
        max_rounds=5,
        seed=4,
        threat=Threat(equivocate=True, rushing=True, collude=True),
    ),
    GameConfig(n_honest=6, max_rounds=4, topology="ring:k=1", links=Links("uniform:2", 0.2)),
    GameConfig(n_honest=5, n_byzantine=1, max_rounds=4, schedule="random", seed=9),
    GameConfig(
        n_honest=5,
        max_rounds=4,
        topology="erdos-renyi:p=0.6",
        abstain="repeat",
        honest=(Group(2, "rule"), Group(3, "other")),
    ),
]


def players(config):
    honest = Rule(wordy, wordy_vote)
    if len(config.honest) == 2:
        honest = [(2, honest), (3, Rule(low_median, never, label="other"))]
    return {"honest": honest, "byzantine": Rule(wordy, wordy_vote, label="liar")}


def record(config, folder, keep="hash"):
    policies = players(config)
    game = Game(config, policies)
    game = Game(config, policies, log=EventLog(folder, game.game_id, keep))
    return finish(game), folder / f"{game.game_id}.jsonl"
