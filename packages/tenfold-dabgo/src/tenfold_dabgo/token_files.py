"""Corpora that are tokens already: `.npy` arrays, JSON Lines, Hugging Face folders.

Records are text records whose metadata column `input_ids` holds the token ids; attribution takes
those as they are and encodes only texts without them. Ids must come from the model's own
tokenizer, which is checked against its vocabulary size. Record ids are stable: the row's own, or
the file's name and the row's number.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.builtin.columns import plain
from tenfold.builtin.paths import find_files
from tenfold.builtin.row_sources import json_row
from tenfold.builtin.selection import Selection, shuffle
from tenfold.errors import ComponentError, ConfigError, nearest
from tenfold.records import TextRecord
from tenfold.seeds import content_hash

from tenfold_dabgo.corpus import INPUT_IDS as IDS

VERSION = 1


class TokenRecords:
    """What the formats share: numbered rows, one split, limit and shuffle.

    Subclasses say how many rows there are, what one is, and what their content hashes to.
    """

    kind = "text"
    form = ""

    def __init__(self, limit: int | None, shuffle_seed: int | None) -> None:
        self._selection = Selection(limit, shuffle_seed)

    def splits(self) -> Sequence[str]:
        """One split."""
        return ("all",)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[TextRecord]:
        """Records in the files' order, or shuffled.

        Raises:
            ConfigError: no such split, or a bad row; names file and row.
        """
        if split not in ("", "all"):
            raise ConfigError(f"no split {split!r} (splits: all)")
        order = list(range(self.count()))
        seed = self._selection.seed(shuffle_seed)
        if seed is not None:
            shuffle(order, seed)
        for number in order[: self._selection.count(limit)]:
            yield self.record(number)

    def fingerprint(self, split: str = "") -> str:
        """Hash of the contents and of what selects from them."""
        selection = [self._selection.limit, self._selection.shuffle_seed]
        return content_hash(["tokens", VERSION, self.form, selection, self.content()])

    def count(self) -> int:
        """Number of rows."""
        raise NotImplementedError

    def record(self, number: int) -> TextRecord:
        """One row, from 0."""
        raise NotImplementedError

    def content(self) -> Any:
        """JSON-able facts that change when the content does."""
        raise NotImplementedError


class NpyTokens(TokenRecords):
    """Token arrays: one text per row of a `[N, T]` array, or one per `[T]` array.

    Arrays are read through a memory map, so a corpus may be larger than memory.

    Args:
        path: a `.npy` file, a folder of them, or a glob.
        pad_id: this id at the end of a row is padding; None keeps every id.
        columns: JSON Lines file with one object per text, in order: `id`, `author`, ...
        limit: at most this many texts.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: a file is no array of whole numbers with one or two axes, or `columns` has
            another number of lines.
    """

    form = "npy"

    def __init__(
        self,
        path: str | Path,
        pad_id: int | None = None,
        columns: str | Path | None = None,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(limit, shuffle_seed)
        self.files = find_files(path, "**/*.npy")
        self.pad_id = pad_id
        self.arrays = [_open(file) for file in self.files.paths]
        self.ends = np.cumsum([len(array) for array in self.arrays])
        self.columns_path = None if columns is None else Path(columns)
        self.columns = [] if columns is None else _lines(Path(columns))
        if columns is not None and len(self.columns) != self.count():
            raise ConfigError(
                f"{columns} has {len(self.columns)} lines for {self.count()} texts of {path}"
            )

    def count(self) -> int:
        """Rows of all arrays."""
        return int(self.ends[-1])

    def record(self, number: int) -> TextRecord:
        """One row, its padding cut."""
        file = int(np.searchsorted(self.ends, number, side="right"))
        array = self.arrays[file]
        row = number - int(self.ends[file]) + len(array)
        ids = array[row]
        if self.pad_id is not None:
            real = np.flatnonzero(ids != self.pad_id)
            ids = ids[: real[-1] + 1] if real.size else ids[:0]
        columns = dict(self.columns[number]) if self.columns else {}
        stem = self.files.name(self.files.paths[file]).removesuffix(".npy")
        name = columns.pop("id", None) or (stem if len(array) == 1 else f"{stem}:{row}")
        return token_record(str(name), ids.tolist(), columns)

    def content(self) -> Any:
        """Names and contents of all files."""
        names = [self.files.name(path) for path in self.files.paths]
        return [names, self.files.digests(), self.pad_id, self.columns]


def _open(path: Path) -> np.ndarray:
    """`[N, T]` ids, not read yet."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a .npy array: {error}") from error
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"{path} holds {array.dtype} with {array.ndim} axes; token ids are whole numbers "
            "with one axis (one text) or two (a text per row)"
        )
    return array if array.ndim == 2 else array[None]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return [dict(json_row(x, f"{path}, line {i}")) for i, x in enumerate(raw, 1) if x.strip()]


