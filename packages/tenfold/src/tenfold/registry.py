"""What is installed and described: plugins, their components, commands and recipes.

`load_registry` answers from the index cache when nothing changed since it was written, and
otherwise runs the discovery of `tenfold.discovery`. Nothing here imports a plugin.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.errors import (
    ComponentError,
    ConfigError,
    TenfoldDeprecation,
    TenfoldWarning,
    nearest,
)
from tenfold.spec import KINDS, CommandSpec, ComponentSpec
from tenfold.workspace import Workspace, find_workspace

if TYPE_CHECKING:
    from tenfold.observers import Observers

OBSERVER_HOOKS = ("tenfold_run_start", "tenfold_item_end", "tenfold_run_end")


@dataclass(frozen=True, slots=True)
class Component:
    """A described component: `id` is `<plugin>:<name>`, `kind` one of `tenfold.spec.KINDS`,
    `distribution` and `version` say which installed package it comes from."""

    id: str
    plugin: str
    kind: str
    spec: ComponentSpec
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class PluginRow:
    """A plugin that loaded. `folder` is the package folder of its `plugin.py` (empty for a
    top-level module), `hooks` the hooks it implements, `seconds` the CPU time of loading it."""

    name: str
    summary: str
    distribution: str
    version: str
    module: str
    folder: str = ""
    paper: str = ""
    api: str = ""
    homepage: str = ""
    hooks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin, or a part of one, that cannot be used.

    `phase` says where it failed (`metadata`, `clash`, `import`, `hooks`, a hook's name,
    `describe`, `target`), `cause` what happened in one line, `hint` what would be right,
    `details` the traceback where there is one.
    """

    name: str
    dist: str
    version: str
    phase: str
    cause: str
    hint: str = ""
    details: str = ""

    def line(self) -> str:
        """The one line that commands print."""
        source = f" ({self.dist} {self.version})" if self.dist else ""
        return f"plugin {self.name!r}{source} is broken [{self.phase}]: {self.cause}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run file shipped in a plugin: `tenfold run <plugin>:<name>`."""

    id: str
    plugin: str
    path: Path


@dataclass(frozen=True, slots=True)
class Registry:
    """The result of discovery, with look-ups.

    Attributes:
        plugins: loaded plugins by name, `core` first, then by name.
        broken: what could not be loaded, and why.
        disabled: names that the policy keeps out.
        items: every component, by kind and id.
        command_specs: plugin name → its commands.
        workspace: the workspace whose policy chose the plugins.
    """

    plugins: dict[str, PluginRow]
    broken: list[BrokenPlugin]
    workspace: Workspace
    disabled: tuple[str, ...] = ()
    items: tuple[Component, ...] = ()
    command_specs: dict[str, tuple[CommandSpec, ...]] = field(default_factory=dict)

    def components(self, kind: str | None = None, capability: str | None = None) -> list[Component]:
        """Components of a kind (all when None) whose `provides` has the capability or record
        kind. A decoder that inherits also offers what its base does; only the planner, which
        knows the base, can tell, so `inherits` does not count here."""
        return [
            c
            for c in self.items
            if (kind is None or c.kind == kind)
            and (capability is None or capability in c.spec.provides)
        ]

    def component(self, kind: str, name: str) -> Component:
        """The component called `name`: a full id, a unique bare name, or a deprecated name
        (which warns with the new one).

        Raises:
            ComponentError: no such component, or several plugins have one of that name.
        """
        candidates = [c for c in self.items if c.kind == kind]
        found = [c for c in candidates if name in (c.id, c.spec.name)]
        if not found:
            found = self._deprecated(candidates, name)
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(c.id for c in found)
            raise ComponentError(f"{kind} {name!r} is ambiguous; write one of {ids}")
        raise ComponentError(
            f"unknown {kind} {name!r}{self._why_unknown(kind, name, candidates)}",
            hint=f"`tenfold list {kind}s` shows what there is",
        )

    def unknown(self, name: str) -> ComponentError:
        """The error for a name that no component of any kind has."""
        return ComponentError(
            f"unknown component {name!r}{self._why_unknown('', name, self.items)}",
            hint="`tenfold list` shows what there is",
        )

    def commands(self, plugin: str) -> tuple[CommandSpec, ...]:
        """The sub-commands of a plugin; empty when it has none or is unknown."""
        return self.command_specs.get(plugin, ())

    def defaults(self, component: Component) -> dict[str, Any]:
        """Parameter values that `plugins.toml` sets for a component, in
        `[plugins.<plugin>.defaults.<component>]`.

        Raises:
            ConfigError: it names a parameter that the component has not.
        """
        table = self.workspace.policy.defaults.get(component.plugin, {})
        values = table.get(component.spec.name, {})
        known = [param.name for param in component.spec.params]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{self.workspace.policy.path}: plugins.{component.plugin}.defaults."
                    f"{component.spec.name}.{name}: {component.id} has no such parameter"
                    f"{nearest(name, known)}"
                )
        return dict(values)

    def recipes(self) -> list[Recipe]:
        """Every recipe of every loaded plugin, by id."""
        found = []
        for row in self.plugins.values():
            folder = Path(row.folder) / "recipes" if row.folder else None
            if folder is not None and folder.is_dir():
                found += [
                    Recipe(f"{row.name}:{path.stem}", row.name, path)
                    for path in sorted(folder.glob("*.toml"))
                ]
        return found

    def recipe(self, name: str) -> Path | None:
        """The file of recipe `<plugin>:<name>`; None when `name` has not that form.

        Raises:
            ComponentError: the form is right but there is no such recipe.
        """
        plugin, colon, stem = name.partition(":")
        if not colon or not plugin or not stem or "/" in name or os.sep in name:
            return None
        row = self.plugins.get(plugin)
        if row is not None and row.folder:
            path = Path(row.folder) / "recipes" / f"{stem}.toml"
            if path.is_file():
                return path
        known = [recipe.id for recipe in self.recipes()]
        raise ComponentError(
            f"unknown recipe {name!r}{nearest(name, known) or self._plugin_trouble(plugin)}",
            hint="`tenfold recipes` shows what there is",
        )

    def observers(self) -> Observers | None:
        """The plugins that implement an observer hook, imported now; None when none does.

        One that fails to import (it was fine when indexed) is left out with a warning.
        """
        from tenfold.discovery import import_plugin
        from tenfold.observers import Observers

        found = []
        for row in self.plugins.values():
            if not set(row.hooks) & set(OBSERVER_HOOKS):
                continue
            try:
                found.append((row.name, import_plugin(row.module)))
            except Exception as error:
                message = f"plugin {row.name!r} does not observe this run: {error}"
                warnings.warn(message, TenfoldWarning, stacklevel=2)
        return Observers(found) if found else None

    def _deprecated(self, candidates: Sequence[Component], name: str) -> list[Component]:
        plugin, colon, bare = name.partition(":")
        found = []
        for component in candidates:
            old = component.spec.deprecated
            hit = bare if colon and plugin == component.plugin else name
            if hit in old:
                found.append(component)
                message = f" ({old[hit]})" if old[hit] else ""
                warnings.warn(
                    f"{component.kind} {name!r} is now called {component.id!r}{message}",
                    TenfoldDeprecation,
                    stacklevel=3,
                )
        return found

    def _why_unknown(self, kind: str, name: str, candidates: Iterable[Component]) -> str:
        """What to say after "unknown model 'x'": the likeliest reason, or a near name."""
        others = [c.kind for c in self.items if kind and name in (c.id, c.spec.name)]
        if others:
            article = "an" if others[0] == "evaluator" else "a"
            return f": it names {article} {others[0]}"
        plugin, colon, _ = name.partition(":")
        if colon and (trouble := self._plugin_trouble(plugin)):
            return trouble
        ids = [c.id for c in candidates]
        names = ids if colon else [c.spec.name for c in candidates]
        return nearest(name, names) or nearest(name, ids)

    def _plugin_trouble(self, plugin: str) -> str:
        """Why a plugin's names may be missing, or an empty string."""
        for broken in self.broken:
            if broken.name == plugin:
                return f": {broken.line()}"
        if plugin in self.plugins:
            return ""
        if plugin in self.disabled:
            return f": plugin {plugin!r} is disabled; `tenfold plugins enable {plugin}`"
        row = self.workspace.policy.catalogue.get(plugin)
        if row is not None:
            dist = row.get("distribution", plugin)
            return f": plugin {plugin!r} is not installed; install {dist}"
        return f": no plugin {plugin!r}{nearest(plugin, self.plugins)}"


