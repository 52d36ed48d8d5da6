"""The run record: one folder per run, written so that a kill at any moment loses nothing.

Item lines are appended and flushed one by one. A torn last line is dropped when the file is
opened again; whole-file writes go through a rename; a lock keeps two processes apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError, nearest
from tenfold.files import LineFile, disk_full_is_an_error, write_json, write_text
from tenfold.records import ItemResult

STATUSES = ("running", "ok", "failed", "interrupted")
_RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


@dataclass(frozen=True, slots=True)
class ItemLine:
    """One line of `items.jsonl`."""

    index: int
    id: str
    key: str
    values: Mapping[str, Any]
    seconds: float = 0.0

    @classmethod
    def parse(cls, line: bytes) -> ItemLine:
        """The line's content; raises ValueError for a torn or foreign line."""
        row = json.loads(line)
        return cls(row["index"], row["id"], row["key"], row["values"], row.get("seconds", 0.0))

    def result(self) -> ItemResult:
        """What an evaluator's `aggregate` sees of it."""
        return ItemResult(self.id, self.values)


class RunStore:
    """Access to one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIOWrapper | None = None

    # --- life cycle ---

    @classmethod
    def create(cls, runs: Path, name: str) -> RunStore:
        """A new run folder `runs/<name>/<YYYYMMDD-HHMMSS>-<id6>`."""
        while True:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            path = runs / name / f"{stamp}-{secrets.token_hex(3)}"
            try:
                with disk_full_is_an_error(path):
                    path.mkdir(parents=True)
            except FileExistsError:
                continue
            except PermissionError as error:
                raise ConfigError(f"cannot create the run folder {path}: {error}") from error
            return cls(path)

    @property
    def id(self) -> str:
        """The folder's own name."""
        return self.path.name

    def lock(self) -> None:
        """Takes the folder's lock until the process ends.

        Raises:
            ConfigError: another process is using the run.
        """
        handle = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            handle.close()
            raise ConfigError(
                f"run folder {self.path} is in use by {owner}",
                hint="wait for it to end, or stop it and use --resume",
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()}")
        handle.flush()
        self._lock = handle

    def unlock(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def status(self) -> str:
        """Content of STATUS: `running`, `ok`, `failed` or `interrupted`; a run whose process
        was killed still says `running`."""
        try:
            return (self.path / "STATUS").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return "unknown"

    def set_status(self, status: str) -> None:
        """Writes STATUS."""
        write_text(self.path / "STATUS", status + "\n")

    # --- facts ---

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder.

        Raises:
            ConfigError: it is missing or malformed.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{self.path} has no {name}; is it a run folder?") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the folder atomically."""
        write_json(self.path / name, value)

    # --- items ---

    def item_files(self) -> list[Path]:
        """Item files of all processes, `items.jsonl` first."""
        return sorted(self.path.glob("items*.jsonl"))

    def lines(self) -> Iterator[tuple[Path, int, ItemLine]]:
        """Every whole line with its file and offset; the first of equal keys wins."""
        seen: set[int] = set()
        for path, offset, line in self._whole_lines():
            number = key_number(line.key)
            if number not in seen:
                seen.add(number)
                yield path, offset, line

    def _whole_lines(self) -> Iterator[tuple[Path, int, ItemLine]]:
        for path in self.item_files():
            with path.open("rb") as file:
                offset = 0
                for raw in file:
                    line = _parse_or_none(raw)
                    if line is not None:
                        yield path, offset, line
                    offset += len(raw)

    def done_keys(self) -> set[int]:
        """Keys of recorded items, as numbers."""
        return {key_number(line.key) for _, _, line in self._whole_lines()}

    def failed_keys(self) -> set[int]:
        """Keys, as numbers, of items that failed at least once; they may be done by now."""
        keys = set()
        for path in self.path.glob("failures*.jsonl"):
            with path.open("rb") as file:
                keys |= {key_number(row["key"]) for raw in file if (row := _json_or_none(raw))}
        return keys

    def ordered_lines(self) -> Iterator[ItemLine]:
        """Lines in plan order, whatever order processes finished in.

        Holds two integers per item and reads each line from disk when it is due.
        """
        files = self.item_files()
        position = {path: number for number, path in enumerate(files)}
        indices, places = array("q"), array("q")
        for path, offset, line in self.lines():
            indices.append(line.index)
            places.append(offset * len(files) + position[path])
        order = sorted(range(len(indices)), key=indices.__getitem__)
        handles = [path.open("rb") for path in files]
        try:
            for row in order:
                offset, number = divmod(places[row], len(files))
                handles[number].seek(offset)
                yield ItemLine.parse(handles[number].readline())
        finally:
            for handle in handles:
                handle.close()

    def results(self) -> Iterator[ItemResult]:
        """Successful results in plan order."""
        return (line.result() for line in self.ordered_lines())


def key_number(key: str) -> int:
    """An item key as a number, which takes half the memory of its text."""
    return int(key, 16)


def _parse_or_none(raw: bytes) -> ItemLine | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        return ItemLine.parse(raw)
    except (ValueError, KeyError, TypeError):
        return None


def _json_or_none(raw: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(raw)
    except ValueError:
        return None


class ItemWriter:
    """Appends flushed lines to one process's item and failure files."""

    def __init__(self, store: RunStore, rank: int = 0) -> None:
        suffix = "" if rank == 0 else f".rank{rank}"
        self._items = LineFile(store.path / f"items{suffix}.jsonl")
        self._failures = LineFile(store.path / f"failures{suffix}.jsonl")

    def item(self, line: ItemLine) -> dict[str, Any]:
        """Records a result; returns the row as written."""
        row = {
            "index": line.index,
            "id": line.id,
            "key": line.key,
            "values": line.values,
            "seconds": round(line.seconds, 6),
        }
        self._items.append(row)
        return row

    def failure(self, row: Mapping[str, Any]) -> None:
        """Records a failed item."""
        self._failures.append(row)

    def close(self) -> None:
        """Closes both files."""
        self._items.close()
        self._failures.close()


# --- finding runs ---------------------------------------------------------------------------


def all_runs(runs: Path) -> list[RunStore]:
    """Every run below a runs folder, oldest first."""
    found = [p.parent for p in runs.glob("*/*/run.json") if _RUN_ID.fullmatch(p.parent.name)]
    return [RunStore(path) for path in sorted(found, key=lambda p: (p.name, p.parent.name))]


def find_run(runs: Path, name: str) -> RunStore:
    """A run by folder, by id (or a unique beginning of it), or by name (its newest run).

    Raises:
        ConfigError: nothing or more than one thing matches.
    """
    path = Path(name).expanduser()
    if (path / "run.json").is_file():
        return RunStore(path.absolute())
    stores = all_runs(runs)
    by_name = [store for store in stores if store.path.parent.name == name]
    if by_name:
        return by_name[-1]
    # An id is found by its beginning or by its random tail.
    by_id = [s for s in stores if s.id.startswith(name) or s.id.endswith(f"-{name}")]
    if len(by_id) == 1:
        return by_id[0]
    if by_id:
        raise ConfigError(f"run {name!r} is ambiguous: {', '.join(s.id for s in by_id[:5])}")
    known = sorted({store.path.parent.name for store in stores})
    raise ConfigError(
        f"no run {name!r} under {runs}{nearest(name, known)} "
        f"(names here: {', '.join(known[:10]) or 'none'})"
    )


def run_field(runs: Path, reference: str) -> Any:
    """The value of `${run:NAME.field}`: `path`, `id`, `metrics.<name>`, or a `run.json` key.

    Raises:
        ConfigError: no such run, the run is unfinished, or it has no such field.
    """
    name, _, path = reference.partition(".")
    store = find_run(runs, name)
    if path in ("", "path"):
        return str(store.path)
    if path == "id":
        return store.id
    if path.startswith("metrics."):
        rows = store.read_json("metrics.json")
        values = {row["name"]: row["value"] for row in rows if not row.get("group")}
        metric = path.removeprefix("metrics.")
        if metric not in values:
            raise ConfigError(f"run {name!r} has no metric {metric!r}{nearest(metric, values)}")
        return values[metric]
    value: Any = store.read_json("run.json")
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ConfigError(f"run {name!r} has no field {path!r}")
        value = value[key]
    return value
