"""Records from JSON Lines, CSV and Parquet files: `core:jsonl`, `core:csv-prompts`, ...

A dataset's record kind is part of its description, so each pair of format and kind is a
component of its own; all are one class. The first use reads everything once: bad rows and
doubled ids are found before any work is done, and only places are kept.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tenfold.builtin.columns import Columns, Field
from tenfold.builtin.paths import find_files
from tenfold.builtin.row_sources import JsonLines, Place, Places, RowSource
from tenfold.builtin.selection import Selection, Splits
from tenfold.errors import ConfigError
from tenfold.records import Record
from tenfold.seeds import content_hash

VERSION = 1


@dataclass(frozen=True, slots=True)
class _Index:
    """What one reading found: where rows lie, and which derived ids need a number because
    another row has the same content (row → 2, 3, ...)."""

    places: Places
    repeats: dict[int, int]
    stamps: list[tuple[int, int]]


class Table:
    """Records of the rows of some files.

    Args:
        source: where rows come from.
        columns: how a row becomes a record.
        splits: parts, by record id.
        selection: limit and shuffle.
    """

    def __init__(
        self, source: RowSource, columns: Columns, splits: Splits, selection: Selection
    ) -> None:
        self.kind = columns.kind
        self.source, self.columns = source, columns
        self._splits, self._selection = splits, selection
        self._known: _Index | None = None

    def splits(self) -> Sequence[str]:
        """`train` and the parts whose share is above 0."""
        return self._splits.names()

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[Record]:
        """Records in the files' order, or shuffled (Parquet: by row group).

        Raises:
            ConfigError: a bad row, or two rows with one id; names file and line.
        """
        name = self._splits.check(split)
        index = self._index()
        seed = self._selection.seed(shuffle_seed)
        if seed is None:
            numbered = enumerate(self.source.rows())
            rows = ((number, place, row) for number, (place, row) in numbered)
        else:
            order = self.source.order(index.places, seed)
            places = (index.places[number] for number in order)
            fetched = self.source.fetch(places)
            rows = ((n, index.places[n], row) for n, row in zip(order, fetched, strict=True))
        records = (self._record(index, *row) for row in rows)
        wanted = (record for record in records if self._splits.holds(name, record.id))
        return islice(wanted, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of the files' contents and of what selects from them; checks every row."""
        name = self._splits.check(split)
        self._index()
        fields = [(f.name, f.column) for f in self.columns.fields]
        settings = [self.kind, fields, self.columns.id_column, name]
        shares = [self._splits.validation, self._splits.test]
        selection = [self._selection.limit, self._selection.shuffle_seed]
        content = self.source.files.digests()
        form = type(self.source).__name__
        return content_hash(["table", VERSION, form, settings, shares, selection, content])

    def _record(self, index: _Index, number: int, place: Place, row: Any) -> Record:
        record = self.columns.record(row, self.source.where(place)).record
        repeat = index.repeats.get(number)
        return replace(record, id=f"{record.id}-{repeat}") if repeat else record

    def _index(self) -> _Index:
        """The index, made anew when a file changed."""
        stamps = self.source.files.stamps()
        if self._known is None or self._known.stamps != stamps:
            self._known = self._read(stamps)
        return self._known

    def _read(self, stamps: list[tuple[int, int]]) -> _Index:
        places, hashes, derived = Places(), array("Q"), array("b")
        for place, row in self.source.rows():
            mapped = self.columns.record(row, self.source.where(place))
            places.append(place)
            hashes.append(_short_hash(mapped.record.id))
            derived.append(mapped.derived)
        if not places:
            raise ConfigError(f"there is no row in {_names(self.source.files.paths)}")
        repeats: dict[int, int] = {}
        # Sorting is stable, so equal ids stand together, in the files' order.
        order = sorted(range(len(hashes)), key=hashes.__getitem__)
        for first, second in pairwise(order):
            if hashes[first] != hashes[second]:
                continue
            if not (derived[first] and derived[second]):
                raise self._doubled(places[first], places[second])
            repeats[second] = repeats.get(first, 1) + 1
        return _Index(places, repeats, stamps)

    def _doubled(self, first: Place, second: Place) -> ConfigError:
        where = self.source.where(second)
        row = next(iter(self.source.fetch([second])))
        name = self.columns.record(row, where).record.id
        return ConfigError(
            f"{where}: the id {name!r} was already used in {self.source.where(first)}",
            hint=f"make the ids unique, or set id_column to a column other than "
            f"{self.columns.id_column!r}",
        )


def _short_hash(text: str) -> int:
    """64 bits of SHA-256: among 10 million ids two collide with probability 3e-6."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


def _names(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, such as {paths[0]}"


# --- one factory per component --------------------------------------------------------------


def _text_fields(text_column: str = "text") -> tuple[Field, ...]:
    return (Field("text", text_column),)


def _prompt_fields(
    prompt_column: str = "prompt", reference_column: str = "reference"
) -> tuple[Field, ...]:
    prompt = Field("prompt", prompt_column, messages=True)
    return prompt, Field("reference", reference_column, optional=True)


def _preference_fields(
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
) -> tuple[Field, ...]:
    prompt = Field("prompt", prompt_column, messages=True)
    return prompt, Field("chosen", chosen_column), Field("rejected", rejected_column)


_FIELDS: dict[str, Callable[..., tuple[Field, ...]]] = {
    "text": _text_fields,
    "prompt": _prompt_fields,
    "preference": _preference_fields,
}


def make_table(
    form: str,
    kind: str,
    *,
    path: str | Path,
    id_column: str = "id",
    encoding: str = "utf-8",
    split: str = "train",
    validation: float = 0.0,
    test: float = 0.0,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    **columns: str,
) -> Table:
    """A dataset of `kind` records from `jsonl`, `csv` or `parquet` files.

    Args:
        form: the format.
        kind: `text`, `prompt` or `preference`.
        path: a file, a folder (its `*.<form>` files), or a glob.
        id_column: column of the id; where it is missing, ids come from the content.
        encoding: of CSV files.
        split: the split that `load` reads by default.
        validation: share of records in `validation`.
        test: share of records in `test`.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.
        columns: `text_column`, `prompt_column`, ...: where a field stands.

    Raises:
        ConfigError: nothing at `path`, or bad shares.
    """
    files = find_files(path, f"**/*.{form}")
    source: RowSource
    if form == "jsonl":
        source = JsonLines(files)
    elif form == "csv":
        from tenfold.builtin.csv_rows import Csv

        source = Csv(files, encoding)
    else:
        from tenfold.builtin.parquet import Parquet

        source = Parquet(files)
    mapping = Columns(kind, _FIELDS[kind](**columns), id_column)
    return Table(source, mapping, Splits(split, validation, test), Selection(limit, shuffle_seed))


jsonl_text = partial(make_table, "jsonl", "text")
jsonl_prompt = partial(make_table, "jsonl", "prompt")
jsonl_preference = partial(make_table, "jsonl", "preference")
csv_text = partial(make_table, "csv", "text")
csv_prompt = partial(make_table, "csv", "prompt")
csv_preference = partial(make_table, "csv", "preference")
parquet_text = partial(make_table, "parquet", "text")
parquet_prompt = partial(make_table, "parquet", "prompt")
parquet_preference = partial(make_table, "parquet", "preference")
