"""`nvium:spec-bench`: prompts in the format of Spec-Bench, the first turn of each question.

One JSON object per line with `question_id`, `category` and `turns`, a list of strings; other
columns are kept as metadata. The file is read as a whole before the first record is given, so
that a bad line is found before any work is done. It is not shipped: give your own copy.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.builtin.row_sources import json_row
from tenfold.errors import ConfigError, nearest
from tenfold.records import PromptRecord
from tenfold.seeds import content_hash, derive

VERSION = 1
_COLUMNS = ("question_id", "category", "turns")


class SpecBench:
    """Prompt records by line; ids are question ids, `category` is a metadata column.

    Args:
        path: a JSON Lines file.
        categories: only these categories; empty means all.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: no such file.
    """

    kind = "prompt"

    def __init__(
        self,
        path: str | Path,
        categories: Sequence[str] = (),
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.categories = tuple(categories)
        self.limit, self.shuffle_seed = limit, shuffle_seed
        if not self.path.is_file():
            raise ConfigError(
                f"{self.path} is no file; give a JSON Lines file with question_id, category, turns",
                hint="core:python-prompts needs no file",
            )

    def splits(self) -> Sequence[str]:
        """`test` alone."""
        return ("test",)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[PromptRecord]:
        """Records by line, or shuffled.

        Raises:
            ConfigError: a bad line (names file and line), an unknown split or category.
        """
        if split not in ("", *self.splits()):
            raise ConfigError(f"no split {split!r} (splits: test)")
        records = self._records()
        seed = self.shuffle_seed if shuffle_seed is None else shuffle_seed
        if seed is not None:
            random.Random(derive(seed, "spec-bench")).shuffle(records)
        limits = [n for n in (self.limit, limit) if n is not None]
        return islice(iter(records), min(limits, default=None))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the file's content and of what selects from it."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        selection = [list(self.categories), self.limit, self.shuffle_seed]
        return content_hash(["spec-bench", VERSION, digest, selection])

    def _records(self) -> list[PromptRecord]:
        """Every wanted record, after checking all lines."""
        found: list[PromptRecord] = []
        lines: dict[str, int] = {}
        seen: dict[str, None] = {}
        for number, raw in enumerate(self.path.read_bytes().split(b"\n"), 1):
            if not raw.strip():
                continue
            record = parse_line(raw, f"{self.path}, line {number}")
            if record.id in lines:
                raise ConfigError(
                    f"{self.path}, line {number}: question_id {record.id} was already used in "
                    f"line {lines[record.id]}; make it unique"
                )
            lines[record.id] = number
            category = record.metadata["category"]
            seen[category] = None
            if not self.categories or category in self.categories:
                found.append(record)
        if not lines:
            raise ConfigError(f"{self.path} holds no question; write one JSON object per line")
        for name in self.categories:
            if name not in seen:
                raise ConfigError(
                    f"{self.path} has no category {name!r}{nearest(name, seen)} "
                    f"(categories: {', '.join(seen)})"
                )
        return found


def parse_line(raw: bytes, where: str) -> PromptRecord:
    """The record of one line; `where` names file and line in messages.

    Raises:
        ConfigError: the line is no question.
    """
    row = json_row(raw, where)
    for name in _COLUMNS:
        if row.get(name) is None:
            raise ConfigError(
                f"{where}: {name!r} is missing{nearest(name, row)} "
                f"(columns here: {', '.join(map(repr, row)) or 'none'})"
            )
    number, category, turns = (row[name] for name in _COLUMNS)
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise _wrong(where, "question_id", number, "an integer or a string")
    if not isinstance(category, str):
        raise _wrong(where, "category", category, "a string")
    if not isinstance(turns, list) or not turns:
        raise _wrong(where, "turns", turns, "a list with at least one string")
    for i, turn in enumerate(turns):
        if not isinstance(turn, str) or not turn.strip():
            raise _wrong(where, f"turns[{i}]", turn, "a string that is not blank")
    other = {key: value for key, value in row.items() if key not in _COLUMNS}
    return PromptRecord(
        id=str(number),
        prompt=turns[0],
        metadata={**other, "category": category, "turns": len(turns)},
    )


def _wrong(where: str, name: str, value: Any, right: str) -> ConfigError:
    text = repr(value)
    shown = text if len(text) <= 60 else text[:59] + "…"
    return ConfigError(f"{where}: {name} is {shown}; it must be {right}")
