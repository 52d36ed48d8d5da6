"""The component index: what discovery found, kept so that listing imports no plugin.

One JSON file per environment and policy, in the cache folder. It is valid while everything it
was made from is unchanged: the folders of `sys.path`, the entry-point files, the source files
that the plugins' `plugin.py` imported, and this package's own. A missing, damaged or
unwritable index is never an error; it only costs the time of discovery.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tenfold import index_file
from tenfold.registry import BrokenPlugin, Component, PluginRow, Registry
from tenfold.spec import REQUIRED, CommandSpec, ComponentSpec, Param

if TYPE_CHECKING:
    from tenfold.installed import Sources
    from tenfold.workspace import Workspace

_STATIC_PHASES = ("metadata", "clash", "policy", "api", "describe", "target")
"""Failures that only a changed file can mend; others (an import that failed) may depend on
the environment, so an index with them is not kept."""


def read(workspace: Workspace) -> Registry | None:
    """The indexed registry when everything it was made from is unchanged, else None."""
    content = index_file.load(workspace)
    with contextlib.suppress(Exception):
        return None if content is None else _decode_registry(content, workspace)
    return None


def write(workspace: Workspace, registry: Registry, sources: Sources) -> None:
    """Keeps a registry for later commands, unless it may not be the whole truth."""
    if sources.trusted and all(b.phase in _STATIC_PHASES for b in registry.broken):
        content = _encode_registry(registry)
        index_file.save(workspace, content, sources.files, sources.started_ns)


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
