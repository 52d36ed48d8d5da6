"""The report of a run: its metrics and items, and what the evaluator wants to show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from tenfold.files import write_text
from tenfold.records import Metric
from tenfold.report import (
    Block,
    Details,
    Heading,
    Preformatted,
    Table,
    render_html,
    render_markdown,
)

if TYPE_CHECKING:
    from tenfold.capabilities import Context, Evaluator
    from tenfold.store import RunStore

_ITEMS_SHOWN = 50
_CELL_CHARACTERS = 200


def write_metrics(evaluator: Evaluator, context: Context, store: RunStore) -> list[Metric]:
    """Aggregates the recorded items and writes `metrics.json`."""
    metrics = list(evaluator.aggregate(context, store.results()))
    store.write_json("metrics.json", [asdict(metric) for metric in metrics])
    return metrics


def write_report(
    evaluator: Evaluator,
    context: Context,
    store: RunStore,
    record: Mapping[str, Any],
    metrics: Sequence[Metric],
) -> None:
    """Writes `report.html` and `report.md` into the run folder.

    An evaluator without a `report` of its own gets a table of items.
    """
    report = getattr(evaluator, "report", None)
    own = () if report is None else report(context, store.results(), metrics)
    blocks: list[Block] = []
    if metrics:
        blocks += [Heading("Metrics"), metrics_table(metrics)]
    own = list(own)
    blocks += own or list(_item_blocks(store))
    blocks += list(_record_blocks(store, record))
    title = str(record.get("name", store.id))
    write_text(store.path / "report.html", render_html(title, blocks, report_facts(record)))
    write_text(store.path / "report.md", render_markdown(title, blocks))


def report_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Short facts that stand below a report's title."""
    components = record.get("components", {})
    facts: dict[str, Any] = {"run": record.get("id", "")}
    if summary := record.get("summary"):
        facts["about"] = summary
    if task := components.get("task"):
        facts["task"] = task["id"]
    for role, node in components.get("models", {}).items():
        facts[role if role == "model" else f"model {role}"] = node["id"]
    facts["seed"] = record.get("seed")
    facts["started"] = record.get("started", "")
    facts["tenfold"] = record.get("versions", {}).get("tenfold", "")
    return facts


def metrics_table(metrics: Sequence[Metric]) -> Table:
    """Metrics with their intervals and counts."""
    rows = []
    for metric in metrics:
        interval = ""
        if metric.interval is not None:
            interval = f"{metric.interval[0]:.4g} – {metric.interval[1]:.4g}"
        direction = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
        value = f"{metric.value:.4g} {metric.unit}".rstrip()
        rows.append([metric.name, metric.group, value, interval, metric.n, direction])
    return Table(["metric", "group", "value", "95 % interval", "n", "better"], rows)


def _item_blocks(store: RunStore) -> Iterator[Block]:
    lines = list(islice(store.ordered_lines(), _ITEMS_SHOWN))
    if not lines:
        return
    names = list(dict.fromkeys(name for line in lines for name in line.values))
    rows = [[line.id, *(_cell(line.values.get(name)) for name in names)] for line in lines]
    yield Heading("Items")
    yield Table(["id", *names], rows, caption=f"The first {len(lines)} items, in plan order.")


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
    return text if len(text) <= _CELL_CHARACTERS else text[: _CELL_CHARACTERS - 1] + "…"


def _record_blocks(store: RunStore, record: Mapping[str, Any]) -> Iterator[Block]:
    config = store.path / "config.toml"
    yield Heading("Record")
    if config.is_file():
        yield Details("Configuration", [Preformatted(config.read_text(encoding="utf-8"))])
    versions = record.get("versions", {})
    host = record.get("host", {})
    rows = [[name, str(value)] for name, value in {**versions, **host}.items()]
    yield Details("Versions and host", [Table(["what", "value"], rows)])
    seconds = record.get("seconds", {})
    if seconds:
        timing = [[phase, f"{value:.2f}"] for phase, value in seconds.items()]
        yield Details("Time per phase", [Table(["phase", "seconds"], timing)])
