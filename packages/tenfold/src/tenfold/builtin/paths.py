"""Files behind a `path` parameter: one file, a folder, or a glob."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.errors import ConfigError, nearest

_MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files below a root, sorted by their relative names."""

    root: Path
    paths: Sequence[Path]

    def name(self, path: Path) -> str:
        """The file's name relative to the root, with `/`."""
        return path.relative_to(self.root).as_posix()

    def stamps(self) -> list[tuple[int, int]]:
        """Size and modification time of each file, to notice changes."""
        return [(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in self.paths)]

    def digests(self) -> list[str]:
        """SHA-256 of each file's content, read in blocks."""
        return [digest(path) for path in self.paths]


def digest(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_files(path: str | Path, pattern: str = "**/*") -> FileSet:
    """The files that a path names; hidden files and folders do not count.

    Args:
        path: a file, a folder (then `pattern` chooses below it), or a glob.

    Raises:
        ConfigError: there is no such file, or nothing matches.
    """
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return FileSet(place.parent, (place,))
    if place.is_dir():
        return _matching(place, pattern)
    fixed = [part for part in place.parts if not _MAGIC & set(part)]
    if len(fixed) == len(place.parts):
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise ConfigError(f"no such file or folder: {path}{nearest(place.name, siblings)}")
    first = next(i for i, part in enumerate(place.parts) if _MAGIC & set(part))
    return _matching(Path(*place.parts[:first]), "/".join(place.parts[first:]))


def _matching(root: Path, pattern: str) -> FileSet:
    try:
        found = [path for path in root.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{pattern!r} is no pattern of file names: {error}") from error
    visible = [p for p in found if not any(x[0] == "." for x in p.relative_to(root).parts)]
    if not visible:
        raise ConfigError(f"no file below {root} matches {pattern!r}")
    return FileSet(root, sorted(visible, key=lambda p: p.relative_to(root).as_posix()))
