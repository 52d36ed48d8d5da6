"""`tenfold run`: run a run file or recipe, see its plan, or continue a run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from tenfold.cli.execution import (
    add_run_options,
    estimate_items,
    options_from,
    plan_json,
    plan_lines,
    print_outcome,
)
from tenfold.errors import ConfigError

if TYPE_CHECKING:
    from tenfold.plan import Plan

SUMMARY = "run a run file or recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold run`."""
    parser.add_argument(
        "file", nargs="?", metavar="FILE|PLUGIN:RECIPE", help="a run file, or a plugin's recipe"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the plan and import nothing heavy"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue RUN (folder, id or name); without RUN, the newest unfinished run of FILE",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs, plans or resumes."""
    from tenfold.host import Host

    host = Host()
    if args.resume and not args.file:
        if args.settings:
            raise ConfigError(
                "--set cannot be used with --resume RUN: a run keeps its configuration",
                hint="start a new run with the changed setting",
            )
        return print_outcome(host.resume(args.resume, options_from(args)), as_json=args.json)
    if not args.file:
        raise ConfigError(
            "nothing to run: give a run file or a recipe",
            hint="`tenfold recipes` lists recipes; `tenfold run --resume RUN` continues a run",
        )
    if args.resume:
        raise ConfigError("give either FILE --resume, or --resume RUN without a file")
    source = host.read(args.file)
    if source.table.get("sweep"):
        raise ConfigError(f"{args.file} has a [sweep]", hint=f"use `tenfold sweep {args.file}`")
    config = host.resolve(source.table, args.settings, source.path)
    if args.dry_run:
        return _show_plan(host.plan(config), args)
    options = options_from(args, resume=args.resume is not None)
    return print_outcome(host.run_config(config, options, source.text), as_json=args.json)


def _show_plan(plan: Plan, args: argparse.Namespace) -> int:
    estimated = estimate_items(plan, args.limit)
    if args.json:
        print(json.dumps(plan_json(plan, estimated), ensure_ascii=False, default=str))
    else:
        print("\n".join(plan_lines(plan, estimated)))
    plan.require_fit()
    return 0
