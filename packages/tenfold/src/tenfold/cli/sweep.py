"""`tenfold sweep`: run every point of a run file's `[sweep]`, and compare them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tenfold.cli.execution import add_run_options, options_from

SUMMARY = "run every point of a run file's [sweep]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold sweep`."""
    parser.add_argument("file", metavar="FILE|PLUGIN:RECIPE", help="a run file with a [sweep]")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the points and check their plans"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep finished points of an earlier call and continue the rest",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the points one after another; a failing point does not stop the others."""
    from tenfold.config import apply_settings
    from tenfold.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, TenfoldError
    from tenfold.host import Host
    from tenfold.sweeps import expand_sweep

    host = Host()
    source = host.read(args.file)
    points = expand_sweep(apply_settings(source.table, args.settings), args.file)
    configs = [host.resolve(point.table, (), source.path) for point in points]
    for config in configs:
        host.plan(config).require_fit()  # every mistake before the first hour of work
    rows: list[dict[str, Any]] = []
    worst = 0
    for number, (point, config) in enumerate(zip(points, configs, strict=True), start=1):
        label = ", ".join(f"{key}={value}" for key, value in point.settings.items())
        row: dict[str, Any] = {"settings": dict(point.settings)}
        rows.append(row)
        if args.dry_run:
            continue
        print(f"[{number}/{len(points)}] {label}", file=sys.stderr)
        finished = host.finished(config) if args.resume else None
        if finished is not None:
            row |= _recorded(finished)
            continue
        try:
            outcome = host.run_config(config, options_from(args, resume=args.resume))
        except TenfoldError as error:
            print(f"error: {error}", file=sys.stderr)
            row |= {"status": "failed", "message": str(error)}
            worst = worst or EXIT_RUN_FAILED
            continue
        row |= outcome.to_json()
        worst = worst or outcome.exit_code
        if outcome.exit_code == EXIT_INTERRUPTED:
            break
    _print(rows, args)
    return worst


def _recorded(store: Any) -> dict[str, Any]:
    return {
        "run_dir": str(store.path),
        "status": store.status,
        "metrics": store.read_json("metrics.json"),
    }


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "-"
        metrics = "  ".join(
            f"{m['name']}={m['value']:.5g}" for m in row.get("metrics", []) if not m["group"]
        )
        print("  ".join(part for part in (settings, row.get("status", ""), metrics) if part))
