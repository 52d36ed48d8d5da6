"""The component index: what discovery found, kept so that listing imports no plugin.

One JSON file per environment and policy, in the cache folder. It is valid while everything it
was made from is unchanged: the folders of `sys.path`, the entry-point files, the source files
that the plugins' `plugin.py` imported, and this package's own. A missing, damaged or
unwritable index is never an error; it only costs the time of discovery.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold import __version__
from tenfold.registry import BrokenPlugin, Component, PluginRow, Registry
from tenfold.spec import REQUIRED, CommandSpec, ComponentSpec, Param

if TYPE_CHECKING:
    from tenfold.installed import Sources
    from tenfold.workspace import Workspace

FORMAT = 1
KEPT_FILES = 16
"""Indexes of other environments and policies that stay beside the current one."""
SETTLING_NS = 100_000_000
"""A source changed this shortly before discovery (or during it) could differ from what was
read without a visible change of its time stamp, so nothing is indexed yet."""

_STATIC_PHASES = ("metadata", "clash", "policy", "api", "describe", "target")
"""Failures that only a changed file can mend; others (an import that failed) may depend on
the environment, so an index with them is not kept."""
_OWN = ("spec", "hookspecs", "describe", "installed", "discovery", "registry", "index", "params")

Stamp = list[Any]
"""`[path, mtime_ns, size]`; size -1 for folders, both 0 for what is not there."""


def read(workspace: Workspace) -> Registry | None:
    """The indexed registry when everything it was made from is unchanged, else None."""
    key = _key(workspace)
    with contextlib.suppress(Exception):
        content = json.loads(_file(workspace, key).read_bytes())
        current = content["key"] == key and all(_stamp(s[0]) == s for s in content["stamps"])
        return _decode_registry(content["registry"], workspace) if current else None
    return None


def write(workspace: Workspace, registry: Registry, sources: Sources) -> None:
    """Keeps a registry for later commands, unless it may not be the whole truth."""
    if not sources.trusted or any(b.phase not in _STATIC_PHASES for b in registry.broken):
        return
    own = [Path(__file__).with_name(f"{name}.py") for name in _OWN]
    files = {str(path) for path in (*sources.files, *own)}
    stamps = [_stamp(path) for path in (*_search_path(), *sorted(files))]
    if any(stamp[1] > sources.started_ns - SETTLING_NS for stamp in stamps):
        return
    key = _key(workspace)
    content = {"key": key, "stamps": stamps, "registry": _encode_registry(registry)}
    from tenfold.files import write_text

    with contextlib.suppress(Exception):
        path = _file(workspace, key)
        write_text(path, json.dumps(content, separators=(",", ":")))
        _prune(path.parent)


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


# --- Descriptions as JSON ------------------------------------------------------------------
# Dataclasses become lists of their fields, in order. JSON has no tuples and no REQUIRED, so
# these become one-key objects; so do dictionaries, to keep the three apart.


def _encode(value: Any) -> Any:
    if value is REQUIRED:
        return {"required": True}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"map": [[key, _encode(item)] for key, item in value.items()]}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_decode(item) for item in value["tuple"])
        if "map" in value:
            return {key: _decode(item) for key, item in value["map"]}
        return REQUIRED
    return value


def _fields(record: Any, skip: Iterable[str] = ()) -> list[Any]:
    return [_encode(getattr(record, n)) for n in record.__dataclass_fields__ if n not in skip]


def encode_spec(spec: ComponentSpec | CommandSpec) -> list[Any]:
    """A description as JSON values."""
    return [[_fields(param) for param in spec.params], *_fields(spec, skip=("params",))]


def decode_component(row: list[Any]) -> ComponentSpec:
    """The component description that `encode_spec` wrote."""
    params, name, target, summary, *rest = row
    return ComponentSpec(name, target, summary, _params(params), *map(_decode, rest))


def decode_command(row: list[Any]) -> CommandSpec:
    """The command description that `encode_spec` wrote."""
    params, name, target, summary = row
    return CommandSpec(name, target, summary, _params(params))


def _params(rows: list[Any]) -> tuple[Param, ...]:
    return tuple(Param(*map(_decode, row)) for row in rows)


def _encode_registry(registry: Registry) -> dict[str, Any]:
    return {
        "plugins": [_fields(row) for row in registry.plugins.values()],
        "broken": [_fields(row) for row in registry.broken],
        "disabled": list(registry.disabled),
        "components": [[c.plugin, c.kind, encode_spec(c.spec)] for c in registry.items],
        "commands": [
            [plugin, [encode_spec(spec) for spec in specs]]
            for plugin, specs in registry.command_specs.items()
        ],
    }


def _decode_registry(content: dict[str, Any], workspace: Workspace) -> Registry:
    rows = [PluginRow(*map(_decode, fields)) for fields in content["plugins"]]
    plugins = {row.name: row for row in rows}
    items = []
    for plugin, kind, encoded in content["components"]:
        spec, row = decode_component(encoded), plugins[plugin]
        items.append(
            Component(f"{plugin}:{spec.name}", plugin, kind, spec, row.distribution, row.version)
        )
    return Registry(
        plugins=plugins,
        broken=[BrokenPlugin(*map(_decode, fields)) for fields in content["broken"]],
        workspace=workspace,
        disabled=tuple(content["disabled"]),
        items=tuple(items),
        command_specs={
            plugin: tuple(decode_command(row) for row in specs)
            for plugin, specs in content["commands"]
        },
    )
