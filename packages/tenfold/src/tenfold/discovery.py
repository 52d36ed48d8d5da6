"""From installed distributions to a registry, surviving anything a plugin does.

Entry points are imported one by one, and every plugin gets a pluggy manager of its own, so a
failure stays with the plugin that caused it and becomes a `BrokenPlugin`. Only
KeyboardInterrupt goes through.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pluggy

from tenfold import __version__, hookspecs
from tenfold.describe import Description, Problem, check_api, describe, missing_target
from tenfold.errors import nearest
from tenfold.hookspecs import PROJECT
from tenfold.installed import CORE, EntryPoint, Sources, choose_plugins, one_line
from tenfold.registry import BrokenPlugin, Component, PluginRow, Registry, trace
from tenfold.spec import (
    HEAVY_MODULES,
    NAME_PATTERN,
    CommandSpec,
    ComponentSpec,
    PluginInfo,
)
from tenfold.workspace import Workspace

CORE_MODULE = "tenfold.builtin.plugin"
SLOW_IMPORT_SECONDS = 0.25
"""CPU time of importing `plugin.py` above which a plugin gets a warning."""
MAX_SPECS = 10_000
"""A hook that yields more is taken for an endless generator."""

_DATA_HOOKS = {
    "tenfold_models": ("model", ComponentSpec),
    "tenfold_datasets": ("dataset", ComponentSpec),
    "tenfold_evaluators": ("evaluator", ComponentSpec),
    "tenfold_trainers": ("trainer", ComponentSpec),
    "tenfold_commands": ("command", CommandSpec),
}
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("tenfold_"))


@dataclass(frozen=True, slots=True)
class _Loaded:
    row: PluginRow
    description: Description
    broken: tuple[BrokenPlugin, ...] = ()


class _PluginError(Exception):
    """A plugin failed in `phase`."""

    def __init__(self, phase: str, cause: str, hint: str = "", details: str = "") -> None:
        super().__init__(cause)
        self.phase, self.cause, self.hint, self.details = phase, cause, hint, details


def discover(workspace: Workspace) -> tuple[Registry, Sources]:
    """Loads `core` and every installed plugin that the policy enables."""
    started = time.perf_counter()
    sources = Sources()
    choice = choose_plugins(workspace.policy, sources)
    trace("find plugins", started, f"{choice.found} entry points")
    broken = list(choice.broken)
    core = EntryPoint(CORE, CORE_MODULE, PROJECT, __version__)
    loaded: list[_Loaded] = []
    for entry in (core, *choice.entries):
        started = time.perf_counter()
        outcome = load_plugin(entry, sources)
        trace(f"load {entry.name}", started)
        if isinstance(outcome, BrokenPlugin):
            broken.append(outcome)
        else:
            loaded.append(outcome)
            broken += outcome.broken
    return _registry(loaded, broken, choice.disabled, workspace), sources


def load_plugin(entry: EntryPoint, sources: Sources | None = None) -> _Loaded | BrokenPlugin:
    """Imports one plugin, calls its hooks and checks what they say."""
    sources = sources or Sources()
    before = set(sys.modules)
    started = time.process_time()
    if entry.value.partition(":")[0] in before and entry.name != CORE:
        sources.trusted = False
    try:
        # A plugin that prints must not end up in the results on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            plugin = _import(entry)
            seconds = time.process_time() - started
            heavy = [m for m in HEAVY_MODULES if m in sys.modules and m not in before]
            manager = _register(entry, plugin)
            info = _card(entry, manager)
            specs = {h: _call(manager, h, kind) for h, (_, kind) in _DATA_HOOKS.items()}
            description = _describe(entry, specs)
    except _PluginError as failure:
        return BrokenPlugin(
            entry.name,
            entry.dist,
            entry.version,
            failure.phase,
            failure.cause,
            failure.hint,
            failure.details,
        )
    finally:
        sources.files |= _source_files(entry, before)
    row = _row(entry, info, plugin, manager, heavy, seconds)
    description, broken = _without_missing_targets(entry, description)
    return _Loaded(row, description, broken)


def _row(
    entry: EntryPoint,
    info: PluginInfo,
    plugin: Any,
    manager: pluggy.PluginManager,
    heavy: list[str],
    seconds: float,
) -> PluginRow:
    """What the registry keeps of a plugin, with warnings about what it costs."""
    notes = [f"plugin.py imports {name}; import it where it is used" for name in heavy]
    if seconds > SLOW_IMPORT_SECONDS:
        notes.append(f"importing plugin.py takes {seconds:.2f} CPU-seconds")
    return PluginRow(
        name=entry.name,
        summary=info.summary,
        distribution=entry.dist,
        version=entry.version,
        module=entry.value,
        folder=_folder(entry),
        paper=info.paper,
        api=info.api,
        homepage=info.homepage,
        hooks=tuple(h for h in HOOKS if getattr(manager.hook, h).get_hookimpls()),
        warnings=tuple(notes + _unmarked(plugin)),
        seconds=seconds,
    )


def import_plugin(value: str) -> Any:
    """The object of an entry-point value `module[:attribute]`.

    Raises:
        Whatever the import raises; AttributeError for a missing attribute.
    """
    module_name, _, attribute = value.partition(":")
    found: Any = importlib.import_module(module_name.strip())
    for part in filter(None, attribute.strip().split(".")):
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _guarded(phase: str, hint: str = "") -> Generator[None]:
    """Turns whatever a plugin raises into a `_PluginError`, SystemExit included."""
    try:
        yield
    except (KeyboardInterrupt, _PluginError):
        raise
    except BaseException as error:
        raise _PluginError(phase, one_line(error), hint or _hint(error), _details(error)) from error


def _import(entry: EntryPoint) -> Any:
    if entry.name == CORE and entry.value != CORE_MODULE:
        raise _PluginError("metadata", "the name 'core' is reserved", "choose another plugin name")
    if not NAME_PATTERN.fullmatch(entry.name):
        raise _PluginError(
            "metadata",
            f"entry-point name {entry.name!r} does not match [a-z0-9][a-z0-9-]*",
            'rename it in [project.entry-points."tenfold.plugins"] and in PluginInfo',
        )
    with _guarded("import"):
        try:
            return import_plugin(entry.value)
        except ModuleNotFoundError as error:
            module = entry.value.partition(":")[0].strip()
            if error.name and f"{module}.".startswith(f"{error.name}."):
                hint = f"the entry point names {entry.value!r}; correct it, or add the module"
                raise _PluginError("import", one_line(error), hint) from error
            raise


def _register(entry: EntryPoint, plugin: Any) -> pluggy.PluginManager:
    """A manager that holds this plugin alone, with every hook checked."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    with _guarded("hooks", "hooks take no arguments, but observers may take run, item, status"):
        manager.register(plugin, entry.name)
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            raise _PluginError(
                "hooks",
                f"unknown hook {caller.name!r}{nearest(caller.name, HOOKS)}",
                f"hooks are {', '.join(HOOKS)}",
            )
    return manager