class JsonlTokens(TokenRecords):
    """JSON Lines whose rows hold `input_ids`, or `text`, or both (then the ids count).

    Other columns become metadata.

    Args:
        path: a file, a folder of `.jsonl` files, or a glob.
        ids_column: column of the token ids.
        text_column: column of the text.
        id_column: column of the id; where it is missing, file and line.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: a row has neither ids nor text, or ids that are no list of whole numbers.
    """

    form = "jsonl"

    def __init__(
        self,
        path: str | Path,
        ids_column: str = IDS,
        text_column: str = "text",
        id_column: str = "id",
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(limit, shuffle_seed)
        self.files = find_files(path, "**/*.jsonl")
        self.names = (ids_column, text_column, id_column)
        self._places: list[tuple[int, int, int]] | None = None

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """File, line and byte offset of every row."""
        if self._places is None:
            self._places = []
            for number, path in enumerate(self.files.paths):
                offset = 0
                with path.open("rb") as file:
                    for line, raw in enumerate(file, 1):
                        if raw.strip():
                            self._places.append((number, line, offset))
                        offset += len(raw)
        return self._places

    def count(self) -> int:
        """Lines that are not blank."""
        return len(self.places)

    def record(self, number: int) -> TextRecord:
        """One line."""
        file, line, offset = self.places[number]
        path = self.files.paths[file]
        with path.open("rb") as stream:
            stream.seek(offset)
            row = json_row(stream.readline(), f"{path}, line {line}")
        where = f"{path}, line {line}"
        return row_record(row, self.names, where, f"{self.files.name(path)}:{line}")

    def content(self) -> Any:
        """Contents of all files."""
        return [self.files.digests(), self.names]


class HfDisk(TokenRecords):
    """A folder that `datasets.Dataset.save_to_disk` wrote, or one split of a `DatasetDict`.

    Rows hold `input_ids` (with an optional `attention_mask`, whose zeros are cut), or `text`.

    Args:
        path: the folder.
        split: of a `DatasetDict`; left out: its only one.
        ids_column: column of the token ids.
        text_column: column of the text.
        id_column: column of the id; where it is missing, the row's number.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ComponentError: the module `datasets` is not installed.
        ConfigError: no such folder or split, or rows with neither ids nor text.
    """

    form = "hf-disk"

    def __init__(
        self,
        path: str | Path,
        split: str = "",
        ids_column: str = IDS,
        text_column: str = "text",
        id_column: str = "id",
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(limit, shuffle_seed)
        self.path, self.names = Path(path), (ids_column, text_column, id_column)
        self.rows = _from_disk(self.path, split)
        self.split = split

    def count(self) -> int:
        """Rows of the table."""
        return len(self.rows)

    def record(self, number: int) -> TextRecord:
        """One row."""
        row = dict(self.rows[number])
        mask, ids = row.pop("attention_mask", None), row.get(self.names[0])
        if mask is not None and ids is not None:
            row[self.names[0]] = [i for i, m in zip(ids, mask, strict=True) if m]
        return row_record(row, self.names, f"{self.path}, row {number + 1}", f"row:{number}")

    def content(self) -> Any:
        """Contents of the table's files (not those of its cache)."""
        files = find_files(self.path, "**/*")
        named = [(files.name(p), d) for p, d in zip(files.paths, files.digests(), strict=True)]
        return [[row for row in named if row[0].endswith((".arrow", ".json"))], self.split,
                self.names]  # fmt: skip


def _from_disk(path: Path, split: str) -> Any:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ComponentError(
            "a folder of Hugging Face datasets needs the module 'datasets', which is not installed",
            hint='pip install "tenfold-dabgo[datasets]"',
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is no dataset folder: {str(error).splitlines()[0]}",
            hint="it is what `Dataset.save_to_disk` writes",
        ) from error
    if not isinstance(found, Mapping):
        if split:
            raise ConfigError(f"{path} is a single dataset without splits, not {split!r}")
        return found
    name = split or (next(iter(found)) if len(found) == 1 else "")
    if name not in found:
        raise ConfigError(
            f"{path} has no split {split!r}{nearest(split, found)}; it has: {', '.join(found)}"
        )
    return found[name]


def row_record(
    row: Mapping[str, Any], names: tuple[str, str, str], where: str, fallback: str
) -> TextRecord:
    """The record of a row with ids or text, under the column names (ids, text, id)."""
    ids_column, text_column, id_column = names
    ids, text, name = row.get(ids_column), row.get(text_column), row.get(id_column)
    rest = {k: plain(v) for k, v in row.items() if k not in names}
    key = fallback if name is None else str(name)
    if ids is not None:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ConfigError(f"{where}: {ids_column!r} is not a list of whole numbers")
        return token_record(key, ids, rest, text if isinstance(text, str) else "")
    if isinstance(text, str):
        return TextRecord(id=key, text=text, metadata=rest)
    raise ConfigError(
        f"{where}: has neither {ids_column!r} (a list of whole numbers) nor {text_column!r} "
        f"(a string); it has: {', '.join(map(json.dumps, row)) or 'nothing'}"
    )


def token_record(
    name: str, ids: list[int], columns: Mapping[str, Any], text: str = ""
) -> TextRecord:
    """A text record that carries its token ids."""
    return TextRecord(id=name, text=text, metadata={**columns, IDS: ids})
