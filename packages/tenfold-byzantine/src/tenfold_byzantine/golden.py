"""The paper's six published trajectories, played again by the engine (spec, 4.3).

The figure shows values only. The honest agents' initial values are those of round 1, as in all six
of them; votes are not published beyond the round in which a game stopped, so everybody is taken to
vote to go on before it and to stop in it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from tenfold_byzantine.contracts import Ballot, Proposal, Rules, View
from tenfold_byzantine.engine import Game
from tenfold_byzantine.result import Outcome
from tenfold_byzantine.rules import GameConfig

_PART = re.compile(r"(\d+)(?:\*(\d+))?")
MAX_ROUNDS = 50


@dataclass(frozen=True)
class Trajectory:
    """A published game.

    Attributes:
        name: `P1` to `P6`, in the figure's order.
        label: the figure's title.
        outcome: what it is by our classification.
        stopped: round of the stop; None: it ran to the deadline.
        honest: `[agents][rounds]`.
        byzantine: `[agents][rounds]`.
    """

    name: str
    label: str
    outcome: Outcome
    stopped: int | None
    honest: tuple[tuple[int, ...], ...]
    byzantine: tuple[tuple[int, ...], ...]

    @property
    def config(self) -> GameConfig:
        """The game's settings; Byzantine agents have the highest numbers."""
        n_honest, n_byzantine = len(self.honest), len(self.byzantine)
        return GameConfig(
            n_honest=n_honest,
            n_byzantine=n_byzantine,
            max_rounds=MAX_ROUNDS,
            initial_values=tuple(row[0] for row in self.honest),
            byzantine_agents=tuple(range(n_honest, n_honest + n_byzantine)),
        )

    def game(self) -> Game:
        """The game at its beginning, with players that follow the figure."""
        players = PublishedPolicy(self)
        return Game(self.config, {"honest": players, "byzantine": players})


@dataclass(frozen=True)
class PublishedPolicy:
    """Plays a published trajectory."""

    trajectory: Trajectory

    @property
    def label(self) -> str:
        """The trajectory's name."""
        return f"published:{self.trajectory.name}"

    @property
    def powers(self) -> frozenset[str]:
        """None: the paper's adversaries have no powers."""
        return frozenset()

    def check(self, rules: Rules) -> None:
        """It plays its own game only, which `Trajectory.game` makes."""

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """The published values."""
        rows = (*self.trajectory.honest, *self.trajectory.byzantine)
        return [Proposal(rows[view.agent][view.round - 1]) for view in views]

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """Stop in the round in which the game stopped."""
        stopped = self.trajectory.stopped
        return [Ballot("stop" if view.round == stopped else "continue") for view in views]


@cache
def published_trajectories() -> tuple[Trajectory, ...]:
    """The six games, in the figure's order."""
    text = (
        files("tenfold_byzantine").joinpath("data/published_trajectories.toml").read_text("utf-8")
    )
    return tuple(
        Trajectory(
            name=entry["name"],
            label=entry["label"],
            outcome=Outcome(entry["outcome"]),
            stopped=entry["stopped"] or None,
            honest=tuple(map(_rounds, entry["honest"])),
            byzantine=tuple(map(_rounds, entry.get("byzantine", ()))),
        )
        for entry in tomllib.loads(text)["trajectory"]
    )


def _rounds(text: str) -> tuple[int, ...]:
    """`14 20*2` → (14, 20, 20)."""
    values: list[int] = []
    for part in text.split():
        match = _PART.fullmatch(part)
        assert match, part
        values += [int(match[1])] * int(match[2] or 1)
    return tuple(values)
