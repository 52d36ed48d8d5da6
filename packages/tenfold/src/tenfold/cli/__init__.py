"""The command line: finds the command, imports its module only, and turns errors into exits.

stdout carries results, stderr progress, warnings and errors. A command module has `SUMMARY`,
`add_arguments(parser)` and `run(args) -> int`; nothing else of the package is imported before
one is chosen, which keeps `--help` fast.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import NamedTuple, TextIO

from tenfold import __version__
from tenfold.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    TenfoldError,
    TenfoldWarning,
    nearest,
)

COMMANDS = {
    "run": ("tenfold.cli.run", "run a run file or recipe"),
    "eval": ("tenfold.cli.eval", "evaluate a model on a dataset, without a run file"),
    "train": (
        "tenfold.cli.train",
        "train a model: a run file with a [trainer], or --trainer NAME KEY=VALUE",
    ),
    "sweep": ("tenfold.cli.sweep", "run every point of a run file's [sweep]"),
    "rerun": ("tenfold.cli.rerun", "repeat a recorded run and compare the two"),
    "runs": ("tenfold.cli.runs", "list, show, diff, rescore, merge, export or remove run records"),
    "report": ("tenfold.cli.report", "write a run's report, or compare several runs"),
    "recipes": ("tenfold.cli.recipes", "list or show the run files that plugins bring"),
    "list": ("tenfold.cli.components", "list models, datasets, evaluators and trainers"),
    "show": ("tenfold.cli.show", "describe a component: parameters, needs, a run-file snippet"),
    "plugins": ("tenfold.cli.plugins", "list, show, check, enable and disable plugins"),
    "init": ("tenfold.cli.init", "start a new plugin package"),
    "workspace": ("tenfold.cli.workspace", "check workspace.toml and plugins.toml"),
    "doctor": ("tenfold.cli.doctor", "report on this machine and installation"),
    "completion": ("tenfold.cli.completion", "print a completion script for your shell"),
}
"""Command → (module, summary); the summary is repeated here so that help imports no module."""

_HIDDEN = {"worker": "tenfold.cli.worker"}
"""Commands that the host starts itself: command → module."""

_INTERNAL = {"worker": "tenfold.cli.worker"}
"""Commands that the host starts itself; they are in no help."""

_GROUPS = {
    "Run": ("run", "eval", "train", "sweep", "rerun"),
    "Look at results": ("runs", "report"),
    "Look at what is there": ("recipes", "list", "show", "plugins"),
    "Set up": ("init", "workspace", "doctor", "completion"),
}


class GlobalOptions(NamedTuple):
    """Options before the command; they may also follow it."""

    json: bool = False
    folder: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: `sys.argv[1:]`) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _own_warnings(), _restored_folder():
        try:
            code = _dispatch(arguments)
            sys.stdout.flush()
        except TenfoldError as error:
            code = error.exit_code
            _complain(f"error: {error}")
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
            _complain("interrupted")
        except BrokenPipeError:
            code = EXIT_OK
            _drop_stdout()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                _complain(stop.code)
    return code


def _dispatch(arguments: list[str]) -> int:
    options, rest = _global_options(arguments)
    if not rest or rest[0] in ("-h", "--help"):
        print(_help())
        return EXIT_OK
    if rest[0] == "--version":
        print(f"tenfold {__version__}")
        return EXIT_OK
    name, *rest = rest
    if name == "help":
        return _dispatch([*rest, "--help"])
    if name in COMMANDS or name in _HIDDEN:
        from tenfold.cli.parser import run_command

        module = _HIDDEN.get(name) or COMMANDS[name][0]
        return run_command(name, module, rest, options)
    from tenfold.cli.verbs import run_verb

    return run_verb(name, rest, options)


def _global_options(arguments: list[str]) -> tuple[GlobalOptions, list[str]]:
    """Options before the command, and what is left; changes to the `-C` folder."""
    options = GlobalOptions()
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help", "--version"):
        option, equals, value = rest.pop(0).partition("=")
        if option == "--json" and not equals:
            options = options._replace(json=True)
        elif option in ("-C", "--workspace"):
            if not equals and not rest:
                raise ConfigError(f"{option} needs a folder")
            options = options._replace(folder=value if equals else rest.pop(0))
            enter_folder(options.folder)
        else:
            known = ("--json", "--workspace", "--help", "--version")
            raise ConfigError(
                f"unknown option {option}{nearest(option, known)}",
                hint="options of a command follow it; `tenfold --help` lists commands",
            )
    return options, rest


def enter_folder(folder: str) -> None:
    """Goes on as if the program had been started in `folder`.

    Raises:
        ConfigError: there is no such folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(f"cannot work in {folder!r}: {error.strerror}") from None


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        f"tenfold {__version__}: plan, run and record compositions of models, datasets and",
        "evaluators from plugins",
        "",
        "usage: tenfold [-C FOLDER] [--json] COMMAND ...",
    ]
    for group, names in _GROUPS.items():
        lines += ["", f"{group}:", *(f"  {n:<{width}}{COMMANDS[n][1]}" for n in names)]
    if verbs := _indexed_verbs():
        width = max(len(name) for name, _ in verbs) + 2
        lines += ["", "From plugins:", *(f"  {name:<{width}}{text}" for name, text in verbs)]
    return "\n".join(
        [
            *lines,
            "",
            "Options:",
            "  -C, --workspace FOLDER  work as if started in FOLDER",
            "  --json                  results as JSON on stdout",
            "  --version               print the version",
            "",
            "`tenfold COMMAND --help` describes a command.",
        ]
    )


def _indexed_verbs() -> list[tuple[str, str]]:
    """Commands of plugins, when the index knows them; help never runs a discovery."""
    # A damaged workspace file is no reason to withhold the help.
    with contextlib.suppress(Exception):
        from tenfold.index_file import verbs
        from tenfold.workspace import find_workspace

        return verbs(find_workspace())
    return []


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(message, file=sys.stderr)


def _drop_stdout() -> None:
    """After the reader went away: nothing more to say, and no complaint at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _own_warnings() -> Generator[None]:
    """Shows Tenfold's own warnings as one line, without a source location."""
    original = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, TenfoldWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            original(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TenfoldWarning)
        warnings.showwarning = show  # ty: ignore[invalid-assignment]
        yield


@contextlib.contextmanager
def _restored_folder() -> Generator[None]:
    """Undoes `-C`, for callers that live on."""
    before = os.getcwd()  # noqa: PTH109 - keeps pathlib out of --help
    try:
        yield
    finally:
        os.chdir(before)


__all__ = ["COMMANDS", "GlobalOptions", "enter_folder", "main"]
