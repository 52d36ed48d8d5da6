"""Rows of Parquet files, streamed by row group. Needs pyarrow (`tenfold[parquet]`)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pyarrow
import pyarrow.parquet

from tenfold.builtin.columns import Row
from tenfold.builtin.paths import FileSet
from tenfold.builtin.row_sources import Place, Places
from tenfold.builtin.selection import shuffle
from tenfold.errors import ConfigError

_ROWS_PER_BATCH = 1024


class Parquet:
    """Rows as dictionaries; a place's address is its row group.

    At most one row group is in memory. A shuffle orders row groups, then the rows inside
    each: finding single rows in any order would read a group for each of them.
    """

    def __init__(self, files: FileSet) -> None:
        self.files = files

    def where(self, place: Place) -> str:
        """File and row of a place."""
        return f"{self.files.paths[place.file]}, row {place.number}"

    def rows(self) -> Iterator[tuple[Place, Row]]:
        """All rows in order.

        Raises:
            ConfigError: a file is no Parquet file.
        """
        for number in range(len(self.files.paths)):
            with self._open(number) as file:
                row = 0
                for group in range(file.metadata.num_row_groups):
                    batches = file.iter_batches(_ROWS_PER_BATCH, row_groups=[group])
                    for batch in batches:
                        for content in batch.to_pylist():
                            row += 1
                            yield Place(number, row, group), content

    def fetch(self, places: Iterable[Place]) -> Iterator[Row]:
        """The rows at these places; neighbours in one row group share one read."""
        for (number, group), members in groupby(places, key=lambda p: (p.file, p.address)):
            with self._open(number) as file:
                first = sum(file.metadata.row_group(g).num_rows for g in range(group))
                table = file.read_row_group(group)
                for place in members:
                    yield table.slice(place.number - 1 - first, 1).to_pylist()[0]

    def order(self, places: Places, seed: int) -> array[int]:
        """Row groups in a shuffled order, and shuffled rows inside each."""
        groups: dict[tuple[int, int], array[int]] = {}
        for index in range(len(places)):
            place = places[index]
            groups.setdefault((place.file, place.address), array("q")).append(index)
        keys = list(groups)
        shuffle(keys, seed, "groups")
        order = array("q")
        for key in keys:
            shuffle(groups[key], seed, *key)
            order.extend(groups[key])
        return order

    def _open(self, number: int) -> Any:
        path = self.files.paths[number]
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ConfigError(f"cannot read {path} as Parquet: {error}") from error
