"""A sweep: a base game, a grid of settings, replicates with paired seeds (spec, Appendix A).

Planning is pure: it says which games there are. `sweep.py` plays them.
"""

from __future__ import annotations

import copy
import itertools
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError, TenfoldWarning, nearest
from tenfold.seeds import content_hash, derive

from tenfold_byzantine.rows import top
from tenfold_byzantine.rules import GameConfig
from tenfold_byzantine.statistics import halfwidth
from tenfold_byzantine.streams import replicate_seed
from tenfold_byzantine.summary import cell_label
from tenfold_byzantine.tables import Table

MOST_CELLS = 10_000
MOST_GAMES_PER_CELL = 200
"""Games per cell where a sweep stops by width and names no other limit."""
KEEP_PROMPTS = ("full", "hash", "none")
_TOP = ("name", "base", "replicates", "seed", "paired", "grid", "stop", "out")
_GAME_TABLES = ("game", "honest", "byzantine", "backend", "thresholds")


@dataclass(frozen=True, slots=True)
class CellPlan:
    """One cell of a grid: its place, its coordinates and its game."""

    index: int
    coordinates: Mapping[str, Any]
    config: GameConfig

    @property
    def label(self) -> str:
        """See `cell_label`."""
        return cell_label(self.coordinates)


