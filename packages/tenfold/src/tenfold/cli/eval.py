"""`tenfold eval`: one evaluator on one model and one dataset, without a run file."""

from __future__ import annotations

import argparse
from typing import Any

from tenfold.cli.execution import add_run_options, component_words, options_from, print_outcome
from tenfold.config import SCHEMA

SUMMARY = "evaluate a model on a dataset, without a run file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold eval`."""
    for name, example in (
        ("model", "core:hf checkpoint=path/to/model"),
        ("dataset", "core:jsonl path=data.jsonl"),
        ("evaluator", "core:perplexity"),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            required=True,
            metavar="NAME [KEY=VALUE]",
            help=f"a {name} and its parameters, e.g. {example}".replace("a evalu", "an evalu"),
        )
    parser.add_argument("--seed", type=int, help="the run's seed")
    parser.add_argument("--name", default="eval", help="name of the run (default: eval)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the newest unfinished equal run"
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Builds a run table from the options and runs it."""
    from tenfold.host import Host

    table: dict[str, Any] = {"schema": SCHEMA, "name": args.name}
    settings: list[str] = []
    for role in ("model", "dataset", "evaluator"):
        name, given = component_words(getattr(args, role), f"--{role}")
        table[role] = {"use": name}
        settings += [f"{role}.{setting}" for setting in given]
    if args.seed is not None:
        table["seed"] = args.seed
    host = Host()
    config = host.resolve(table, [*settings, *args.settings])
    options = options_from(args, resume=args.resume)
    return print_outcome(host.run_config(config, options), as_json=args.json)
