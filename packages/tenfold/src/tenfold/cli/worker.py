"""`tenfold worker`: one process of a run with several; started by the host, not by hand."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tenfold.cli.execution import add_run_options, options_from

SUMMARY = "one process of a run with several (started by the host)"
HIDDEN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold worker`."""
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--expect", type=int, required=True, metavar="N")
    parser.add_argument("--recorded", type=int, default=0, metavar="N")
    parser.add_argument("--resume", action="store_true")
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Executes this process's share of the run."""
    from pathlib import Path

    from tenfold.host import Host
    from tenfold.run import execute
    from tenfold.scale.launch import this_process, use_host_stderr
    from tenfold.store import RunStore

    use_host_stderr()
    process = this_process(args.expect, args.recorded)
    host = Host()
    store = RunStore(Path(args.run_dir))
    plan = host.plan(host.recorded_config(store))
    options = replace(options_from(args, resume=args.resume), process=process)
    observers = host.registry.observers()
    execute(plan, store, host.workspace, options, observers)
    # The record holds the exit code; a failure here would make the launcher end the others.
    return 0
