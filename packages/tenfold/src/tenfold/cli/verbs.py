"""Plugins' own commands: `tenfold <plugin> <verb>`, with options made from their `Param`s.

The verb's target is imported only when it is invoked.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

from tenfold.cli import COMMANDS, GlobalOptions
from tenfold.cli.output import print_json, table_lines
from tenfold.cli.parser import Parser, add_common, finish, new_parser
from tenfold.errors import EXIT_OK, ComponentError, ConfigError, TenfoldError, nearest
from tenfold.params import describe_type, option_name, parse_text
from tenfold.registry import Registry, load_registry
from tenfold.spec import CommandSpec, Param


def run_verb(plugin: str, arguments: Sequence[str], options: GlobalOptions) -> int:
    """Runs `tenfold <plugin> <verb>`.

    Raises:
        ConfigError: no such command or verb, or bad arguments.
        ComponentError: the plugin is broken, or its target cannot be imported.
    """
    registry = load_registry()
    commands = registry.commands(plugin)
    if not commands:
        raise _unknown_command(plugin, registry)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_verb_help(plugin, registry))
        return EXIT_OK
    verb, *rest = arguments
    spec = next((spec for spec in commands if spec.name == verb), None)
    if spec is None:
        known = [spec.name for spec in commands]
        raise ConfigError(
            f"{plugin} has no command {verb!r}{nearest(verb, known)} (it has: {', '.join(known)})"
        )
    parser = new_parser(f"tenfold {plugin} {verb}", spec.summary)
    for param in spec.params:
        add_param(parser, param)
    add_common(parser)
    args = finish(parser.parse(rest), options)
    values = {p.name: _value(p, getattr(args, f"param_{p.name}")) for p in spec.params}
    return _invoke(plugin, spec, values, as_json=args.json)


def add_param(parser: Parser, param: Param) -> None:
    """Adds a parameter as an option, a flag, or a positional argument."""
    settings: dict[str, Any] = {"dest": f"param_{param.name}", "help": _help(param)}
    flags = [option_name(param)]
    if param.positional:
        flags = [settings.pop("dest")]
        settings["metavar"] = option_name(param)
        settings["nargs"] = {
            (True, True): "+",
            (True, False): "*",
            (False, True): None,
            (False, False): "?",
        }[param.is_list, param.required]
    elif param.type == "bool":
        settings["action"] = argparse.BooleanOptionalAction
        settings["required"] = param.required
    else:
        settings["required"] = param.required
        settings["metavar"] = param.element_type.partition(":")[0].upper()
        if param.is_list:
            settings["action"] = "append"
    parser.add_argument(*flags, default=None, **settings)


def _help(param: Param) -> str:
    parts = [param.help, describe_type(param)] if param.help else [describe_type(param)]
    if not param.required and param.default is not None:
        parts.append(f"default {param.default!r}")
    # argparse formats help with %; a literal one must be doubled.
    return "; ".join(parts).replace("%", "%%")


def _value(param: Param, given: Any) -> Any:
    """The checked value: given text, or the default."""
    if given is None or (given == [] and not param.required):
        return param.default
    if isinstance(given, bool):
        return given
    if isinstance(given, list):
        return [item for text in given for item in parse_text(param, text)]
    return parse_text(param, given)


def _invoke(plugin: str, spec: CommandSpec, values: dict[str, Any], *, as_json: bool) -> int:
    """Calls the target. An integer it returns is the exit code; anything else is a result.

    A target that takes `as_json` is told whether `--json` was given, and prints by itself: a
    text while it is being written, or a result together with an exit code.
    """
    from tenfold.build import load_target

    target = load_target(spec.target, f"command {plugin} {spec.name}")
    if "as_json" in inspect.signature(target).parameters:
        values = {**values, "as_json": as_json}
    result = target(**values)
    if result is None or (isinstance(result, int) and not isinstance(result, bool)):
        return result or EXIT_OK
    if as_json or not isinstance(result, str):
        print_json(result)
    else:
        print(result)
    return EXIT_OK


def _verb_help(plugin: str, registry: Registry) -> str:
    rows = [(f"  {spec.name}", spec.summary) for spec in registry.commands(plugin)]
    lines = [
        f"usage: tenfold {plugin} COMMAND ...",
        "",
        registry.plugins[plugin].summary,
        "",
        *table_lines(("Commands:", ""), rows),
        "",
        f"`tenfold {plugin} COMMAND --help` describes a command.",
    ]
    return "\n".join(lines)


def _unknown_command(name: str, registry: Registry) -> TenfoldError:
    """The most helpful error for a first word that is no command."""
    for broken in registry.broken:
        if broken.name == name:
            return ComponentError(broken.line(), hint="`tenfold plugins check` tells more")
    if name in registry.plugins:
        return ConfigError(
            f"plugin {name!r} has no commands", hint=f"`tenfold plugins show {name}`"
        )
    known = [*COMMANDS, *registry.command_specs]
    return ConfigError(
        f"unknown command {name!r}{nearest(name, known)}", hint="`tenfold --help` lists commands"
    )
