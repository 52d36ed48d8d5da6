"""`tenfold plugins`: what is installed, what is broken and why, and which plugins load."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from tenfold.cli.output import note, print_json, print_table
from tenfold.cli.parser import Actions
from tenfold.errors import EXIT_COMPONENT, EXIT_OK, ComponentError, ConfigError, nearest
from tenfold.registry import BrokenPlugin, PluginRow, Registry, load_registry
from tenfold.spec import KINDS

SUMMARY = "list, show, check, enable and disable plugins"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions; without one, plugins are listed."""
    actions = Actions(parser, default="list")
    actions.add("list", "list plugins, broken and disabled ones too")
    show = actions.add("show", "show one plugin: where it is from and what it brings")
    check = actions.add(
        "check", "say why plugins are broken; with a name, run the conformance kit on it"
    )
    check.add_argument("name", nargs="?", metavar="NAME", help="plugin, by name")
    check.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="COMPONENT.PARAM=VALUE",
        help="parameter of a component that does not build with its defaults; repeatable",
    )
    enable = actions.add("enable", "let plugins.toml load a plugin")
    disable = actions.add("disable", "keep plugins.toml from loading a plugin")
    for action in (show, enable, disable):
        action.add_argument("name", metavar="NAME", help="plugin, by name")


def run(args: argparse.Namespace) -> int:
    """Runs one action."""
    if args.action in ("enable", "disable"):
        return _switch(args.name, enable=args.action == "enable", as_json=args.json)
    if args.action == "check":
        return _check_one(args) if args.name else _check_all(as_json=args.json)
    registry = load_registry(lenient=True)
    if args.action == "show":
        return _show(registry, args.name, as_json=args.json)
    return _list(registry, as_json=args.json)


def plugin_json(registry: Registry, row: PluginRow) -> dict[str, Any]:
    """A plugin's card and contents as JSON values."""
    return {
        "name": row.name,
        "status": "ok",
        "distribution": row.distribution,
        "version": row.version,
        "summary": row.summary,
        "paper": row.paper,
        "homepage": row.homepage,
        "api": row.api,
        "module": row.module,
        "components": {
            kind: [c.spec.name for c in registry.components(kind) if c.plugin == row.name]
            for kind in KINDS
        },
        "commands": [spec.name for spec in registry.commands(row.name)],
        "recipes": [recipe.id for recipe in registry.recipes() if recipe.plugin == row.name],
        "observes": any(hook.startswith(("tenfold_run", "tenfold_item")) for hook in row.hooks),
        "warnings": list(row.warnings),
    }


def broken_json(broken: BrokenPlugin) -> dict[str, str]:
    """A broken plugin as JSON values."""
    return {name: getattr(broken, name) for name in broken.__dataclass_fields__}


def _list(registry: Registry, *, as_json: bool) -> int:
    if as_json:
        print_json(
            {
                "plugins": [plugin_json(registry, row) for row in registry.plugins.values()],
                "broken": [broken_json(broken) for broken in registry.broken],
                "disabled": list(registry.disabled),
            }
        )
        return EXIT_OK
    counts = Counter((c.plugin, c.kind) for c in registry.items)
    rows = []
    for row in registry.plugins.values():
        has = [f"{n} {_plural(kind, n)}" for kind in KINDS if (n := counts[row.name, kind])]
        rows.append((row.name, row.version, "ok", ", ".join(has) or "-", row.summary))
    for broken in registry.broken:
        rows.append((broken.name, broken.version or "-", "broken", "-", broken.cause))
    rows += [(name, "-", "disabled", "-", "") for name in registry.disabled]
    print_table(("PLUGIN", "VERSION", "STATUS", "COMPONENTS", "SUMMARY"), rows)
    for row in registry.plugins.values():
        for message in row.warnings:
            note(f"warning: plugin {row.name!r}: {message}")
    return EXIT_OK


def _plural(kind: str, count: int) -> str:
    return kind if count == 1 else f"{kind}s"


def _show(registry: Registry, name: str, *, as_json: bool) -> int:
    row = registry.plugins.get(name)
    if row is None:
        raise _no_plugin(registry, name)
    if as_json:
        print_json(plugin_json(registry, row))
        return EXIT_OK
    print(f"{row.name}: {row.summary}")
    facts = {
        "distribution": f"{row.distribution} {row.version}",
        "module": row.module,
        "plugin API": row.api,
        "paper": row.paper,
        "homepage": row.homepage,
    }
    for label, value in facts.items():
        if value:
            print(f"  {label:<13} {value}")
    components = [c for c in registry.items if c.plugin == name]
    if components:
        print()
        print_table(("KIND", "COMPONENT", ""), [(c.kind, c.id, c.spec.summary) for c in components])
    if commands := registry.commands(name):
        print()
        print_table(("COMMAND", ""), [(f"tenfold {name} {c.name}", c.summary) for c in commands])
    if recipes := [recipe for recipe in registry.recipes() if recipe.plugin == name]:
        print("\nRECIPES")
        for recipe in recipes:
            print(f"tenfold run {recipe.id}")
    for message in row.warnings:
        note(f"warning: {message}")
    return EXIT_OK


