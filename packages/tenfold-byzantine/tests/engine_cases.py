"""Small policies and game makers for tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tenfold_byzantine.contracts import Ballot, Proposal, View
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventWriter
from tenfold_byzantine.play import play_many
from tenfold_byzantine.rules import GameConfig


class Rule:
    """A policy made of two functions of a view."""

    def __init__(
        self,
        decide: Callable[[View], Proposal | int | None],
        vote: Callable[[View], Ballot | str] | None = None,
        *,
        label: str = "rule",
        powers: tuple[str, ...] = (),
    ) -> None:
        self.label = label
        self.powers = frozenset(powers)
        self._decide = decide
        self._vote = vote or stop_at_unanimity
        self.calls: list[int] = []

    def check(self, rules) -> None:
        del rules

    def decide_many(self, views):
        self.calls.append(len(views))
        answers = [self._decide(view) for view in views]
        return [a if isinstance(a, Proposal) else Proposal(a) for a in answers]

    def vote_many(self, views):
        self.calls.append(len(views))
        answers = [self._vote(view) for view in views]
        return [a if isinstance(a, Ballot) else Ballot(a) for a in answers]


def stop_at_unanimity(view: View) -> str:
    """Stop when every value heard is the same."""
    return "stop" if len(set(view.values())) == 1 else "continue"


def never(view: View) -> str:
    del view
    return "continue"


def low_median(view: View) -> int | None:
    """Own value in round 1, then the lower median of what was heard."""
    values = sorted(view.values())
    return values[(len(values) - 1) // 2] if values else view.held


def stochastic(view: View) -> int:
    """Copies a random value heard; uses the question's own draws."""
    values = view.values() or [view.held if view.held is not None else 0]
    return view.draws("copy").choice(values)


def row(rows: Mapping[int, list[int | None]]) -> Callable[[View], Proposal]:
    """Plays a written course: agent → value per round."""
    return lambda view: Proposal(rows[view.agent][view.round - 1])


def votes_at(last: int) -> Callable[[View], str]:
    """Stop from a round on."""
    return lambda view: "stop" if view.round >= last else "continue"


def finish(game: Game) -> Game:
    """Plays a game to its end."""
    for _ in play_many([game], raise_errors=True):
        pass
    return game


def played(config: GameConfig, honest, byzantine=None, **options) -> Game:
    policies = {"honest": honest} | ({} if byzantine is None else {"byzantine": byzantine})
    return finish(Game(config, policies, **options))


def logged(config: GameConfig, honest, byzantine=None) -> tuple[Game, list[str]]:
    """A finished game and the lines of its log."""
    writer = EventWriter()
    return played(config, honest, byzantine, log=writer), writer.lines
