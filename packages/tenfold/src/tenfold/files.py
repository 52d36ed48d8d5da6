"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tenfold.errors import RunFailed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed onto it when the block succeeds.

    Raises:
        RunFailed: the disk is full; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_full_is_an_error(path):
            yield temporary
            # mkstemp makes private files; published ones follow the user's umask.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, readable and with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


class LineFile:
    """Append-only JSON lines, each flushed; opened at the first line, after dropping a torn tail.

    What was appended survives a kill at any moment; at most the last line is lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIOWrapper | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line.

        Raises:
            RunFailed: the row is no JSON, or the disk is full.
        """
        try:
            text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=True)
        except (TypeError, ValueError) as error:
            raise RunFailed(
                f"item {row.get('id')!r}: its values cannot be written as JSON ({error}); "
                "evaluators return plain numbers, strings, lists and dictionaries"
            ) from error
        with disk_full_is_an_error(self._path):
            if self._file is None:
                drop_torn_tail(self._path)
                self._file = self._path.open("a", encoding="utf-8", errors="surrogatepass")
            self._file.write(text + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; the next line would open it again."""
        if self._file is not None:
            # Closing writes what a full disk refused before, and meets the same error.
            file, self._file = self._file, None
            with disk_full_is_an_error(self._path):
                file.close()


def drop_torn_tail(path: Path) -> None:
    """Cuts a file after its last newline."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            file.truncate(end)


@contextmanager
def disk_full_is_an_error(path: Path) -> Iterator[None]:
    """Turns "no space left" into one clear error; everything flushed before stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunFailed(
            f"no space left while writing {path}",
            hint="free some space, then continue with `tenfold run --resume`",
        ) from error