def _unmarked(plugin: Any) -> list[str]:
    """Functions that look like hooks and lack the marker, which pluggy ignores silently."""
    notes = []
    for name, value in vars(plugin).items() if hasattr(plugin, "__dict__") else ():
        if name in HOOKS and callable(value) and not hasattr(value, f"{PROJECT}_impl"):
            notes.append(f"{name} is ignored: it lacks @hookimpl")
    return notes


def _card(entry: EntryPoint, manager: pluggy.PluginManager) -> PluginInfo:
    if not manager.hook.tenfold_plugin.get_hookimpls():
        raise _PluginError(
            "tenfold_plugin",
            "the hook tenfold_plugin is missing",
            "add @hookimpl def tenfold_plugin(): return PluginInfo(name, summary)",
        )
    with _guarded("tenfold_plugin"):
        results = manager.hook.tenfold_plugin()
    info = results[0] if results else None
    if not isinstance(info, PluginInfo):
        raise _PluginError(
            "tenfold_plugin",
            f"returned {type(info).__name__}, not a PluginInfo",
            "return tenfold.PluginInfo(name, summary)",
        )
    if info.name != entry.name:
        raise _PluginError(
            "tenfold_plugin",
            f"the entry point is called {entry.name!r}, PluginInfo {info.name!r}",
            "give both the same name",
        )
    with _guarded("api"):
        problem = check_api(info.api)
    if problem:
        raise _PluginError("api", problem, "install matching versions of tenfold and this plugin")
    return info


