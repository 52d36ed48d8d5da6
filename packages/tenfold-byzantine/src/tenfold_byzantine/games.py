"""`byzantine:games`: games to be played, as records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.builtin.selection import Selection, shuffle
from tenfold.errors import ConfigError
from tenfold.records import GameRecord
from tenfold.seeds import content_hash

from tenfold_byzantine.grid import SweepPlan, read_toml
from tenfold_byzantine.presets import preset_table

SPLIT = "games"


class Games:
    """Games of a file, a preset or given settings, times a grid, times replicates.

    Replicate after replicate, so that a limit leaves all cells equally large. With `paired`,
    replicate r has one seed in every cell. Ids are `<cell>#<replicate>`.

    Args:
        file: game file or sweep file.
        preset: `paper-q1`, `paper-q2`, `prompts-q3` or `smoke` instead of a file.
        game: settings of the game, over those of the file.
        honest: settings of the honest side, over those of the file.
        byzantine: settings of the Byzantine side, over those of the file.
        grid: dotted setting → values; replaces the file's.
        replicates: games per cell; None: the file's, else 1.
        seed: of the whole; None: the file's, else 0.
        paired: see above; None: the file's.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: a file that is wrong, or settings that no game can have.
    """

    kind = "game"

    def __init__(
        self,
        file: str | None = None,
        preset: str | None = None,
        game: Mapping[str, Any] | None = None,
        honest: Mapping[str, Any] | None = None,
        byzantine: Mapping[str, Any] | None = None,
        grid: Mapping[str, Any] | None = None,
        replicates: int | None = None,
        seed: int | None = None,
        paired: bool | None = None,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if file is not None and preset is not None:
            raise ConfigError("byzantine:games has both a file and a preset; keep one")
        name, folder = "games", Path()
        table: dict[str, Any] = {}
        if file is not None:
            path = Path(file).expanduser()
            table, name, folder = _as_sweep(path), path.stem, path.parent
        elif preset is not None:
            table, name = preset_table(preset), preset
        base = table.get("base", {})
        if isinstance(base, str):
            base = read_toml(folder / base, "game")
        for key, over in (("game", game), ("honest", honest), ("byzantine", byzantine)):
            if over:
                base = {**base, key: {**base.get(key, {}), **over}}
        given = {"grid": grid, "replicates": replicates, "seed": seed, "paired": paired}
        table = {
            "replicates": 1,
            **{k: v for k, v in table.items() if k not in ("out", "stop")},
            "base": base,
            **{k: v for k, v in given.items() if v is not None},
        }
        self.plan = SweepPlan.from_table(table, source=file or name, folder=folder, name=name)
        _ = self.plan.cells  # a wrong cell is reported when the run is built
        self._selection = Selection(limit, shuffle_seed)

    def splits(self) -> Sequence[str]:
        """One split."""
        return (SPLIT,)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[GameRecord]:
        """Game records.

        Raises:
            ConfigError: another split.
        """
        if split not in ("", SPLIT):
            raise ConfigError(f"byzantine:games has no split {split!r} (splits: {SPLIT})")
        seed = self._selection.seed(shuffle_seed)
        places = [(r, c) for r in range(self.plan.replicates) for c in range(len(self.plan.cells))]
        if seed is not None:
            shuffle(places, seed)
        return islice((self._record(*place) for place in places), self._selection.count(limit))

    def __len__(self) -> int:
        """How many games `load` gives by default."""
        whole = self.plan.replicates * len(self.plan.cells)
        limit = self._selection.count(None)
        return whole if limit is None else min(limit, whole)

    def _record(self, replicate: int, index: int) -> GameRecord:
        cell = self.plan.cells[index]
        seed = self.plan.game_seed(cell, replicate)
        place = {"cell": dict(cell.coordinates), "replicate": replicate, "sweep": self.plan.digest}
        return GameRecord(
            id=f"{cell.label}#{replicate}",
            settings=cell.config.with_seed(seed).to_table(),
            metadata=place,
        )

    def fingerprint(self, split: str = "") -> str:
        """Hash of everything that the games depend on."""
        selection = [self._selection.limit, self._selection.shuffle_seed]
        return content_hash(["games", self.plan.to_table(), selection])


def _as_sweep(path: Path) -> dict[str, Any]:
    """The tables of a sweep file; of a game file those of a sweep of that one game."""
    table = read_toml(path, "game or sweep")
    if {"base", "grid", "replicates"} & set(table):
        return table
    return {"base": table, "seed": table.get("game", {}).get("seed", 0)}
