"""Rows of files, streamed in order or fetched by their place; and JSON Lines.

Every row knows its file, line and byte offset. Nothing holds a whole file.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

from tenfold.builtin.columns import Row
from tenfold.builtin.paths import FileSet
from tenfold.builtin.selection import shuffle
from tenfold.errors import ConfigError

_BOM = codecs.BOM_UTF8


class Place(NamedTuple):
    """Where a row lies: number of the file, line or row (1-based), and an address in it."""

    file: int
    number: int
    address: int


class Places:
    """Places of many rows, in three machine integers each."""

    def __init__(self) -> None:
        self._columns = (array("q"), array("q"), array("q"))

    def append(self, place: Place) -> None:
        """One more place."""
        for column, value in zip(self._columns, place, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> Place:
        file, number, address = self._columns
        return Place(file[index], number[index], address[index])


class RowSource(Protocol):
    """Rows of some files."""

    files: FileSet

    def rows(self) -> Iterator[tuple[Place, Row]]:
        """All rows in order; raises ConfigError for a bad one."""
        ...

    def fetch(self, places: Iterable[Place]) -> Iterator[Row]:
        """The rows at these places, in this order."""
        ...

    def order(self, places: Places, seed: int) -> array[int]:
        """The rows' numbers (from 0) in a shuffled order that this source can fetch fast."""
        ...

    def where(self, place: Place) -> str:
        """File and line of a place, for messages."""
        ...


class LineSource:
    """What line-based files share: a row is found by the offset of its first byte."""

    def __init__(self, files: FileSet) -> None:
        self.files = files

    def where(self, place: Place) -> str:
        """File and line of a place."""
        return f"{self.files.paths[place.file]}, line {place.number}"

    def order(self, places: Places, seed: int) -> array[int]:
        """Any order will do."""
        order = array("q", range(len(places)))
        shuffle(order, seed)
        return order

    def open(self, number: int) -> BinaryIO:
        """One of the files; raises ConfigError when it cannot be read."""
        path = self.files.paths[number]
        try:
            return path.open("rb")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error}") from error

    def fetch(self, places: Iterable[Place]) -> Iterator[Row]:
        """The rows at these places."""
        for place in places:
            with self.open(place.file) as file:
                file.seek(place.address)
                yield self.parse(place, file)

    def parse(self, place: Place, file: BinaryIO) -> Row:
        """The row that begins at the file's position."""
        raise NotImplementedError


class JsonLines(LineSource):
    """One JSON object per line, UTF-8; blank lines are skipped."""

    def rows(self) -> Iterator[tuple[Place, Row]]:
        """All rows in order.

        Raises:
            ConfigError: a line is no JSON object; names file and line.
        """
        for number in range(len(self.files.paths)):
            with self.open(number) as file:
                offset = 0
                for line, raw in enumerate(file, 1):
                    if raw.strip():
                        place = Place(number, line, offset)
                        yield place, json_row(raw, self.where(place))
                    offset += len(raw)

    def parse(self, place: Place, file: BinaryIO) -> Row:
        """The row that begins at the file's position."""
        return json_row(file.readline(), self.where(place))


def json_row(raw: bytes, where: str) -> Row:
    """The JSON object of a line (UTF-8); `where` names file and line in messages.

    Raises:
        ConfigError: the line is no JSON object.
    """
    try:
        row = json.loads(raw.removeprefix(_BOM))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}; write one object per line") from None
    if not isinstance(row, dict):
        raise ConfigError(
            f"{where}: is a JSON {type(row).__name__}, not an object; "
            'write one {"column": value} per line'
        )
    return row
