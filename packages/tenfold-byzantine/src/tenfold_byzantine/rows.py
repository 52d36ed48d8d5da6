"""A finished game as one row of the result table.

A row holds nothing that depends on time or machine, so that equal games give equal rows. Its
nested tables become dotted columns in CSV and Parquet.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError
from tenfold.files import replacing, write_text
from tenfold.seeds import content_hash

from tenfold_byzantine.result import GameResult

Row = dict[str, Any]

COLUMNS = (
    "sweep", "game_id", "cell", "replicate", "seed", "n_honest", "n_byzantine", "max_rounds",
    "outcome", "rounds", "first_unanimous", "decided", "properties", "flags", "metrics", "counters",
    "error", "course", "state_hash",
)  # fmt: skip
"""Keys of a row, in order."""


def game_row(
    result: GameResult,
    *,
    cell: Mapping[str, Any] | None = None,
    replicate: int = 0,
    sweep: str = "",
) -> Row:
    """The row of a game.

    Args:
        result: the game.
        cell: its coordinates in a grid, dotted setting → value.
        replicate: its number within the cell.
        sweep: what it is part of.

    `decided` is the value all honest agents hold at the end, None where they differ;
    `first_unanimous` the first round in which they held one value, whatever it was. `course` is
    a hash of roles, values and votes alone: equal for games that went the same way, whoever played.
    """
    game = result.settings.get("game", result.settings)
    honest = result.honest
    unanimous = [len({held[i] for i in honest}) == 1 for held in result.held]
    decided = result.held[-1][honest[0]] if unanimous and unanimous[-1] else None
    return {
        "sweep": sweep,
        "game_id": result.game_id,
        "cell": dict(cell or {}),
        "replicate": replicate,
        "seed": result.seed,
        "n_honest": len(honest),
        "n_byzantine": len(result.roles) - len(honest),
        "max_rounds": int(game.get("max_rounds", result.rounds)),
        "outcome": result.outcome.value,
        "rounds": result.rounds,
        "first_unanimous": unanimous.index(True) + 1 if True in unanimous else None,
        "decided": decided,
        "properties": asdict(result.properties) if result.properties else {},
        "flags": dict(result.flags),
        "metrics": dict(result.metrics),
        "counters": dict(result.counters),
        "error": result.error,
        "course": content_hash(
            [result.roles, result.initial, result.held, result.proposed, result.votes]
        ),
        "state_hash": result.state_hash,
    }


def top(row: Mapping[str, Any]) -> str:
    """`VALID`, `INVALID`, `PREMATURE`, `TIMEOUT` or `ERROR`."""
    return str(row["outcome"]).partition(".")[0]


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with dotted names for what is nested (`metrics.quality`); lists become text."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            out |= {f"{name}.{key}": _plain(inner) for key, inner in value.items()}
        else:
            out[name] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Mapping | list | tuple) else value


def table(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of flat rows; columns in the order of `COLUMNS`, then by name."""
    lines = [flat(row) for row in rows]
    place = {name: index for index, name in enumerate(COLUMNS)}
    names = {name for line in lines for name in line}
    columns = sorted(names, key=lambda n: (place.get(n.partition(".")[0], len(place)), n))
    return columns, [[line.get(name) for name in columns] for line in lines]


def table_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The result table as CSV."""
    columns, lines = table(rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if v is None else v for v in line] for line in lines)
    return buffer.getvalue()


def export(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the result table; the ending chooses CSV, Parquet or JSON lines.

    Raises:
        ConfigError: another ending, or pyarrow is missing for Parquet.
    """
    form = path.suffix.lower()
    if form == ".csv":
        write_text(path, table_text(rows))
    elif form == ".parquet":
        _parquet(rows, path)
    elif form == ".jsonl":
        import json

        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        raise ConfigError(
            f"cannot write a table to {path.name}: the name must end in .csv, .parquet or .jsonl"
        )


def _parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "a Parquet table needs pyarrow", hint="pip install pyarrow, or write .csv"
        ) from error
    columns, lines = table(rows)
    arrays = [pa.array(_one_type([line[i] for line in lines])) for i in range(len(columns))]
    with replacing(path) as temporary:
        parquet.write_table(pa.table(dict(zip(columns, arrays, strict=True))), temporary)


def _one_type(values: list[Any]) -> list[Any]:
    """Values that an Arrow column can hold: all numbers, or all of one type, or text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return [None if v is None else float(v) for v in values]
    if len(kinds) > 1:
        return [None if v is None else str(v) for v in values]
    return values
