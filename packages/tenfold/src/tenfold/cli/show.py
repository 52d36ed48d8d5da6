"""`tenfold show PLUGIN:NAME`: one component in full, with a run-file snippet."""

from __future__ import annotations

import argparse
from typing import Any

from tenfold.cli.components import component_json
from tenfold.cli.output import print_json, print_table
from tenfold.cli.snippet import snippet
from tenfold.errors import EXIT_OK, ComponentError, ConfigError
from tenfold.params import describe_type
from tenfold.registry import Component, Registry, load_registry
from tenfold.spec import KINDS, Param

SUMMARY = "describe a component: parameters, needs, a run-file snippet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the component's name and kind."""
    parser.add_argument("name", metavar="PLUGIN:NAME", help="component id, or a unique bare name")
    parser.add_argument("--kind", choices=KINDS, help="needed when several kinds share the name")


def run(args: argparse.Namespace) -> int:
    """Prints the component."""
    registry = load_registry()
    component = _find(registry, args.name, args.kind)
    if args.json:
        print_json(
            {
                **component_json(component),
                "params": [param_json(param) for param in component.spec.params],
                "snippet": snippet(component, registry),
            }
        )
        return EXIT_OK
    _print_facts(component)
    if component.spec.params:
        print()
        print_table(
            ("PARAMETER", "TYPE", "DEFAULT", "DESCRIPTION"),
            [_row(param) for param in component.spec.params],
        )
    print("\nIn a run file:\n")
    print(snippet(component, registry))
    return EXIT_OK


def param_json(param: Param) -> dict[str, Any]:
    """A parameter as JSON values; `default` is absent when it is required."""
    row: dict[str, Any] = {"name": param.name, "type": param.type, "required": param.required}
    if not param.required:
        row["default"] = param.default
    row |= {"choices": list(param.choices), "minimum": param.minimum, "maximum": param.maximum}
    return {**row, "identity": param.identity, "help": param.help}


def _find(registry: Registry, name: str, kind: str | None) -> Component:
    if kind:
        return registry.component(kind, name)
    # The same name may stand for components of several kinds; each kind is a name space.
    found: list[Component] = []
    for each in KINDS:
        try:
            found.append(registry.component(each, name))
        except ComponentError as problem:
            if "ambiguous" in str(problem):
                raise
    if len(found) > 1:
        kinds = ", ".join(component.kind for component in found)
        raise ConfigError(f"{name!r} names several components ({kinds}); add --kind")
    if not found:
        raise registry.unknown(name)
    return found[0]


def _print_facts(component: Component) -> None:
    spec = component.spec
    print(f"{component.id} ({component.kind}): {spec.summary}")
    facts = {
        "from": f"{component.distribution} {component.version}",
        "provides": ", ".join(spec.provides),
        "keeps": f"what its {spec.inherits!r} can do" if spec.inherits else "",
        "needs": "; ".join(
            f"{role} with {', '.join(names) or 'nothing special'}"
            for role, names in spec.requires.items()
        ),
        "data": "; ".join(f"{role}: {' or '.join(k) or 'any'}" for role, k in spec.data.items()),
        "trained by": spec.trainer,
        "imports": ", ".join(spec.modules),
        "install": ", ".join(spec.extras),
        "tags": ", ".join(spec.tags),
        "old names": ", ".join(spec.deprecated),
    }
    for label, value in facts.items():
        if value:
            print(f"  {label:<11} {value}")


def _row(param: Param) -> tuple[str, str, str, str]:
    default = (
        "required" if param.required else "-" if param.default is None else repr(param.default)
    )
    limits = describe_type(param) if param.choices or _bounded(param) else ""
    text = "; ".join(part for part in (param.help, limits) if part)
    return param.name, param.type, default, text


def _bounded(param: Param) -> bool:
    return param.minimum is not None or param.maximum is not None