def load_registry(
    workspace: Workspace | None = None, *, cached: bool = True, lenient: bool = False
) -> Registry:
    """The registry of this environment under the workspace's plugin policy.

    Each broken plugin is one `TenfoldWarning`.

    Args:
        workspace: found from the current folder when None.
        cached: False always discovers anew (and then refreshes the index).
        lenient: for callers that report broken plugins themselves: no warnings, and no error
            under a strict policy.

    Raises:
        ComponentError: the policy is strict and a plugin is broken.
        ConfigError: `workspace.toml` or `plugins.toml` is malformed.
    """
    from tenfold import index

    workspace = workspace or find_workspace()
    started = time.perf_counter()
    registry = index.read(workspace) if cached else None
    trace("index", started, "hit" if registry else "miss")
    if registry is None:
        from tenfold.discovery import discover

        registry, sources = discover(workspace)
        index.write(workspace, registry, sources)
    if not lenient:
        _report_broken(registry)
    return registry


def _report_broken(registry: Registry) -> None:
    """One warning per broken plugin or exceeded budget; an error under a strict policy."""
    if registry.workspace.policy.strict and registry.broken:
        lines = "\n".join(f"  {broken.line()}" for broken in registry.broken)
        raise ComponentError(
            f"the plugin policy is strict and something is broken:\n{lines}",
            hint="`tenfold plugins check` tells the full story",
        )
    messages = [f"{broken.line()}; see `tenfold plugins check`" for broken in registry.broken]
    for row in registry.plugins.values():
        messages += [f"plugin {row.name!r}: {message}" for message in row.warnings]
    for message in messages:
        warnings.warn(message, TenfoldWarning, stacklevel=3)


def trace(label: str, started: float, note: str = "") -> None:
    """With TENFOLD_TRACE=1, one line on stderr: what took how long."""
    if os.environ.get("TENFOLD_TRACE") == "1":
        milliseconds = (time.perf_counter() - started) * 1000
        print(f"trace: {label:<24} {milliseconds:8.1f} ms  {note}", file=sys.stderr)


__all__ = [
    "KINDS",
    "BrokenPlugin",
    "Component",
    "PluginRow",
    "Recipe",
    "Registry",
    "load_registry",
]