def _check_all(*, as_json: bool) -> int:
    """Discovers anew and tells the full story of everything that is broken."""
    registry = load_registry(cached=False, lenient=True)
    notes = {row.name: row.warnings for row in registry.plugins.values() if row.warnings}
    if as_json:
        print_json(
            {
                "ok": list(registry.plugins),
                "broken": [broken_json(broken) for broken in registry.broken],
                "warnings": notes,
            }
        )
        return EXIT_COMPONENT if registry.broken else EXIT_OK
    for row in registry.plugins.values():
        print(f"ok      {row.name} ({row.distribution} {row.version})")
        for message in row.warnings:
            print(f"        warning: {message}")
    for broken in registry.broken:
        print(
            f"BROKEN  {broken.name}" + (f" ({broken.dist} {broken.version})" if broken.dist else "")
        )
        print(f"        phase: {broken.phase}")
        print(f"        cause: {broken.cause}")
        if broken.hint:
            print(f"        hint:  {broken.hint}")
        for line in broken.details.splitlines():
            print(f"        | {line}")
    return EXIT_COMPONENT if registry.broken else EXIT_OK


def _check_one(args: argparse.Namespace) -> int:
    """Runs the conformance kit on one plugin."""
    registry = load_registry(cached=False, lenient=True)
    if args.name not in registry.plugins:
        raise _no_plugin(registry, args.name)
    from tenfold.testing import check_plugin

    params = _component_params(args.settings, args.name)
    findings = check_plugin(args.name, params=params, registry=registry, progress=note)
    failed = [finding for finding in findings if finding.status == "fail"]
    if args.json:
        print_json({"plugin": args.name, "findings": [f.to_json() for f in findings]})
    else:
        for finding in findings:
            print(finding.line())
        counts = Counter(finding.status for finding in findings)
        print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    return EXIT_COMPONENT if failed else EXIT_OK


def _component_params(settings: list[str], plugin: str) -> dict[str, dict[str, Any]]:
    """`hf.checkpoint=DIR` or `core:hf.checkpoint=DIR`, as parameters by component id."""
    from tenfold.config import parse_setting

    params: dict[str, dict[str, Any]] = {}
    for text in settings:
        path, value = parse_setting(text)
        if len(path) != 2:
            raise ConfigError(f"--set {text!r}: write it as component.param=value")
        component, name = path
        name_space = component if ":" in component else f"{plugin}:{component}"
        params.setdefault(name_space, {})[name] = value
    return params


def _no_plugin(registry: Registry, name: str) -> ComponentError:
    for broken in registry.broken:
        if broken.name == name:
            message = f"{broken.line()}\n{broken.details}".rstrip()
            return ComponentError(message, hint=broken.hint)
    if name in registry.disabled:
        return ComponentError(
            f"plugin {name!r} is disabled", hint=f"`tenfold plugins enable {name}`"
        )
    return ComponentError(f"no plugin {name!r}{nearest(name, registry.plugins)}")


def _switch(name: str, *, enable: bool, as_json: bool) -> int:
    """Edits `[policy]` of plugins.toml; the rest of the file stays as it is."""
    from tenfold.files import write_text
    from tenfold.tomledit import set_member
    from tenfold.workspace import PLUGINS_FILE, find_workspace

    if name == "core":
        raise ConfigError("the plugin 'core' is always loaded")
    workspace = find_workspace()
    _require_known(name, workspace.policy.catalogue)
    path = workspace.policy.path or (workspace.root or Path.cwd()) / PLUGINS_FILE
    text = path.read_bytes().decode("utf-8") if path.is_file() else ""
    listed = _listed(path, "enable")
    if isinstance(listed, list):
        edited = set_member(text, "policy", "enable", name, present=enable)
        if enable:
            edited = set_member(edited, "policy", "disable", name, present=False)
    else:
        edited = set_member(text, "policy", "disable", name, present=not enable)
    if edited != text:
        write_text(path, edited)
    if as_json:
        print_json(
            {"plugin": name, "enabled": enable, "file": str(path), "changed": edited != text}
        )
    else:
        state = "enabled" if enable else "disabled"
        print(f"{name} is {'now' if edited != text else 'already'} {state} in {path}")
    return EXIT_OK


def _listed(path: Path, key: str) -> Any:
    from tenfold.workspace import read_toml

    return read_toml(path).get("policy", {}).get(key) if path.is_file() else None


def _require_known(name: str, catalogue: Any) -> None:
    """Raises ComponentError for a name that no distribution and no catalogue knows."""
    from tenfold.installed import find_entry_points

    known = {entry.name for entry in find_entry_points()[0]} | set(catalogue)
    if name not in known:
        raise ComponentError(
            f"no plugin {name!r}{nearest(name, known)}", hint="`tenfold plugins` lists them"
        )
