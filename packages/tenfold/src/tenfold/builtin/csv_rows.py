"""Rows of CSV files with a header line. Quoted cells may hold line breaks."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from tenfold.builtin.columns import Row
from tenfold.builtin.paths import FileSet
from tenfold.builtin.row_sources import LineSource, Place
from tenfold.errors import ConfigError

_LONGEST_CELL = 2**31 - 1
"""The csv module refuses cells above 131,072 characters by default; texts are longer."""


class Csv(LineSource):
    """Rows as `{column: text}`; an empty cell counts as missing."""

    def __init__(self, files: FileSet, encoding: str = "utf-8") -> None:
        super().__init__(files)
        self.encoding = encoding
        self._headers: dict[int, list[str]] = {}
        csv.field_size_limit(_LONGEST_CELL)

    def rows(self) -> Iterator[tuple[Place, Row]]:
        """All rows in order.

        Raises:
            ConfigError: no header, bad quoting, or a row that does not fit the header; names
                file and line.
        """
        for number in range(len(self.files.paths)):
            with self.open(number) as file:
                lines = _Lines(file, self.encoding, 0)
                header = self._header(number, lines)
                while True:
                    place = Place(number, lines.line + 1, lines.offset)
                    cells = self._next(lines, place)
                    if cells is None:
                        break
                    if cells:
                        yield place, self._row(place, header, cells)

    def parse(self, place: Place, file: BinaryIO) -> Row:
        """The row that begins at the file's position."""
        if place.file not in self._headers:
            with self.open(place.file) as other:
                self._header(place.file, _Lines(other, self.encoding, 0))
        cells = self._next(_Lines(file, self.encoding, place.number - 1), place)
        return self._row(place, self._headers[place.file], cells or [])

    def _header(self, number: int, lines: _Lines) -> list[str]:
        place = Place(number, 1, 0)
        header = self._next(lines, place)
        if not header:
            raise ConfigError(f"{self.where(place)}: no header; write the columns' names there")
        twice = [name for name, count in Counter(header).items() if count > 1]
        if twice:
            raise ConfigError(f"{self.where(place)}: the column {twice[0]!r} is there twice")
        self._headers[number] = header
        return header

    def _next(self, lines: _Lines, place: Place) -> list[str] | None:
        """The next row's cells, None at the end of the file."""
        try:
            return next(csv.reader(lines, strict=True), None)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.files.paths[place.file]}, line {lines.line}: byte "
                f"0x{error.object[error.start]:02x} is not {self.encoding}",
                hint='set encoding, such as "latin-1"',
            ) from None
        except csv.Error as error:
            raise ConfigError(
                f"{self.where(place)}: not valid CSV: {error}; quote cells that hold commas, "
                'quotes or line breaks, and double the quotes inside (" becomes "")'
            ) from None

    def _row(self, place: Place, header: list[str], cells: list[str]) -> Row:
        if len(cells) != len(header):
            raise ConfigError(
                f"{self.where(place)}: has {len(cells)} cells, but the header names "
                f"{len(header)} columns ({', '.join(header)})"
            )
        return {name: cell or None for name, cell in zip(header, cells, strict=True)}


class _Lines:
    """Decoded lines of a binary file that know their number and offset.

    The csv module takes one line after the other until a row is whole, so `offset` is where
    the next row begins.
    """

    def __init__(self, file: BinaryIO, encoding: str, line: int) -> None:
        self._file, self._encoding = file, encoding
        self.line, self.offset = line, file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._file.readline()
        if not raw:
            raise StopIteration
        text = raw if self.offset else raw.removeprefix(codecs.BOM_UTF8)
        self.offset += len(raw)
        self.line += 1
        return text.decode(self._encoding)
