"""Comparing and exporting run records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError
from tenfold.files import replacing, write_text
from tenfold.report import Bars, Block, Heading, Table, render_csv, render_html, render_markdown
from tenfold.store import RunStore

_EXAMPLES = 5


def compare_runs(first: RunStore, second: RunStore) -> dict[str, Any]:
    """What differs between two runs, JSON-able: configuration, versions, metrics, items.

    Items are matched by id; their values must be equal, their times need not be.
    """
    a, b = first.read_json("run.json"), second.read_json("run.json")
    items_a = {line.id: line.values for line in first.ordered_lines()}
    items_b = {line.id: line.values for line in second.ordered_lines()}
    changed = [i for i in items_a if i in items_b and items_a[i] != items_b[i]]
    return {
        "runs": [first.id, second.id],
        "config": differences(_comparable(a), _comparable(b)),
        "versions": differences(a.get("versions", {}), b.get("versions", {})),
        "metrics": differences(_metrics(first), _metrics(second)),
        "items": {
            "equal": sum(1 for i in items_a if i in items_b) - len(changed),
            "changed": changed,
            "only_first": [i for i in items_a if i not in items_b],
            "only_second": [i for i in items_b if i not in items_a],
        },
    }


def differences(a: Any, b: Any, path: str = "") -> dict[str, list[Any]]:
    """Dotted path → [value in a, value in b] for every leaf that differs."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, list[Any]] = {}
        for key in dict.fromkeys((*a, *b)):
            found |= differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if a == b else {path: [a, b]}


def difference_lines(difference: Mapping[str, Any]) -> list[str]:
    """A comparison for the terminal."""
    lines = []
    for part in ("config", "versions", "metrics"):
        for path, (a, b) in difference[part].items():
            lines.append(f"{part}: {path}: {_short(a)} → {_short(b)}")
    items = difference["items"]
    unequal = [*items["changed"], *items["only_first"], *items["only_second"]]
    if not unequal and not difference["metrics"]:
        lines.append(f"identical: {items['equal']} items and all metrics")
        return lines
    lines.append(f"items: {items['equal']} equal, {len(items['changed'])} changed")
    for key, label in (("only_first", "only in the first"), ("only_second", "only in the second")):
        if items[key]:
            lines.append(f"items: {len(items[key])} {label}")
    if unequal:
        lines.append(f"items: for example {', '.join(unequal[:_EXAMPLES])}")
    return lines


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"seed": record.get("seed"), "components": record.get("components", {})}


def _metrics(store: RunStore) -> dict[str, float]:
    path = store.path / "metrics.json"
    if not path.is_file():
        return {}
    rows = store.read_json("metrics.json")
    return {
        f"{row['name']}[{row['group']}]" if row["group"] else row["name"]: row["value"]
        for row in rows
    }


def export_items(store: RunStore, output: Path) -> int:
    """Writes items in plan order as `.jsonl` or `.csv`; returns how many.

    Raises:
        ConfigError: the file's ending is neither.
    """
    if output.suffix == ".jsonl":
        return _export_jsonl(store, output)
    if output.suffix == ".csv":
        return _export_csv(store, output)
    raise ConfigError(f"{output}: the file must end in .jsonl or .csv")


def _export_jsonl(store: RunStore, output: Path) -> int:
    count = 0
    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in store.ordered_lines():
            file.write(json.dumps({"id": line.id, **line.values}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _export_csv(store: RunStore, output: Path) -> int:
    columns = dict.fromkeys(name for line in store.ordered_lines() for name in line.values)
    count = 0
    with (
        replacing(output) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["id", *columns])
        for line in store.ordered_lines():
            writer.writerow([line.id, *(_csv_cell(line.values.get(name)) for name in columns)])
            count += 1
    return count


def _csv_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def comparison_blocks(stores: Sequence[RunStore]) -> Iterator[Block]:
    """Report blocks that put runs side by side: a table of metrics and a bar chart for each."""
    metrics = {store.id: _metrics(store) for store in stores}
    labels = {store.id: f"{store.path.parent.name} {store.id[-6:]}" for store in stores}
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    yield Heading("Metrics")
    rows = [[labels[i], *(metrics[i].get(name) for name in names)] for i in metrics]
    yield Table(["run", *names], rows)
    for name in names:
        having = [i for i in metrics if name in metrics[i]]
        if len(having) > 1:
            yield Bars(
                [labels[i] for i in having], [metrics[i][name] for i in having], caption=name
            )
    yield Heading("Configuration")
    first = stores[0].read_json("run.json")
    changed: dict[str, None] = {}
    flat = []
    for store in stores:
        other = differences(_comparable(first), _comparable(store.read_json("run.json")))
        changed |= dict.fromkeys(other)
        flat.append(other)
    table = []
    for path in changed:
        base = next(d[path][0] for d in flat if path in d)
        table.append([path, *(_short(d[path][1] if path in d else base) for d in flat)])
    yield Table(["what differs", *labels.values()], table)


def write_blocks(path: Path, title: str, blocks: Iterator[Block]) -> None:
    """Writes blocks in the form that the file's ending names: .html, .md or .csv.

    Raises:
        ConfigError: another ending.
    """
    writers = {
        ".html": lambda: render_html(title, blocks, {}),
        ".md": lambda: render_markdown(title, blocks),
        ".csv": lambda: render_csv(title, blocks),
    }
    if path.suffix not in writers:
        raise ConfigError(f"{path}: the file must end in .html, .md or .csv")
    write_text(path, writers[path.suffix]())
