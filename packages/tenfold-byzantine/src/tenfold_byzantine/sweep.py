"""Playing a sweep into a folder: every finished game is one flushed line, so nothing is lost.

The folder of a sweep:

    sweep.json               the plan; a later call must agree with it
    games.jsonl              one row per finished game, with its times
    events/<game>.jsonl      the games themselves, unless they are not kept
    shard-0-of-4/            the same two of one shard
    table.csv                the result table: rows in the plan's order, without times

A game that is cut off is played again. Games whose backend failed are played again by the next
call. What a table holds depends on the plan alone, not on interruptions, shards or waves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold import __version__ as core_version
from tenfold.capabilities import ProgressBar
from tenfold.errors import ConfigError
from tenfold.files import LineFile, write_json, write_text
from tenfold.progress import Reporter
from tenfold.stats import wilson
from tenfold.store import RunStore

from tenfold_byzantine import __version__
from tenfold_byzantine.cast import Cast
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog
from tenfold_byzantine.grid import CellPlan, SweepPlan, differences
from tenfold_byzantine.play import play_many
from tenfold_byzantine.replay import resume as resume_game
from tenfold_byzantine.result import GameResult
from tenfold_byzantine.roster import Roster
from tenfold_byzantine.rows import Row, game_row, table_text, top

SCHEMA = "byz-sweep/1"
Rows = dict[int, dict[int, Row]]
"""Cell index → replicate → row."""


class Sweep:
    """A sweep and where it is kept.

        sweep = Sweep.from_toml("q2.toml")
        rows = sweep.run(Roster(by_role({"honest": model})), resume=True)

    Args:
        plan: which games.
        folder: where; None takes the plan's.

    Raises:
        ConfigError: neither names a folder.
    """

    def __init__(self, plan: SweepPlan, folder: Path | str | None = None) -> None:
        if folder is None and plan.out is None:
            raise ConfigError(
                f"sweep {plan.name} says not where its games go", hint='add [out] dir = "runs/..."'
            )
        self.plan = plan
        self.folder = Path(folder if folder is not None else plan.out or ".").expanduser()

    @classmethod
    def from_toml(cls, path: Path | str, folder: Path | str | None = None) -> Sweep:
        """A sweep file's sweep; a relative folder is relative to where one stands.

        Raises:
            ConfigError: see `SweepPlan`.
        """
        return cls(SweepPlan.from_toml(path), folder)

    @classmethod
    def open(cls, folder: Path | str) -> Sweep:
        """The sweep that a folder holds.

        Raises:
            ConfigError: the folder holds none.
        """
        record = read_record(Path(folder))
        plan = SweepPlan.from_table(record["plan"], source=str(folder), name=record["name"])
        return cls(replace(plan, keep_prompts=record["keep_prompts"]), folder)

    def run(
        self,
        roster: Roster,
        *,
        resume: bool = False,
        shard: tuple[int, int] = (0, 1),
        width: int = 64,
        keep_events: bool = True,
        reporter: Reporter | None = None,
    ) -> list[Row]:
        """Plays what is missing and gives the table of all games that there are.

        Args:
            roster: makes the players.
            resume: continue; without it the folder must not hold games of this shard.
            shard: `(i, k)`, from 0: this call plays the i-th of k parts; whole cells where the
                width of an interval decides how many games are played.
            width: games in a wave; changes nothing but speed and memory.
            keep_events: write event files.
            reporter: shows progress.

        Raises:
            ConfigError: games without `resume`, another plan than before, a folder in use, a
                policy outside of its bounds.
        """
        _check_shard(shard)
        plan, folder = self.plan, self._shard_folder(shard)
        casts = {cell.index: roster.cast(cell.config) for cell in plan.cells}
        with ExitStack() as stack:
            self._record(resume=resume)
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunStore(folder)
            lock.lock()
            stack.callback(lock.unlock)
            done = _checked(_rows([folder / "games.jsonl"], plan), plan, casts, folder)
            if done and not resume:
                raise ConfigError(
                    f"{folder} already holds {sum(map(len, done.values()))} games",
                    hint="continue with --resume, or choose another folder",
                )
            file = LineFile(folder / "games.jsonl")
            stack.callback(file.close)
            total = sum(len(_share(plan, cell, shard, range(plan.most))) for cell in plan.cells)
            bar = stack.enter_context(
                (reporter or Reporter(enabled=False)).bar(plan.name, total, "games")
            )
            events = folder / "events" if keep_events else None
            self._play(casts, done, shard, width, events, file, bar)
        return self.table()

    def _play(
        self,
        casts: Mapping[int, Cast],
        done: Rows,
        shard: tuple[int, int],
        width: int,
        events: Path | None,
        file: LineFile,
        bar: ProgressBar,
    ) -> None:
        plan, seen = self.plan, _Seen(bar)
        for cell in plan.cells:
            for row in done.get(cell.index, {}).values():
                seen.add(row)
        retried: set[tuple[int, int]] = set()
        while True:
            wanted: list[tuple[CellPlan, int]] = []
            for cell in plan.cells:
                rows = done.setdefault(cell.index, {})
                settled = {
                    r: row
                    for r, row in rows.items()
                    if top(row) != "ERROR" or (cell.index, r) in retried
                }
                wanted += [
                    (cell, r)
                    for r in _share(plan, cell, shard, self._missing(settled, cell, shard))
                ]
            if not wanted:
                return
            for cell, replicate, result in self._results(wanted, casts, width, events):
                row = game_row(
                    result, cell=cell.coordinates, replicate=replicate, sweep=plan.digest
                )
                retried.add((cell.index, replicate))
                done[cell.index][replicate] = row
                file.append({"id": f"{cell.label}#{replicate}", "cell_index": cell.index, **row,
                             "timing": dict(result.timing)})  # fmt: skip
                seen.add(row)

    def _missing(
        self, rows: Mapping[int, Row], cell: CellPlan, shard: tuple[int, int]
    ) -> Iterable[int]:
        if self.plan.until_halfwidth is None:
            return [r for r in range(self.plan.most) if r not in rows]
        return self.plan.wanted(rows)

    def _results(
        self,
        wanted: list[tuple[CellPlan, int]],
        casts: Mapping[int, Cast],
        width: int,
        events: Path | None,
    ) -> Iterator[tuple[CellPlan, int, GameResult]]:
        """Results of the wanted games as they finish."""
        places: dict[str, list[tuple[CellPlan, int]]] = {}
        logs: dict[str, EventLog] = {}

        def games() -> Iterator[Game]:
            for cell, replicate in wanted:
                cast, seed = casts[cell.index], self.plan.game_seed(cell, replicate)
                name = cast.game_id(seed)
                log = None
                if events is not None and name not in logs:
                    log = logs[name] = EventLog(events, name, self.plan.keep_prompts)  # ty: ignore[invalid-argument-type]
                places.setdefault(name, []).append((cell, replicate))
                game = Game(cell.config, cast, seed, log=log)
                if log is not None:
                    resume_game(game, log.path)
                yield game

        try:
            for result in play_many(games(), width=width):
                log = logs.pop(result.game_id, None)
                if log is not None:
                    log.flush()
                yield *places[result.game_id].pop(0), result
        finally:
            for log in logs.values():
                log.close()

    def rows(self) -> Rows:
        """Every row that any shard has recorded; of equal places the last one that succeeded."""
        files = sorted(self.folder.glob("games.jsonl")) + sorted(
            self.folder.glob("shard-*/games.jsonl")
        )
        return _rows(files, self.plan)

    def table(self) -> list[Row]:
        """The result table, in the plan's order: of each cell the replicates that count."""
        found = self.rows()
        table: list[Row] = []
        for cell in self.plan.cells:
            rows = found.get(cell.index, {})
            counted = self.plan.counted(rows)
            limit = self.plan.most if counted is None else counted
            table += [rows[r] for r in sorted(rows) if r < limit]
        return table

    @property
    def complete(self) -> bool:
        """Whether every cell is done and no game's backend failed."""
        found = self.rows()
        return all(self.plan.counted(found.get(c.index, {})) is not None for c in self.plan.cells)

    def write_table(self) -> Path:
        """Writes `table.csv`; equal games give equal bytes."""
        path = self.folder / "table.csv"
        write_text(path, table_text(self.table()))
        return path

    def event_file(self, game_id: str) -> Path | None:
        """The event file of a game, by its id or a unique beginning of it."""
        found = sorted(self.folder.glob(f"**/events/{game_id}*.jsonl"))
        return found[0] if len(found) == 1 else None

    def _shard_folder(self, shard: tuple[int, int]) -> Path:
        index, count = shard
        return self.folder if count == 1 else self.folder / f"shard-{index}-of-{count}"

    def _record(self, *, resume: bool) -> None:
        """Writes the plan, or compares it with the one that is there."""
        now: dict[str, Any] = {
            "schema": SCHEMA,
            "name": self.plan.name,
            "plan": self.plan.to_table(),
            "keep_prompts": self.plan.keep_prompts,
            "versions": {"tenfold": core_version, "tenfold-byzantine": __version__},
        }
        if not (self.folder / "sweep.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "sweep.json", now)
            return
        before = read_record(self.folder)
        # How many games are played may change between calls; what they are may not.
        old, new = (_plain({**r["plan"], "stop": None}) for r in (before, now))
        for table in (old, new):
            table.pop("replicates")
        changed = list(differences(old, new))
        if changed:
            raise ConfigError(
                f"{self.folder} holds another sweep; what changed:\n  " + "\n  ".join(changed),
                hint="use another folder, or the old settings",
            )
        if _plain(before["plan"]) != _plain(now["plan"]):
            write_json(self.folder / "sweep.json", now)


class _Seen:
    """Running numbers beside the progress bar."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._valid = self._games = self._errors = self._calls = self._tokens = 0

    def add(self, row: Mapping[str, Any]) -> None:
        kind = top(row)
        self._valid += kind == "VALID"
        self._games += kind != "ERROR"
        self._errors += kind == "ERROR"
        self._calls += row["counters"].get("calls", 0)
        self._tokens += row["counters"].get("tokens", 0)
        fields: dict[str, object] = {}
        interval = wilson(self._valid, self._games)
        if interval is not None:
            rate = self._valid / self._games
            fields["valid"] = f"{rate:.2f}[{interval[0]:.2f},{interval[1]:.2f}]"
        for name, value in (("calls", self._calls), ("tokens", self._tokens)):
            if value:
                fields[name] = value
        if self._errors:
            fields["errors"] = self._errors
        self._bar.advance(1, **fields)


def read_record(folder: Path) -> dict[str, Any]:
    """A sweep's `sweep.json`.

    Raises:
        ConfigError: it is missing, damaged, or of another schema.
    """
    record = RunStore(folder).read_json("sweep.json") if folder.is_dir() else None
    if record is None:
        raise ConfigError(f"there is no folder {folder}")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ConfigError(f"{folder / 'sweep.json'} is not of schema {SCHEMA!r}")
    return record


def _rows(files: Iterable[Path], plan: SweepPlan) -> Rows:
    """Rows by place; a torn last line is left out, of equal places the last success counts."""
    found: Rows = {}
    for path in files:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    line = json.loads(raw)
                    index, replicate = int(line.pop("cell_index")), int(line["replicate"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f"{path}, line {number} is damaged: {error}",
                        hint="delete that line; its game will be played again with --resume",
                    ) from None
                line.pop("id", None)
                line.pop("timing", None)
                rows = found.setdefault(index, {})
                if replicate not in rows or top(line) != "ERROR":
                    rows[replicate] = line
    return found


def _checked(rows: Rows, plan: SweepPlan, casts: Mapping[int, Cast], folder: Path) -> Rows:
    """The rows, if their games are those of the plan and the players.

    Raises:
        ConfigError: a game was played by others, e.g. with another model.
    """
    for cell in plan.cells:
        for replicate, row in rows.get(cell.index, {}).items():
            expected = casts[cell.index].game_id(plan.game_seed(cell, replicate))
            if row["game_id"] != expected:
                raise ConfigError(
                    f"{folder}: game {replicate} of cell {cell.label} is {row['game_id']}, but "
                    f"with these players it would be {expected}: a model, its prompts or the "
                    "package changed",
                    hint="use another folder for the new players",
                )
    return rows


def _share(
    plan: SweepPlan, cell: CellPlan, shard: tuple[int, int], replicates: Iterable[int]
) -> list[int]:
    """The replicates of a cell that belong to a shard."""
    index, count = shard
    if plan.until_halfwidth is not None:  # a cell's width needs all its games in one place
        return list(replicates) if cell.index % count == index else []
    return [r for r in replicates if (cell.index * plan.most + r) % count == index]


def _check_shard(shard: tuple[int, int]) -> None:
    index, count = shard
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count} does not exist; write I/K with 0 <= I < K")


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
