"""The index file: where it lies, when it is valid, and its plain content.

Apart from `tenfold.index`, which turns the content into descriptions, so that `tenfold --help`
can name plugins' commands without importing those.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tenfold.workspace import Workspace

FORMAT = 2
KEPT_FILES = 16
"""Indexes of other environments and policies that stay beside the current one."""
SETTLING_NS = 100_000_000
"""A source changed this shortly before discovery (or during it) could differ from what was
read without a visible change of its time stamp, so nothing is indexed yet."""

_OWN = (
    "spec",
    "hookspecs",
    "describe",
    "installed",
    "discovery",
    "registry",
    "index",
    "index_file",
    "params",
)
"""Modules of this package that decide what the index says."""

Stamp = list[Any]
"""`[path, mtime_ns, size]`; size -1 for folders, both 0 for what is not there."""


def load(workspace: Workspace) -> dict[str, Any] | None:
    """The indexed content when everything it was made from is unchanged, else None."""
    key = _key(workspace)
    with contextlib.suppress(Exception):
        content = json.loads(_file(workspace, key).read_bytes())
        if content["key"] == key and all(_stamp(s[0]) == s for s in content["stamps"]):
            return content["registry"]
    return None


def save(
    workspace: Workspace, registry: dict[str, Any], sources: Iterable[Path], started_ns: int
) -> None:
    """Keeps the content, unless a source changed since shortly before `started_ns`."""
    own = [Path(__file__).with_name(f"{name}.py") for name in _OWN]
    files = sorted({str(path) for path in (*sources, *own)})
    stamps = [_stamp(path) for path in (*_search_path(), *files)]
    if any(stamp[1] > started_ns - SETTLING_NS for stamp in stamps):
        return
    key = _key(workspace)
    content = {"key": key, "stamps": stamps, "registry": registry}
    from tenfold.files import write_text

    with contextlib.suppress(Exception):
        path = _file(workspace, key)
        write_text(path, json.dumps(content, separators=(",", ":")))
        _prune(path.parent)


def verbs(workspace: Workspace) -> list[tuple[str, str]]:
    """Indexed commands of plugins as (`plugin command`, summary); empty without an index."""
    content = load(workspace) or {}
    return [
        (f"{plugin} {name}", summary)
        for plugin, rows in content.get("commands", ())
        for _, name, _, summary in rows
    ]


def _key(workspace: Workspace) -> str:
    """What tells one index from another: versions, environment, search path, policy."""
    policy = workspace.policy
    parts = [
        FORMAT,
        __version__,
        sys.version,
        sys.prefix,
        _search_path(),
        policy.enable,
        policy.disable,
        dict(policy.prefer),
        {name: row.get("distribution") for name, row in policy.catalogue.items()},
    ]
    return json.dumps(parts, sort_keys=True, default=str)


def _file(workspace: Workspace, key: str) -> Path:
    return workspace.path("cache") / "index" / f"{zlib.crc32(key.encode()):08x}.json"


def _prune(folder: Path) -> None:
    def age(path: Path) -> int:
        return -path.stat().st_mtime_ns

    for path in sorted(folder.glob("*.json"), key=age)[KEPT_FILES:]:
        path.unlink(missing_ok=True)


def _search_path() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 - no object per entry


def _stamp(path: str) -> Stamp:
    """The current stamp of a file or folder.

    A folder's time changes whenever something is installed in it. The current folder, which
    `python -m` puts on the search path, changes with every run; there only names of
    installed distributions count.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a few dozen stats are the whole cost of a hit
    except OSError:
        return [path, 0, 0]
    if path == os.getcwd():  # noqa: PTH109
        names = [n for n in os.listdir(path) if n.endswith((".dist-info", ".egg-info"))]  # noqa: PTH208
        return [path, zlib.crc32("/".join(sorted(names)).encode()), -1]
    is_folder = (status.st_mode & 0o170000) == 0o040000
    return [path, status.st_mtime_ns, -1 if is_folder else status.st_size]
