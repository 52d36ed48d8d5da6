"""The paper's experiments as sweeps, with its published rates as reference rows.

Rates are those of the bars in the paper's figures (arXiv:2603.01213v1), read from their vector
coordinates; they are what others measured, shown beside one's own and never mixed with them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold.errors import ConfigError, nearest
from tenfold.stats import Interval, wilson


@dataclass(frozen=True, slots=True)
class Published:
    """One bar of the paper.

    Attributes:
        model: `Qwen3-8B` or `Qwen3-14B`.
        awareness: what prompts say about Byzantine agents.
        honest: H.
        byzantine: B.
        runs: games behind the bar.
        valid: percent of valid games.
        invalid: percent that agreed on a foreign value.
        rounds: mean rounds of the valid games, None where the paper shows none.
        rounds_half: half-width printed with it.
    """

    model: str
    awareness: str
    honest: int
    byzantine: int
    runs: int
    valid: int
    invalid: int
    rounds: float | None = None
    rounds_half: float | None = None

    @property
    def successes(self) -> int:
        """Valid games; every bar is a whole number of games."""
        return round(self.valid * self.runs / 100)

    @property
    def interval(self) -> Interval:
        """Wilson interval of the valid rate."""
        found = wilson(self.successes, self.runs)
        assert found is not None  # a bar has games
        return found

    @property
    def label(self) -> str:
        """Short name for charts."""
        return f"paper: {self.model}, {self.awareness}, H={self.honest}, B={self.byzantine}"


_8B, _14B = "Qwen3-8B", "Qwen3-14B"
Q1: tuple[Published, ...] = (
    Published(_8B, "may_exist", 4, 0, 50, 28, 10, 7.7, 4.9),
    Published(_8B, "may_exist", 8, 0, 50, 22, 6, 10.4, 5.9),
    Published(_8B, "may_exist", 16, 0, 50, 4, 0, 3.0),
    Published(_8B, "none_exist", 4, 0, 50, 24, 8, 16.1, 10.5),
    Published(_8B, "none_exist", 8, 0, 50, 12, 10, 11.5, 9.7),
    Published(_8B, "none_exist", 16, 0, 50, 2, 0, 29.0),
    Published(_14B, "may_exist", 4, 0, 50, 54, 6, 13.9, 5.3),
    Published(_14B, "may_exist", 8, 0, 50, 58, 0, 14.7, 6.2),
    Published(_14B, "may_exist", 16, 0, 50, 66, 2, 18.2, 4.5),
    Published(_14B, "none_exist", 4, 0, 50, 80, 16, 7.3, 2.8),
    Published(_14B, "none_exist", 8, 0, 50, 88, 2, 7.0, 3.0),
    Published(_14B, "none_exist", 16, 0, 50, 60, 4, 9.2, 3.8),
)
"""Two models × three group sizes × two prompts, no Byzantine agents."""

Q2: tuple[Published, ...] = (
    Published(_14B, "may_exist", 8, 0, 50, 58, 0),
    Published(_14B, "may_exist", 8, 1, 25, 40, 0),
    Published(_14B, "may_exist", 8, 2, 25, 8, 8),
    Published(_14B, "may_exist", 8, 3, 25, 0, 0),
    Published(_14B, "may_exist", 8, 4, 25, 0, 0),
)
"""Eight honest agents and up to four Byzantine ones."""


@dataclass(frozen=True, slots=True)
class Preset:
    """An experiment: a sweep table as in a sweep file, and what the paper found.

    `needs_model` says whether its agents are language models.
    """

    name: str
    summary: str
    table: Mapping[str, Any]
    published: tuple[Published, ...] = ()
    needs_model: bool = True


def _llm_game(**game: Any) -> dict[str, Any]:
    """The paper's game (§4): quota 2/3, values 0 to 50."""
    return {
        "game": {"value_range": [0, 50], "quota": "2/3", "seed": 2026, **game},
        "honest": {"use": "llm"},
        "byzantine": {"use": "llm"},
    }


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper-q1",
            "group size and awareness without Byzantine agents: 6 cells of 50 games",
            {
                "base": _llm_game(n_honest=4, n_byzantine=0, max_rounds=50),
                "replicates": 50,
                "seed": 2026,
                "grid": {
                    "game.n_honest": [4, 8, 16],
                    "game.awareness": ["may_exist", "none_exist"],
                },
            },
            Q1,
        ),
        Preset(
            "paper-q2",
            "eight honest agents against 0 to 4 Byzantine ones: 5 cells of 25 games",
            {
                "base": _llm_game(n_honest=8, max_rounds=50, awareness="may_exist"),
                "replicates": 25,
                "seed": 2026,
                "grid": {"game.n_byzantine": [0, 1, 2, 3, 4]},
            },
            Q2,
        ),
        Preset(
            "prompts-q3",
            "three wordings of the prompt, 7 honest and 3 Byzantine agents: 3 cells of 35 games",
            {
                "base": _llm_game(n_honest=7, n_byzantine=3, max_rounds=15),
                "replicates": 35,
                "seed": 2026,
                "grid": {"game.awareness": ["minimal", "standard", "detailed"]},
            },
        ),
        Preset(
            "smoke",
            "scripted rules against scripted adversaries, no model: 8 cells of 25 games in seconds",
            {
                "base": {
                    "game": {"n_honest": 8, "n_byzantine": 2, "max_rounds": 10, "seed": 2026},
                    "honest": {"use": "low-median"},
                    "byzantine": {"use": "collude:v=25"},
                },
                "replicates": 25,
                "seed": 2026,
                "grid": {
                    "honest.use": ["mode-minid", "low-median"],
                    "byzantine.use": ["collude:v=25", "random", "silent", "early-stop"],
                },
            },
            needs_model=False,
        ),
    )
}
"""Name → preset."""


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"no preset is called {name!r}{nearest(name, PRESETS)} (presets: {', '.join(PRESETS)})"
        )
    return PRESETS[name]


def preset_table(name: str) -> dict[str, Any]:
    """A preset's sweep table, the caller's own copy."""
    return copy.deepcopy(dict(preset(name).table))


def published_for(coordinates: Mapping[str, Any], rows: tuple[Published, ...]) -> list[Published]:
    """The paper's bars that a cell corresponds to, by the settings that the cell names."""
    fields = {
        "game.n_honest": "honest",
        "game.n_byzantine": "byzantine",
        "game.awareness": "awareness",
    }
    wanted = {fields[k]: v for k, v in coordinates.items() if k in fields}
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
