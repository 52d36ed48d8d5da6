"""`tenfold list`: installed components, filtered by kind, capability, tag or plugin."""

from __future__ import annotations

import argparse
from typing import Any

from tenfold.cli.output import print_json, print_table
from tenfold.errors import EXIT_OK, ConfigError, nearest
from tenfold.registry import Component, Registry, load_registry
from tenfold.spec import KINDS

SUMMARY = "list models, datasets, evaluators and trainers"

_OFFERS = {"own": "", "base": " (from its base)", "adapter": " (by adapter)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the filters."""
    parser.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help="models, datasets, evaluators or trainers; all when left out",
    )
    parser.add_argument(
        "--capability",
        metavar="NAME",
        help="models that offer it, natively, from their base or by an adapter; for datasets, "
        "the record kind",
    )
    parser.add_argument("--tag", metavar="WORD", help="components with this tag")
    parser.add_argument("--plugin", metavar="NAME", help="components of this plugin")


def run(args: argparse.Namespace) -> int:
    """Prints the matching components."""
    kind = _kind(args.kind)
    registry = load_registry()
    if args.plugin and args.plugin not in registry.plugins:
        raise ConfigError(f"no plugin {args.plugin!r}{nearest(args.plugin, registry.plugins)}")
    found = [
        component
        for component in registry.components(kind)
        if (not args.tag or args.tag in component.spec.tags)
        and (not args.plugin or args.plugin == component.plugin)
    ]
    how: dict[str, str] = {}
    if args.capability:
        how = _offering(registry, found, args.capability)
        found = [component for component in found if how.get(_key(component))]
    if args.json:
        print_json([{**component_json(c), **_how_json(how, c)} for c in found])
        return EXIT_OK
    rows = [
        (c.kind, c.id, _describe(c) + _OFFERS[how.get(_key(c), "own")], c.spec.summary)
        for c in sorted(found, key=lambda c: KINDS.index(c.kind))
    ]
    print_table(("KIND", "COMPONENT", "PROVIDES / NEEDS", "SUMMARY"), rows)
    return EXIT_OK


def component_json(component: Component) -> dict[str, Any]:
    """A component's description as JSON values, without its parameters."""
    spec = component.spec
    return {
        "id": component.id,
        "kind": component.kind,
        "summary": spec.summary,
        "provides": list(spec.provides),
        "requires": {role: list(names) for role, names in spec.requires.items()},
        "data": {role: list(names) for role, names in spec.data.items()},
        "inherits": spec.inherits,
        "modules": list(spec.modules),
        "extras": list(spec.extras),
        "tags": list(spec.tags),
        "version": spec.version,
        "distribution": component.distribution,
        "distribution_version": component.version,
    }


def needs_text(component: Component) -> str:
    """What a component needs, in one line: `model: grad, tokenize; train: text`."""
    needs = {**component.spec.requires}
    parts = [f"{role}: {', '.join(names)}" for role, names in needs.items() if names]
    parts += [f"{role}: {' or '.join(kinds)}" for role, kinds in component.spec.data.items()]
    return "; ".join(parts)


def _describe(component: Component) -> str:
    provides = ", ".join(component.spec.provides)
    if component.kind in ("model", "dataset"):
        return provides or "-"
    return needs_text(component) or "-"


def _kind(word: str | None) -> str | None:
    """The kind that a word means; plural and singular are both understood."""
    if word is None:
        return None
    kind = word.removesuffix("s")
    if kind not in KINDS:
        known = [f"{name}s" for name in KINDS]
        raise ConfigError(f"unknown kind {word!r}{nearest(word, known)} ({', '.join(known)})")
    return kind


def _key(component: Component) -> str:
    return f"{component.kind} {component.id}"


def _how_json(how: dict[str, str], component: Component) -> dict[str, str]:
    return {"offered": how[_key(component)]} if _key(component) in how else {}


def _offering(registry: Registry, found: list[Component], name: str) -> dict[str, str]:
    """For each component that offers a capability or record kind: `own`, `base`, `adapter`."""
    from tenfold.adapters import ADAPTERS
    from tenfold.capabilities import CAPABILITIES
    from tenfold.plan import with_implied
    from tenfold.records import RECORD_KINDS

    if name not in CAPABILITIES and name not in RECORD_KINDS:
        known = [*CAPABILITIES, *RECORD_KINDS]
        raise ConfigError(
            f"unknown capability {name!r}{nearest(name, known)} "
            f"(capabilities: {', '.join(CAPABILITIES)}; record kinds: {', '.join(RECORD_KINDS)})"
        )
    adapter = ADAPTERS.get(name)
    how = {}
    for component in found:
        own = with_implied(component.spec.provides)
        if name in own:
            how[_key(component)] = "own"
        elif component.kind != "model":
            continue
        elif component.spec.inherits:
            how[_key(component)] = "base"
        elif adapter is not None and set(adapter[0]) <= own:
            how[_key(component)] = "adapter"
    return how
