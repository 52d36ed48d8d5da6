"""`tenfold runs`: list, show, compare, re-score, merge, export and remove run records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tenfold.cli.execution import metric_lines

SUMMARY = "list, show, diff, rescore, merge, export or remove run records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold runs`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="one line per run, newest last")
    listing.add_argument("--name", help="only runs of this name")
    for name, text in (
        ("show", "configuration, metrics and facts of a run"),
        ("rescore", "aggregate the recorded items again"),
    ):
        actions.add_parser(name, help=text).add_argument("run", metavar="RUN")
    diff = actions.add_parser("diff", help="what differs between two runs")
    diff.add_argument("first", metavar="RUN")
    diff.add_argument("second", metavar="RUN")
    merge = actions.add_parser("merge", help="join the shards of one run into a new record")
    merge.add_argument("runs", nargs="+", metavar="RUN")
    export = actions.add_parser("export", help="write items as JSON lines or CSV")
    export.add_argument("run", metavar="RUN")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl|FILE.csv")
    remove = actions.add_parser("rm", help="remove run folders")
    remove.add_argument("runs", nargs="+", metavar="RUN")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(action="list", name=None)


def run(args: argparse.Namespace) -> int:
    """Dispatches to the action."""
    from tenfold.host import Host

    return _ACTIONS[args.action or "list"](Host(), args)


def _list(host: Any, args: argparse.Namespace) -> int:
    from tenfold.store import all_runs

    rows = []
    for store in all_runs(host.runs):
        record = store.read_json("run.json")
        if args.name and record.get("name") != args.name:
            continue
        task = record.get("components", {}).get("task", {}).get("id", "")
        done = record.get("counts", {}).get("done", 0)
        rows.append(
            {
                "name": record.get("name"),
                "id": store.id,
                "status": store.status,
                "task": task,
                "items": done + record.get("counts", {}).get("reused", 0),
                "path": str(store.path),
            }
        )
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
    elif not rows:
        print(f"no runs under {host.runs}")
    for row in [] if args.json else rows:
        print(
            f"{row['name']:<24} {row['id']}  {row['status']:<11} {row['task']:<24} "
            f"{row['items']} items"
        )
    return 0


def _show(host: Any, args: argparse.Namespace) -> int:
    from tenfold.records import Metric
    from tenfold.store import find_run

    store = find_run(host.runs, args.run)
    record = store.read_json("run.json")
    has_metrics = (store.path / "metrics.json").is_file()
    metrics = store.read_json("metrics.json") if has_metrics else []
    if args.json:
        print(json.dumps({**record, "metrics": metrics}, ensure_ascii=False))
        return 0
    for key in ("name", "id", "status", "message", "started", "ended", "seed", "counts", "seconds"):
        if record.get(key) not in (None, ""):
            print(f"{key:<8} {record[key]}")
    print("\n".join(metric_lines([Metric(**row) for row in metrics])))
    print(f"\n# {store.path / 'config.toml'}")
    print((store.path / "config.toml").read_text(encoding="utf-8"))
    return 0


def _diff(host: Any, args: argparse.Namespace) -> int:
    from tenfold.compare import compare_runs, difference_lines
    from tenfold.store import find_run

    difference = compare_runs(find_run(host.runs, args.first), find_run(host.runs, args.second))
    if args.json:
        print(json.dumps(difference, ensure_ascii=False))
    else:
        print("\n".join(difference_lines(difference)))
    return 0


def _rescore(host: Any, args: argparse.Namespace) -> int:
    from tenfold.cli.execution import print_outcome
    from tenfold.rescore import rescore
    from tenfold.store import find_run

    return print_outcome(rescore(host, find_run(host.runs, args.run)), as_json=args.json)


def _merge(host: Any, args: argparse.Namespace) -> int:
    from tenfold.cli.execution import print_outcome
    from tenfold.rescore import merge
    from tenfold.store import find_run

    stores = [find_run(host.runs, name) for name in args.runs]
    return print_outcome(merge(host, stores), as_json=args.json)


def _export(host: Any, args: argparse.Namespace) -> int:
    from tenfold.compare import export_items
    from tenfold.store import find_run

    count = export_items(find_run(host.runs, args.run), args.output)
    message = {"items": count, "output": str(args.output)}
    print(json.dumps(message) if args.json else f"{count} items → {args.output}")
    return 0


def _remove(host: Any, args: argparse.Namespace) -> int:
    import shutil
    import sys

    from tenfold.errors import ConfigError
    from tenfold.store import find_run

    stores = [find_run(host.runs, name) for name in args.runs]
    if not args.yes:
        if not sys.stdin.isatty():
            raise ConfigError("`runs rm` removes folders for good", hint="confirm with --yes")
        print("\n".join(str(store.path) for store in stores))
        if input("remove these? [y/N] ").strip().lower() != "y":
            return 0
    for store in stores:
        store.lock()  # a run in use is not removed
        shutil.rmtree(store.path)
        store.unlock()
    if args.json:
        print(json.dumps([str(store.path) for store in stores]))
    return 0


_ACTIONS = {
    "list": _list,
    "show": _show,
    "diff": _diff,
    "rescore": _rescore,
    "merge": _merge,
    "export": _export,
    "rm": _remove,
}