def _call(manager: pluggy.PluginManager, hook: str, kind: type) -> list[Any]:
    """What one data hook returns, as a checked list; empty when it is not implemented."""
    caller = getattr(manager.hook, hook)
    if not caller.get_hookimpls():
        return []
    right = f"return a list of {kind.__name__}"
    with _guarded(hook):
        results = caller()
        if not results:
            raise _PluginError(hook, "returned None", right)
        returned = results[0]
        if isinstance(returned, str | bytes | dict | kind) or not hasattr(returned, "__iter__"):
            raise _PluginError(hook, f"returned {type(returned).__name__}", right)
        specs = list(islice(returned, MAX_SPECS + 1))
    if len(specs) > MAX_SPECS:
        raise _PluginError(hook, f"yields more than {MAX_SPECS} descriptions", right)
    for spec in specs:
        if not isinstance(spec, kind):
            raise _PluginError(hook, f"yielded {type(spec).__name__}", right)
    return specs


def _describe(entry: EntryPoint, specs: dict[str, list[Any]]) -> Description:
    components = [
        (kind, spec)
        for hook, (kind, _) in _DATA_HOOKS.items()
        if kind != "command"
        for spec in specs[hook]
    ]
    with _guarded("describe", "give each field the type that tenfold.spec says"):
        description, problems = describe(components, specs["tenfold_commands"])
    if problems:
        raise _PluginError("describe", "; ".join(problems), "correct the descriptions in plugin.py")
    return description


def _without_missing_targets(
    entry: EntryPoint, description: Description
) -> tuple[Description, tuple[BrokenPlugin, ...]]:
    """Leaves out components and commands whose module does not exist; the rest stays usable."""
    problems: list[Problem] = []
    components, commands = [], []
    for kind, spec in description.components:
        if cause := missing_target(spec.target):
            problems.append(Problem(f"{kind} {spec.name!r}", cause))
        else:
            components.append((kind, spec))
    for spec in description.commands:
        if cause := missing_target(spec.target):
            problems.append(Problem(f"command {spec.name!r}", cause))
        else:
            commands.append(spec)
    if not problems:
        return description, ()
    broken = BrokenPlugin(
        entry.name,
        entry.dist,
        entry.version,
        "target",
        "; ".join(f"{p.where}: {p.cause}" for p in problems),
        "the rest of the plugin works; correct these targets in plugin.py",
    )
    return Description(tuple(components), tuple(commands)), (broken,)


def _registry(
    loaded: list[_Loaded],
    broken: list[BrokenPlugin],
    disabled: tuple[str, ...],
    workspace: Workspace,
) -> Registry:
    components = [
        Component(
            f"{one.row.name}:{spec.name}",
            one.row.name,
            kind,
            spec,
            one.row.distribution,
            one.row.version,
        )
        for one in loaded
        for kind, spec in one.description.components
    ]
    return Registry(
        plugins={one.row.name: one.row for one in loaded},
        broken=sorted(broken, key=lambda b: (b.name, b.dist)),
        disabled=disabled,
        items=tuple(components),
        command_specs={
            one.row.name: one.description.commands for one in loaded if one.description.commands
        },
        workspace=workspace,
    )


def _folder(entry: EntryPoint) -> str:
    module = sys.modules.get(entry.value.partition(":")[0].strip())
    file = getattr(module, "__file__", None)
    return str(Path(file).parent) if file and "." in entry.value.partition(":")[0] else ""


def _source_files(entry: EntryPoint, before: set[str]) -> set[Path]:
    """Files of modules that this plugin imported, without the standard library's."""
    package = entry.value.partition(":")[0].strip().partition(".")[0]
    files = set()
    for name, module in list(sys.modules.items()):
        own = name == package or name.startswith(f"{package}.")
        if name in before and not own:
            continue
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and name.partition(".")[0] not in sys.stdlib_module_names:
            files.add(Path(file))
    return files


def _hint(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        top = str(error.name or "").partition(".")[0]
        if top in HEAVY_MODULES:
            return f"plugin.py must not import {top}; import it in the component's own module"
        return f"install {top} beside the plugin, or correct the import"
    if isinstance(error, SyntaxError):
        return "correct the syntax, or install a version for this Python"
    if isinstance(error, SystemExit):
        return "a plugin must not exit when it is imported"
    return "see the traceback, and report it to the plugin's authors"


def _details(error: BaseException) -> str:
    """The traceback from the plugin's own first frame on."""
    here = (__file__, pluggy.__path__[0], "<frozen importlib", importlib.__file__ or "")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(here)
    ]
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()
