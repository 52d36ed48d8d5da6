"""The workspace: `workspace.toml` (defaults) and `plugins.toml` (plugin policy).

Both are optional. They are looked for in the current folder and its parents; outside a
workspace the built-in defaults apply and runs go to `./runs`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError, nearest

WORKSPACE_FILE = "workspace.toml"
PLUGINS_FILE = "plugins.toml"

DEFAULTS: dict[str, dict[str, Any]] = {
    "paths": {
        "runs": "runs",
        "cache": "",
        "checkpoints": "checkpoints",
        "data": "data",
    },
    "defaults": {
        "seed": 0,
        "device": "auto",
        "dtype": "float32",
        "progress": True,
        "offline": True,
    },
    "scale": {"device": "auto", "processes": 1, "launcher": "auto", "config": ""},
    "reproducibility": {"deterministic": True, "threads": 0},
    "limits": {"max_failures": 0, "item_timeout_s": 0.0},
}
"""Every known table and key of `workspace.toml`, with its default. `paths.cache` defaults to
the user's cache folder; `dependencies` and `packages` are free tables read by the tools."""

_FREE_TABLES = ("dependencies", "packages")


@dataclass(frozen=True, slots=True)
class Policy:
    """`plugins.toml`: which plugins load and who wins a name clash.

    `enable`: "all" or a list of names; `disable`: names never loaded; `prefer`: plugin name →
    distribution that wins a clash; `defaults`: plugin name → component-parameter defaults,
    `{component: {param: value}}`.
    """

    enable: str | tuple[str, ...] = "all"
    disable: tuple[str, ...] = ()
    strict: bool = False
    prefer: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    catalogue: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Workspace:
    """Resolved workspace settings. `root` is None outside a workspace."""

    root: Path | None
    tables: Mapping[str, Mapping[str, Any]]
    policy: Policy

    def path(self, name: str) -> Path:
        """One of the folders `runs`, `cache`, `checkpoints`, `data`, absolute."""
        value = str(self.tables["paths"][name])
        if name == "cache" and not value:
            return user_cache()
        return ((self.root or Path.cwd()) / Path(value).expanduser()).absolute()

    def default(self, name: str) -> Any:
        """A value of the `[defaults]` table."""
        return self.tables["defaults"][name]


def user_cache() -> Path:
    """`$TENFOLD_CACHE`, else `$XDG_CACHE_HOME/tenfold`, else `~/.cache/tenfold`."""
    if value := os.environ.get("TENFOLD_CACHE"):
        return Path(value)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tenfold"


def find_workspace(start: Path | None = None) -> Workspace:
    """The workspace around `start` (default: the current folder).

    Raises:
        ConfigError: one of the two files is malformed.
    """
    folder = (start or Path.cwd()).absolute()
    for candidate in (folder, *folder.parents):
        has_workspace = (candidate / WORKSPACE_FILE).is_file()
        if has_workspace or (candidate / PLUGINS_FILE).is_file():
            return _load(candidate, candidate if has_workspace else None)
    return Workspace(None, DEFAULTS, _policy(None))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's tables.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _load(folder: Path, root: Path | None) -> Workspace:
    tables = {name: dict(values) for name, values in DEFAULTS.items()}
    if root is not None:
        path = root / WORKSPACE_FILE
        for name, values in read_toml(path).items():
            if name in _FREE_TABLES:
                tables[name] = values
                continue
            if name not in tables or not isinstance(values, dict):
                raise ConfigError(f"{path}: unknown table [{name}]{nearest(name, tables)}")
            for key, value in values.items():
                _check_value(path, name, key, value)
                tables[name][key] = value
    plugins = folder / PLUGINS_FILE
    return Workspace(root, tables, _policy(plugins if plugins.is_file() else None))


def _check_value(path: Path, table: str, key: str, value: Any) -> None:
    known = DEFAULTS[table]
    if key not in known:
        raise ConfigError(f"{path}: unknown key {table}.{key}{nearest(key, known)}")
    expected = type(known[key])
    ok = isinstance(value, expected) or (expected is float and isinstance(value, int))
    if not ok or (expected is not bool and isinstance(value, bool)):
        raise ConfigError(
            f"{path}: {table}.{key} is {value!r}; it must be of type {expected.__name__}"
        )


def _policy(path: Path | None) -> Policy:
    """The policy of a `plugins.toml`, merged with the TENFOLD_* environment variables."""
    tables = read_toml(path) if path else {}
    unknown = set(tables) - {"policy", "plugins"}
    if unknown:
        name = sorted(unknown)[0]
        raise ConfigError(f"{path}: unknown table [{name}]{nearest(name, ('policy', 'plugins'))}")
    policy = tables.get("policy", {})
    for key in policy:
        if key not in ("enable", "disable", "strict", "prefer"):
            known = ("enable", "disable", "strict", "prefer")
            raise ConfigError(f"{path}: unknown key policy.{key}{nearest(key, known)}")
    enable = policy.get("enable", "all")
    if not (enable == "all" or isinstance(enable, list)):
        raise ConfigError(f'{path}: policy.enable is {enable!r}; it must be "all" or a list')
    if names := os.environ.get("TENFOLD_PLUGINS"):
        enable = [name.strip() for name in names.split(",") if name.strip()]
    if os.environ.get("TENFOLD_NO_PLUGINS") == "1":
        enable = []
    catalogue = tables.get("plugins", {})
    return Policy(
        enable=enable if isinstance(enable, str) else tuple(enable),
        disable=tuple(policy.get("disable", ())),
        strict=bool(policy.get("strict", False)) or os.environ.get("TENFOLD_STRICT") == "1",
        prefer=policy.get("prefer", {}),
        defaults={name: row.get("defaults", {}) for name, row in catalogue.items()},
        catalogue=catalogue,
        path=path,
    )
