"""`tenfold workspace check`: are workspace.toml and plugins.toml sound, and do they match?"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from tenfold.cli.output import print_json
from tenfold.cli.parser import Actions
from tenfold.errors import EXIT_OK, EXIT_USAGE, nearest
from tenfold.registry import Registry, load_registry
from tenfold.workspace import DEFAULTS, Workspace, find_workspace

SUMMARY = "check workspace.toml and plugins.toml"

ROW_KEYS = (
    "summary",
    "distribution",
    "path",
    "module",
    "version",
    "core",
    "paper",
    "components",
    "heavy",
    "extras",
    "status",
    "defaults",
)
"""Known keys of a `[plugins.<name>]` table."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: `ok`, `warn` or `fail`, and what was found."""

    status: str
    what: str
    found: str

    def to_json(self) -> dict[str, str]:
        """The check as JSON values."""
        return {"status": self.status, "what": self.what, "found": self.found}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the only action."""
    Actions(parser, default="check").add("check", "check both files and the folders they name")


def run(args: argparse.Namespace) -> int:
    """Prints every check; exit code 2 when one fails.

    Raises:
        ConfigError: a file is so malformed that nothing can be checked.
    """
    workspace = find_workspace()
    checks = [
        *check_folders(workspace),
        *check_plugins_file(workspace, load_registry(lenient=True)),
    ]
    failed = any(check.status == "fail" for check in checks)
    if args.json:
        root = str(workspace.root) if workspace.root else None
        print_json({"root": root, "ok": not failed, "checks": [c.to_json() for c in checks]})
    else:
        print(f"workspace: {workspace.root or 'none (built-in defaults)'}")
        print(f"policy:    {workspace.policy.path or 'none (all plugins)'}")
        print_checks(checks)
    return EXIT_USAGE if failed else EXIT_OK


def print_checks(checks: list[Check]) -> None:
    """One line per check."""
    for check in checks:
        print(f"{check.status:<4}  {check.what}: {check.found}")


def check_folders(workspace: Workspace) -> list[Check]:
    """Whether each of the workspace's folders can be written, now or once it is made."""
    checks = []
    for name in DEFAULTS["paths"]:
        path = workspace.path(name)
        if path.exists() and not path.is_dir():
            checks.append(Check("fail", f"paths.{name}", f"{path} is a file, not a folder"))
        elif writable(path):
            checks.append(Check("ok", f"paths.{name}", str(path)))
        else:
            checks.append(Check("fail", f"paths.{name}", f"{path} cannot be written"))
    return checks


def writable(path: Path) -> bool:
    """Whether the folder, or the nearest parent that exists, can be written."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def check_plugins_file(workspace: Workspace, registry: Registry) -> list[Check]:
    """plugins.toml against what is installed."""
    policy = workspace.policy
    installed = {row.name: row for row in registry.plugins.values()}
    broken = {item.name: item for item in registry.broken}
    known = {*installed, *broken, *registry.disabled, *policy.catalogue}
    checks = [
        Check("fail", f"policy.{key}", f"no plugin {name!r}{nearest(name, known)}")
        for key, names in (
            ("enable", () if isinstance(policy.enable, str) else policy.enable),
            ("disable", policy.disable),
            ("prefer", policy.prefer),
        )
        for name in names
        if name not in known
    ]
    for name, row in policy.catalogue.items():
        where = f"plugins.{name}"
        checks += [
            Check("fail", where, f"unknown key {key!r}{nearest(key, ROW_KEYS)}")
            for key in row
            if key not in ROW_KEYS
        ]
        checks.append(_check_row(where, name, dict(row), registry))
    return checks


def _check_row(where: str, name: str, row: dict[str, object], registry: Registry) -> Check:
    from tenfold.installed import normalized

    wanted = str(row.get("distribution", name))
    loaded = registry.plugins.get(name)
    if loaded is not None:
        if normalized(loaded.distribution) != normalized(wanted):
            found = f"comes from {loaded.distribution}, the file says {wanted}"
            return Check("fail", where, found)
        if "version" in row and str(row["version"]) != loaded.version:
            found = f"{loaded.version} is installed, the file says {row['version']}"
            return Check("warn", where, found)
        return Check("ok", where, f"{loaded.distribution} {loaded.version}")
    if broken := [item for item in registry.broken if item.name == name]:
        return Check("fail", where, broken[0].line())
    if name in registry.disabled:
        return Check("ok", where, "installed, disabled by the policy")
    if row.get("status") == "planned":
        return Check("ok", where, "planned, not installed")
    return Check("warn", where, f"{wanted} is not installed")
