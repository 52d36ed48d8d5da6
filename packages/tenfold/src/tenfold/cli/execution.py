"""Options and output shared by the commands that run something."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tenfold.errors import ComponentError, ConfigError, TenfoldError

if TYPE_CHECKING:
    from tenfold.plan import Node, Plan
    from tenfold.run import Options, Outcome


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """`--limit`, `--shard`, `--quiet`, and the `--set` option."""
    add_set_option(parser)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="take only the first N items of the plan"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/K",
        help="take every K-th item starting at I (0-based); merge with `tenfold runs merge`",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """`--set table.key=value`, repeatable."""
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the run file (`--set evaluator.steps=5`); repeatable",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """`i/k` with 0 <= i < k."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/K with 0 <= I < K, e.g. 0/4")
    return int(index), int(count)


def options_from(args: argparse.Namespace, **more: Any) -> Options:
    """Run options of parsed arguments."""
    from tenfold.run import Options

    return Options(
        limit=args.limit,
        shard=args.shard,
        progress=not args.quiet,
        argv=tuple(sys.argv[1:]),
        **more,
    )


def print_outcome(outcome: Outcome, *, as_json: bool) -> int:
    """Shows what a run gave; returns its exit code."""
    if as_json:
        print(json.dumps(outcome.to_json(), ensure_ascii=False))
        return outcome.exit_code
    for line in metric_lines(outcome.metrics):
        print(line)
    counts = f"{outcome.done} done"
    if outcome.reused:
        counts += f", {outcome.reused} reused"
    if outcome.failed:
        counts += f", {outcome.failed} failed"
    if outcome.checkpoint is not None:
        print(f"checkpoint: {outcome.checkpoint}")
    else:
        print(f"items:  {counts}")
    report = outcome.run_dir / "report.html"
    print(f"run:    {outcome.run_dir}")
    if report.is_file():
        print(f"report: {report}")
    if outcome.message:
        print(f"{outcome.status}: {outcome.message}", file=sys.stderr)
    if outcome.status == "interrupted":
        print(f"continue with: tenfold run --resume {outcome.run_dir}", file=sys.stderr)
    return outcome.exit_code


def metric_lines(metrics: Sequence[Any]) -> list[str]:
    """Metrics as aligned lines."""
    rows = []
    for metric in metrics:
        name = f"{metric.name} [{metric.group}]" if metric.group else metric.name
        text = f"{metric.value:.5g} {metric.unit}".rstrip()
        if metric.interval is not None:
            text += f"  ({metric.interval[0]:.4g} to {metric.interval[1]:.4g})"
        rows.append((name, text, f"n={metric.n}"))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]


def plan_json(plan: Plan, estimated: int | None) -> dict[str, Any]:
    """What `--dry-run --json` prints."""
    return {
        "config": plan.config.table(),
        "components": plan.tree(),
        "checks": [
            {"where": c.where, "needs": c.needs, "by": c.by, "ok": c.ok, "via": c.via}
            for c in plan.checks
        ],
        "adapters": {where: list(names) for where, names in plan.adapters.items()},
        "estimated_items": estimated,
        "cost": plan_cost(plan, estimated),
        "heavy_modules": plan.heavy_modules(),
    }


def plan_lines(plan: Plan, estimated: int | None) -> list[str]:
    """What `--dry-run` prints: resolved file, component tree with checks, cost."""
    import tomli_w

    lines = ["# resolved run file", tomli_w.dumps(plan.config.table()).rstrip(), "", "# components"]
    for root in (plan.task, *plan.models.values(), *plan.datasets.values()):
        lines += _node_lines(root, 0, plan)
    lines += ["", "# cost"]
    amount = "unknown until the data is read" if estimated is None else f"at most {estimated}"
    lines.append(f"items:         {amount}")
    lines.append(f"heavy modules: {', '.join(plan.heavy_modules()) or 'none'}")
    lines += [f"{f'{what}:':<14} {value}" for what, value in plan_cost(plan, estimated).items()]
    return lines


def plan_cost(plan: Plan, estimated: int | None) -> dict[str, Any]:
    """What the evaluator says of its cost; empty for one that says nothing.

    Raises:
        ComponentError: its estimate fails.
    """
    target = plan.task.component.spec.cost
    if not target:
        return {}
    module, _, name = target.partition(":")
    try:
        return dict(getattr(importlib.import_module(module), name)(plan, estimated))
    except TenfoldError:
        raise
    except Exception as error:
        raise ComponentError(
            f"{plan.task.component.id}: the cost estimate {target} failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _node_lines(node: Node, depth: int, plan: Plan, label: str = "") -> list[str]:
    indent = "  " * depth
    lines = [f"{indent}{label or node.where}: {node.component.id}"]
    for check in plan.checks:
        if check.where == node.where:
            mark = "✓" if check.ok else "✗"
            how = {"base": " (from its base)", "adapter": " (adapter)", "": " (missing)"}
            lines.append(f"{indent}  {mark} {check.needs}{how.get(check.via, '')}")
    for child in node.children():
        lines += _node_lines(child, depth + 1, plan, child.where.rsplit(".", 1)[-1])
    return lines


def estimate_items(plan: Plan, limit: int | None) -> int | None:
    """An upper bound of the number of items from `limit` settings, or None when there is none."""
    bounds = [limit] if limit is not None else []
    for role in ("dataset", "queries"):
        node = plan.datasets.get(role)
        if node is not None and isinstance(node.params.get("limit"), int):
            bounds.append(node.params["limit"])
    return min(bounds, default=None)


def component_words(words: Sequence[str], what: str) -> tuple[str, list[str]]:
    """`core:hf checkpoint=dir` as the component name and its settings.

    Raises:
        ConfigError: a setting is not `key=value`.
    """
    name, *settings = words
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(
                f"{what} {' '.join(words)}: {setting!r} is no setting; write key=value"
            )
    return name, settings
