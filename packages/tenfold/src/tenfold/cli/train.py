"""`tenfold train`: run a file that has a `[trainer]`."""

from __future__ import annotations

import argparse

from tenfold.cli.execution import add_run_options, options_from, print_outcome
from tenfold.errors import ConfigError

SUMMARY = "train a model: a run file with a [trainer]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold train`."""
    parser.add_argument("file", metavar="FILE|PLUGIN:RECIPE", help="a run file with a [trainer]")
    parser.add_argument(
        "--resume", action="store_true", help="continue the newest unfinished run of FILE"
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Trains; the checkpoint lies in the run's artifacts."""
    from tenfold.host import Host

    host = Host()
    source = host.read(args.file)
    if "trainer" not in source.table:
        raise ConfigError(f"{args.file} has no [trainer]", hint="use `tenfold run` for evaluators")
    config = host.resolve(source.table, args.settings, source.path)
    options = options_from(args, resume=args.resume)
    return print_outcome(host.run_config(config, options, source.text), as_json=args.json)
