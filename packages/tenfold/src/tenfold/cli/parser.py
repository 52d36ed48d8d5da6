"""Argument parsing shared by all commands: one error style, common options, suggestions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

from tenfold.cli import GlobalOptions, enter_folder
from tenfold.errors import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` instead of exiting, and takes no
    abbreviated options (an option added later must not change what a script means)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Raises the message as a usage error."""
        raise ConfigError(message, hint=f"`{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses all arguments; an unknown option is an error that names the nearest one."""
        args, extra = self.parse_known_args(arguments)
        if extra:
            name = extra[0].partition("=")[0]
            known = sorted(set(self._options())) if name.startswith("-") else []
            self.error(f"unknown argument {name!r}{nearest(name, known)}")
        return args

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()


def new_parser(prog: str, summary: str) -> Parser:
    """An empty parser that describes itself."""
    return Parser(prog=prog, description=summary[:1].upper() + summary[1:] + ".")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `-C/--workspace` to a parser and to those of its actions; they are
    absent from the result unless given."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                add_common(nested)
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="results as JSON on stdout"
    )
    group.add_argument(
        "-C",
        "--workspace",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="work as if started in FOLDER",
    )


class Actions:
    """Sub-commands of a command, such as `plugins list`.

        actions = Actions(parser, default="list")
        listing = actions.add("list", "list plugins")

    The chosen name is `args.action`.
    """

    def __init__(self, parser: argparse.ArgumentParser, default: str = "") -> None:
        self._subparsers = parser.add_subparsers(
            dest="action", metavar="ACTION", required=not default
        )
        parser.set_defaults(action=default)

    def add(self, name: str, summary: str) -> argparse.ArgumentParser:
        """A parser for one action."""
        return self._subparsers.add_parser(
            name, help=summary, description=summary[:1].upper() + summary[1:] + "."
        )


def run_command(
    name: str, module_name: str, arguments: Sequence[str], options: GlobalOptions
) -> int:
    """Imports a command's module, parses its arguments and runs it."""
    module = import_module(module_name)
    parser = new_parser(f"tenfold {name}", module.SUMMARY)
    module.add_arguments(parser)
    add_common(parser)
    return module.run(finish(parser.parse(arguments), options))


def finish(args: argparse.Namespace, options: GlobalOptions) -> argparse.Namespace:
    """Merges the options before the command, and enters a `-C` folder given after it."""
    folder = getattr(args, "workspace", "")
    if folder:
        enter_folder(folder)
    args.json = getattr(args, "json", False) or options.json
    args.workspace = folder or options.folder
    return args
