"""Which plugins are installed, and which of them the policy lets in; nothing is imported."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tenfold.errors import nearest
from tenfold.hookspecs import ENTRY_POINT_GROUP
from tenfold.registry import BrokenPlugin
from tenfold.workspace import Policy

CORE = "core"


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One entry point of the group: plugin name, `module[:attribute]`, and where it is from."""

    name: str
    value: str
    dist: str
    version: str
    file: Path | None = None


@dataclass(slots=True)
class Sources:
    """Files the registry depends on, for the index: a change in any of them invalidates it.

    `trusted` is False when a plugin had been imported before discovery, so that the modules
    it needs could not be observed.
    """

    files: set[Path] = field(default_factory=set)
    trusted: bool = True
    started_ns: int = field(default_factory=time.time_ns)


@dataclass(frozen=True, slots=True)
class Choice:
    """Entry points to load, what is broken before any import, and what the policy keeps out.

    `found` counts every entry point of the group.
    """

    entries: list[EntryPoint]
    broken: list[BrokenPlugin]
    disabled: tuple[str, ...]
    found: int


def choose_plugins(policy: Policy, sources: Sources | None = None) -> Choice:
    """Installed plugins under a policy: one entry point per name."""
    entries, broken = find_entry_points(sources)
    enabled, disabled = _apply_policy(entries, policy)
    chosen, clashes = _resolve_clashes(enabled, policy)
    broken += clashes + _not_installed(policy, {e.name for e in entries})
    return Choice(sorted(chosen, key=lambda e: e.name), broken, disabled, len(entries))


def find_entry_points(
    sources: Sources | None = None,
) -> tuple[list[EntryPoint], list[BrokenPlugin]]:
    """Every `tenfold.plugins` entry point, and plugins whose metadata cannot be read.

    The first distribution of a name on `sys.path` hides later ones, as it does for imports.
    """
    entries: list[EntryPoint] = []
    broken: list[BrokenPlugin] = []
    seen: set[str] = set()
    for dist in metadata.distributions():
        folder = getattr(dist, "_path", None)
        name = str(getattr(folder, "name", "?"))
        is_plugin = False
        try:
            is_plugin = ENTRY_POINT_GROUP in (dist.read_text("entry_points.txt") or "")
            name = dist.metadata["Name"] or name
            if normalized(name) in seen:
                continue
            seen.add(normalized(name))
            if is_plugin:
                entries += _entry_points(dist, name, folder, sources)
        except Exception as error:
            if is_plugin:  # other distributions are not ours to judge
                hint = "reinstall the distribution"
                broken.append(BrokenPlugin(name, name, "?", "metadata", one_line(error), hint))
    return entries, broken


def _entry_points(
    dist: metadata.Distribution, name: str, folder: object, sources: Sources | None
) -> list[EntryPoint]:
    file = folder / "entry_points.txt" if isinstance(folder, Path) else None
    if file is not None and sources is not None:
        sources.files.add(file)
    return [
        EntryPoint(e.name, e.value, name, dist.version, file)
        for e in dist.entry_points
        if e.group == ENTRY_POINT_GROUP
    ]


def one_line(error: BaseException) -> str:
    """An error's type and message on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        text = f"exit code {error.code}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def normalized(distribution: str) -> str:
    """A distribution name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _apply_policy(
    entries: list[EntryPoint], policy: Policy
) -> tuple[list[EntryPoint], tuple[str, ...]]:
    def wanted(name: str) -> bool:
        return name not in policy.disable and (policy.enable == "all" or name in policy.enable)

    disabled = {entry.name for entry in entries if not wanted(entry.name)}
    return [e for e in entries if wanted(e.name)], tuple(sorted(disabled))


def _not_installed(policy: Policy, installed: set[str]) -> list[BrokenPlugin]:
    """Plugins that the policy enables by name and that no distribution offers."""
    if isinstance(policy.enable, str):
        return []
    broken = []
    for name in policy.enable:
        if name in installed or name == CORE or name in policy.disable:
            continue
        dist = str(policy.catalogue.get(name, {}).get("distribution", ""))
        broken.append(
            BrokenPlugin(
                name,
                "",
                "",
                "policy",
                f"enabled, but not installed{nearest(name, installed)}",
                f"install {dist}" if dist else "install it, or take it out of the enabled ones",
            )
        )
    return broken


def _resolve_clashes(
    entries: list[EntryPoint], policy: Policy
) -> tuple[list[EntryPoint], list[BrokenPlugin]]:
    """One entry point per name; a clash disables every party unless the policy names one."""
    by_name: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry)
    chosen: list[EntryPoint] = []
    broken: list[BrokenPlugin] = []
    for name, rivals in by_name.items():
        preferred = normalized(str(policy.prefer.get(name, "")))
        winners = [e for e in rivals if normalized(e.dist) == preferred]
        if len(rivals) == 1:
            chosen += rivals
        elif len(winners) == 1:
            chosen += winners
        else:
            dists = sorted(e.dist for e in rivals)
            broken += [
                BrokenPlugin(
                    name,
                    e.dist,
                    e.version,
                    "clash",
                    f"several distributions offer {name!r}: {', '.join(dists)}",
                    f'uninstall one, or write [policy] prefer = {{ {name} = "{dists[0]}" }} '
                    "in plugins.toml",
                )
                for e in rivals
            ]
    return chosen, broken
