"""`tenfold rerun`: run a recorded configuration again and compare with the record."""

from __future__ import annotations

import argparse
import json

from tenfold.cli.execution import add_run_options, options_from, print_outcome

SUMMARY = "repeat a recorded run and compare the two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold rerun`."""
    parser.add_argument("run", metavar="RUN", help="run folder, id or name")
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs again in a new folder; says whether items and metrics are equal."""
    from tenfold.compare import compare_runs, difference_lines
    from tenfold.host import Host
    from tenfold.store import RunStore, find_run

    host = Host()
    before = find_run(host.runs, args.run)
    record = before.read_json("run.json")
    table = host.recorded_config(before).table()
    config = host.resolve(table, args.settings)
    options = options_from(args, parents=(before.id,))
    if options.limit is None and record.get("limit") is not None:
        args.limit = record["limit"]
        options = options_from(args, parents=(before.id,))
    outcome = host.run_config(config, options)
    difference = compare_runs(before, RunStore(outcome.run_dir))
    if args.json:
        print(json.dumps({**outcome.to_json(), "difference": difference}, ensure_ascii=False))
        return outcome.exit_code
    code = print_outcome(outcome, as_json=False)
    print("\n".join(difference_lines(difference)))
    return code
