"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
