"""`core:text`: text files as records, one per file, paragraph or line.

Streams: no file is held as a whole unless it is one record. Shuffling keeps the places of
records (a few integers each), not their texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tenfold.builtin.paths import FileSet, find_files
from tenfold.builtin.selection import Selection, Splits, shuffle
from tenfold.errors import ConfigError
from tenfold.records import TextRecord
from tenfold.seeds import content_hash

VERSION = 1
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of one record and where they lie: number of the file, line (1-based), offset."""

    file: int
    line: int
    offset: int
    content: bytes


class TextFiles:
    """Text records of files.

    Ids are the file's name below `path`, with `:<line>` for paragraphs and lines. Metadata:
    `file`, `lineno` and `author`, the name of the folder that holds the file's corpus (the
    first folder below `path`, or `path`'s own).

    Args:
        path: a file, a folder, or a glob.
        pattern: which files of a folder.
        unit: `file`, `paragraph` (separated by blank lines) or `line`.
        encoding: `utf-8`, `latin-1` or `cp1252`.
        min_chars: shorter texts are left out; blank ones always are.
        max_chars: longer texts are left out.
        split: the split that `load` reads by default.
        validation: share of files (of records, for a single file) in `validation`.
        test: share of files (of records, for a single file) in `test`.
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: nothing at `path`, or bad shares.
    """

    kind = "text"

    def __init__(
        self,
        path: str | Path,
        pattern: str = "**/*",
        unit: str = "file",
        encoding: str = "utf-8",
        min_chars: int = 1,
        max_chars: int | None = None,
        split: str = "train",
        validation: float = 0.0,
        test: float = 0.0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.files = find_files(path, pattern)
        self.unit, self.encoding = unit, encoding
        self.min_chars, self.max_chars = min_chars, max_chars
        self._splits = Splits(split, validation, test)
        self._selection = Selection(limit, shuffle_seed)

    def splits(self) -> Sequence[str]:
        """`train` and the parts whose share is above 0."""
        return self._splits.names()

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[TextRecord]:
        """Records by file name and line, or shuffled.

        Raises:
            ConfigError: a file cannot be read or decoded; names file and line.
        """
        name = self._splits.check(split)
        seed = self._selection.seed(shuffle_seed)
        pieces = self._pieces(name) if seed is None else self._shuffled(name, seed)
        records = (record for piece in pieces if (record := self._record(piece, name)))
        return islice(records, self._selection.count(limit))

    def fingerprint(self, split: str = "") -> str:
        """Hash of names and contents of the split's files, and of what selects from them."""
        name = self._splits.check(split)
        settings = [self.unit, self.encoding, self.min_chars, self.max_chars, name]
        shares = [self._splits.validation, self._splits.test]
        selection = [self._selection.limit, self._selection.shuffle_seed]
        content = [[self.files.name(p), d] for p, d in self._digests(name)]
        return content_hash(["text", VERSION, settings, shares, selection, content])

    def _digests(self, split: str) -> Iterator[tuple[Path, str]]:
        chosen = [self.files.paths[i] for i in self._files_of(split)]
        return zip(chosen, FileSet(self.files.root, chosen).digests(), strict=True)

    @property
    def _by_file(self) -> bool:
        return len(self.files.paths) > 1

    def _files_of(self, split: str) -> list[int]:
        if not self._by_file:
            return [0]
        names = [self.files.name(path) for path in self.files.paths]
        return [i for i, name in enumerate(names) if self._splits.holds(split, name)]

    def _pieces(self, split: str) -> Iterator[_Piece]:
        cut = {"file": _whole, "paragraph": _paragraphs, "line": _lines}[self.unit]
        for number in self._files_of(split):
            try:
                with self.files.paths[number].open("rb") as file:
                    yield from cut(file, number)
            except OSError as error:
                raise ConfigError(f"cannot read {self.files.paths[number]}: {error}") from error

    def _shuffled(self, split: str, seed: int) -> Iterator[_Piece]:
        numbers, lines, offsets, sizes = (array("q") for _ in range(4))
        for piece in self._pieces(split):
            numbers.append(piece.file)
            lines.append(piece.line)
            offsets.append(piece.offset)
            sizes.append(len(piece.content))
        order = array("q", range(len(numbers)))
        shuffle(order, seed)
        for i in order:
            with self.files.paths[numbers[i]].open("rb") as file:
                file.seek(offsets[i])
                yield _Piece(numbers[i], lines[i], offsets[i], file.read(sizes[i]))

    def _record(self, piece: _Piece, split: str) -> TextRecord | None:
        """The piece's record, or None when it is not wanted."""
        path = self.files.paths[piece.file]
        name = self.files.name(path)
        text = self._text(piece, path)
        too_long = self.max_chars is not None and len(text) > self.max_chars
        if not text.strip() or len(text) < self.min_chars or too_long:
            return None
        key = name if self.unit == "file" else f"{name}:{piece.line}"
        if not self._by_file and not self._splits.holds(split, key):
            return None
        folders = path.relative_to(self.files.root).parts[:-1]
        author = folders[0] if folders else self.files.root.name
        metadata = {"file": name, "lineno": piece.line, "author": author}
        return TextRecord(id=key, text=text, metadata=metadata)

    def _text(self, piece: _Piece, path: Path) -> str:
        content = piece.content.removeprefix(_BOM) if piece.offset == 0 else piece.content
        try:
            text = content.decode(self.encoding)
        except UnicodeDecodeError as error:
            line = piece.line + content[: error.start].count(b"\n")
            raise ConfigError(
                f"{path}, line {line}: byte 0x{content[error.start]:02x} is not {self.encoding}",
                hint='set encoding (such as "latin-1"), or choose text files with pattern',
            ) from None
        text = text.replace("\r\n", "\n")
        return text if self.unit == "file" else text.rstrip("\n")


def _whole(file: Iterator[bytes], number: int) -> Iterator[_Piece]:
    yield _Piece(number, 1, 0, b"".join(file))


def _lines(file: Iterator[bytes], number: int) -> Iterator[_Piece]:
    offset = 0
    for line, content in enumerate(file, 1):
        yield _Piece(number, line, offset, content)
        offset += len(content)


def _paragraphs(file: Iterator[bytes], number: int) -> Iterator[_Piece]:
    start, block = None, []
    for piece in _lines(file, number):
        if piece.content.strip():
            start = start or piece
            block.append(piece.content)
        elif start is not None:
            yield _Piece(number, start.line, start.offset, b"".join(block))
            start, block = None, []
    if start is not None:
        yield _Piece(number, start.line, start.offset, b"".join(block))
