"""What verbs read: a sweep's folder, a run of the host, a folder of event logs, one game."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError
from tenfold.host import Host
from tenfold.store import RunStore, find_run

from tenfold_byzantine.rows import Row, game_row
from tenfold_byzantine.sweep import Sweep
from tenfold_byzantine.transcript import read_transcript


@dataclass(frozen=True, slots=True)
class Source:
    """Rows and where their event logs lie."""

    name: str
    rows: Sequence[Row]
    folder: Path


def read_source(name: str) -> Source:
    """The games that a name means: a sweep's folder, a run (folder, id or name), or a folder of
    event logs, whose cells are then the players' labels.

    Raises:
        ConfigError: nothing of the kind.
    """
    path = Path(name).expanduser()
    if (path / "sweep.json").is_file():
        sweep = Sweep.open(path)
        return Source(sweep.plan.name, sweep.table(), path)
    if path.is_dir() and not (path / "run.json").is_file():
        logs = sorted(path.glob("**/*.jsonl"))
        if not logs:
            raise ConfigError(
                f"{path} holds no games: no sweep.json, no run.json and no event logs"
            )
        return Source(path.name, [_row(log) for log in logs], path)
    try:
        store = find_run(Host().runs, name)
    except ConfigError as error:
        raise ConfigError(
            f"{name!r} is no sweep folder, no folder of event logs and no run: {error.args[0]}"
        ) from None
    return Source(store.path.parent.name, _rows_of_run(store), store.path)


def _rows_of_run(store: RunStore) -> list[Row]:
    rows = [dict(result.values) for result in store.results()]
    if any("outcome" not in row or "game_id" not in row for row in rows):
        raise ConfigError(f"{store.path} is a run of something else than byzantine:consensus")
    return rows


def _row(path: Path) -> Row:
    found = read_transcript(path)
    sides: dict[str, Any] = {}
    for role in ("honest", "byzantine"):
        labels = [p for p, r in zip(found.policies, found.result.roles, strict=True) if r == role]
        if labels:
            sides[f"{role}.use"] = "+".join(sorted(set(labels)))
    game: Mapping[str, Any] = found.result.settings.get("game", {})
    cell = {f"game.{k}": game[k] for k in ("n_honest", "n_byzantine", "awareness") if k in game}
    return game_row(found.result, cell={**cell, **sides})


def find_game(name: str) -> Path:
    """The event log that a name means: a file, or `FOLDER/ID` with a beginning of the id.

    Raises:
        ConfigError: there is none, or several.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = path.parent
    found = sorted(p for p in folder.glob("**/*.jsonl") if p.name.startswith(path.name))
    logs = [p for p in found if p.parent.name == "events"] or found
    if len(logs) == 1:
        return logs[0]
    if logs:
        raise ConfigError(
            f"{name!r} could be {len(logs)} games: {', '.join(p.stem for p in logs[:5])}"
        )
    raise ConfigError(
        f"there is no game {name!r}",
        hint="give an event log, or FOLDER/ID, e.g. runs/q2/0441e507 (ids are in table.csv)",
    )
