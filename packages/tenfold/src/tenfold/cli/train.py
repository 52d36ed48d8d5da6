"""`tenfold train`: run a file that has a `[trainer]`, or one trainer named on the line."""

from __future__ import annotations

import argparse
from typing import Any

from tenfold.cli.execution import add_run_options, component_words, options_from, print_outcome
from tenfold.config import SCHEMA
from tenfold.errors import ConfigError

SUMMARY = "train a model: a run file with a [trainer], or --trainer NAME KEY=VALUE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold train`."""
    parser.add_argument(
        "file", nargs="?", metavar="FILE|PLUGIN:RECIPE", help="a run file with a [trainer]"
    )
    for name, example in (
        ("trainer", "core:lm dataset=core:python-stdlib steps=200"),
        ("model", "core:hf checkpoint=path/to/model"),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            metavar="NAME [KEY=VALUE]",
            help=f"a {name} and its parameters, e.g. {example}",
        )
    parser.add_argument("--seed", type=int, help="the run's seed")
    parser.add_argument("--name", default="train", help="name of the run without FILE")
    parser.add_argument(
        "--resume", action="store_true", help="continue the newest unfinished equal run"
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Trains; the checkpoint lies in the run's artifacts."""
    from tenfold.host import Host

    if bool(args.file) == bool(args.trainer):
        raise ConfigError("give either a run file or --trainer NAME")
    host = Host()
    options = options_from(args, resume=args.resume)
    if args.file:
        source = host.read(args.file)
        if "trainer" not in source.table:
            raise ConfigError(f"{args.file} has no [trainer]", hint="use `tenfold run`")
        config = host.resolve(source.table, args.settings, source.path)
        return print_outcome(host.run_config(config, options, source.text), as_json=args.json)
    table: dict[str, Any] = {"schema": SCHEMA, "name": args.name}
    settings: list[str] = []
    for role in ("trainer", "model"):
        if words := getattr(args, role):
            name, given = component_words(words, f"--{role}")
            table[role] = {"use": name}
            settings += [f"{role}.{setting}" for setting in given]
    if args.seed is not None:
        table["seed"] = args.seed
    config = host.resolve(table, [*settings, *args.settings])
    return print_outcome(host.run_config(config, options), as_json=args.json)