@dataclass(frozen=True)
class SweepPlan:
    """All games of a sweep.

    Attributes:
        name: for the report and the rows.
        base: tables of the base game.
        grid: dotted setting → values; cells are its product, the last setting fastest.
        replicates: games per cell, or the least number where `until_halfwidth` is set.
        seed: the sweep's.
        paired: replicate r has one seed in all cells, so that it shares roles (where counts
            allow) and initial values; otherwise every game has its own.
        max_games_per_cell: most games per cell with `until_halfwidth`.
        until_halfwidth: a cell is done once the half-width of its valid rate's Wilson interval
            is at most this.
        out: folder, None where the file names none.
        keep_prompts: what event logs keep of prompts.

    Raises:
        ConfigError: a setting out of range, an unknown grid path, too many cells, or a cell that
            is no valid game (named by its coordinates).
    """

    name: str
    base: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    replicates: int = 25
    seed: int = 0
    paired: bool = True
    max_games_per_cell: int | None = None
    until_halfwidth: float | None = None
    out: Path | None = None
    keep_prompts: str = "hash"

    def __post_init__(self) -> None:
        where = f"sweep {self.name}"
        _whole(where, "replicates", self.replicates, 1)
        _whole(where, "seed", self.seed, None)
        if self.max_games_per_cell is not None:
            _whole(where, "stop.max_games_per_cell", self.max_games_per_cell, self.replicates)
        width = self.until_halfwidth
        if width is not None and (isinstance(width, bool) or not 0 < width < 0.5):
            raise ConfigError(
                f"{where}: stop.until_halfwidth is {width!r}; it must lie between 0 and 0.5, "
                "such as 0.1"
            )
        if self.keep_prompts not in KEEP_PROMPTS:
            raise ConfigError(
                f"{where}: out.keep_prompts is {self.keep_prompts!r}; it must be one of "
                f"{', '.join(KEEP_PROMPTS)}{nearest(str(self.keep_prompts), KEEP_PROMPTS)}"
            )
        size = 1
        for path, values in self.grid.items():
            _check_axis(where, path, values)
            size *= len(values)
        if size > MOST_CELLS:
            raise ConfigError(f"{where}: the grid has {size:,} cells; at most {MOST_CELLS:,}")

    @cached_property
    def cells(self) -> tuple[CellPlan, ...]:
        """The cells in order."""
        found = []
        for index, values in enumerate(itertools.product(*self.grid.values())):
            coordinates = dict(zip(self.grid, values, strict=True))
            table = copy.deepcopy(dict(self.base))
            for path, value in coordinates.items():
                _set(table, path, value)
            where = f"{self.name} ({cell_label(coordinates)})" if coordinates else self.name
            found.append(CellPlan(index, coordinates, _quietly(table, where, first=not found)))
        return tuple(found)

    @property
    def most(self) -> int:
        """Most games of a cell."""
        if self.until_halfwidth is None:
            return self.replicates
        limit = self.max_games_per_cell
        return max(self.replicates, MOST_GAMES_PER_CELL) if limit is None else limit

    def game_seed(self, cell: CellPlan, replicate: int) -> int:
        """Seed of a game."""
        if self.paired:
            return replicate_seed(self.seed, replicate)
        return derive(self.seed, "unpaired", cell.label, replicate)

    def counted(self, rows: Mapping[int, Mapping[str, Any]]) -> int | None:
        """How many replicates of a cell count, by the rows that there are; None: not yet known.

        The rule looks at replicates in order, whatever order they were played in, so that it
        gives one answer for one set of games.
        """
        valid = games = 0
        for replicate in range(self.most):
            if replicate not in rows:
                return None
            kind = top(rows[replicate])
            valid += kind == "VALID"
            games += kind != "ERROR"
            if self.until_halfwidth is None or replicate + 1 < self.replicates:
                continue
            if halfwidth(valid, games) <= self.until_halfwidth:
                return replicate + 1
        return self.most

    def wanted(self, rows: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """Replicates of a cell to play next: all at once, or as many again where the width
        decides; none when the cell is done."""
        if self.counted(rows) is not None:
            return []
        for block in range(self.replicates, self.most + self.replicates, self.replicates):
            missing = [r for r in range(min(block, self.most)) if r not in rows]
            if missing:
                return missing
        return []

    def to_table(self) -> dict[str, Any]:
        """The plan as plain values, without where results go."""
        return {
            "base": copy.deepcopy(dict(self.base)),
            "grid": {path: list(values) for path, values in self.grid.items()},
            "replicates": self.replicates,
            "seed": self.seed,
            "paired": self.paired,
            "stop": {
                "max_games_per_cell": self.max_games_per_cell,
                "until_halfwidth": self.until_halfwidth,
            },
        }

    @property
    def digest(self) -> str:
        """Names the sweep: hash of everything that its games depend on."""
        return content_hash({k: v for k, v in self.to_table().items() if k != "stop"})

    @classmethod
    def from_toml(cls, path: Path | str) -> SweepPlan:
        """Reads a sweep file.

        Raises:
            ConfigError: the file is missing, is not TOML, or a setting is wrong.
        """
        path = Path(path)
        return cls.from_table(
            read_toml(path, "sweep"), source=str(path), folder=path.parent, name=path.stem
        )

    @classmethod
    def from_table(
        cls,
        table: Mapping[str, Any],
        *,
        source: str = "sweep",
        folder: Path | None = None,
        name: str = "sweep",
    ) -> SweepPlan:
        """A plan from the tables of a sweep file.

        Args:
            table: what the file holds; `base` is a game file's path or its tables.
            source: its name in error messages.
            folder: where a relative `base` is looked up.
            name: where the file has none.

        Raises:
            ConfigError: a setting is unknown or wrong.
        """
        file = Table(table, source)
        file.only(*_TOP)
        stop, out = file.table("stop"), file.table("out")
        stop.only("max_games_per_cell", "until_halfwidth")
        out.only("dir", "keep_prompts")
        grid = {}
        for path in file.table("grid").values:
            values = file.table("grid").sequence(path)
            grid[path] = list(values)
        values = file.values
        given = out.values.get("dir")
        return cls(
            name=str(values.get("name", name)),
            base=_base(file, folder or Path()),
            grid=grid,
            replicates=values.get("replicates", 25),
            seed=values.get("seed", 0),
            paired=_flag(file, "paired", True),
            max_games_per_cell=stop.values.get("max_games_per_cell"),
            until_halfwidth=stop.values.get("until_halfwidth"),
            out=None if given is None else Path(str(given)),
            keep_prompts=out.values.get("keep_prompts", "hash"),
        )


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ConfigError: it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {what} file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {what} file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Lines `setting: before → now` of two nested tables, in order."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}, key=str):
            below = f"{path}.{key}" if path else str(key)
            missing = object()
            old, new = before.get(key, missing), now.get(key, missing)
            if old is missing or new is missing:
                shown = ["(not set)" if v is missing else repr(v) for v in (old, new)]
                yield f"{below}: {shown[0]} → {shown[1]}"
            else:
                yield from differences(old, new, below)
    elif before != now:
        yield f"{path}: {before!r} → {now!r}"


def _base(file: Table, folder: Path) -> dict[str, Any]:
    base = file.values.get("base", {})
    if isinstance(base, str):
        table = read_toml(folder / base, "game")
        where = str(folder / base)
    else:
        table, where = dict(file.table("base").values), f"{file.source}: base"
    Table(table, where).only(*_GAME_TABLES, "stop", "out")
    return {key: copy.deepcopy(table[key]) for key in _GAME_TABLES if key in table}


def _flag(file: Table, name: str, default: bool) -> bool:
    value = file.values.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{file.name(name)} is {value!r}; it must be true or false")
    return value


def _whole(where: str, name: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {name} is {value!r}; it must be a whole number")
    if least is not None and value < least:
        raise ConfigError(f"{where}: {name} is {value}; it must be at least {least}")


def _check_axis(where: str, path: str, values: Sequence[Any]) -> None:
    head, _, rest = path.partition(".")
    if head not in _GAME_TABLES or not rest:
        raise ConfigError(
            f'{where}: grid setting "{path}" must begin with one of '
            f"{', '.join(f'{t}.' for t in _GAME_TABLES)}{nearest(head, _GAME_TABLES)}"
        )
    if not values:
        raise ConfigError(f'{where}: grid setting "{path}" has no values')
    texts = [repr(v) for v in values]
    if len(set(texts)) != len(texts):
        raise ConfigError(f'{where}: grid setting "{path}" has a value twice: {list(values)}')


def _set(table: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        below = table.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f'grid setting "{path}": {key} is {below!r}, not a table')
        table = below
    table[last] = copy.deepcopy(value)


def _quietly(table: Mapping[str, Any], where: str, *, first: bool) -> GameConfig:
    """The cell's game; warnings that every cell would repeat come once."""
    with warnings.catch_warnings():
        if not first:
            warnings.simplefilter("ignore", TenfoldWarning)
        return GameConfig.from_table(table, source=where)
