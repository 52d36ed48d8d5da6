"""Reports as CSV: every number in long form, or one table in its own shape."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

from tenfold.errors import ComponentError
from tenfold.report import blocks as b
from tenfold.report import text

HEADER = ("report", "section", "block", "caption", "row", "column", "value")
_FORMULA = re.compile(r"^[=+\-@\t\r]")
_NUMBER = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
_Row = tuple[str, str, object]
"""Row label, column label, value."""


def render_csv(title: str, blocks: Iterable[b.Block]) -> str:
    """All numbers in long form; see `tenfold.report.render_csv`."""
    lines: list[list[object]] = []
    section = ""
    for block in _flat(blocks):
        if isinstance(block, b.Heading):
            section = block.text
            continue
        name, caption = type(block).__name__.lower(), getattr(block, "caption", "")
        for row, column, value in _rows(block):
            lines.append([title, section, name, caption, row, column, value])
    return _write(HEADER, lines)


def table_csv(table: b.Table) -> str:
    """One table, its columns as header; numbers in full precision."""
    return _write(table.columns, table.rows)


def _write(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_field(name) for name in header])
    writer.writerows([_field(value) for value in row] for row in rows)
    return buffer.getvalue()


def _field(value: object) -> object:
    """A CSV field; text that a spreadsheet would run as a formula is quoted with `'`."""
    if value is None or isinstance(value, bool | int | float):
        return "" if value is None else value
    shown = text.clean(value, text.MAX_CELL)
    if _FORMULA.match(shown) and not _NUMBER.match(shown):
        return "'" + shown
    return shown


def _flat(blocks: Iterable[b.Block]) -> Iterator[b.Block]:
    for block in blocks:
        if isinstance(block, b.Columns):
            for column in block.columns:
                yield from _flat(column)
        elif isinstance(block, b.Details):
            yield from _flat(block.blocks)
        elif isinstance(block, b.BLOCK_TYPES):
            yield block
        else:
            raise ComponentError(f"a report got a {type(block).__name__}, which is no report block")


def _rows(block: Any) -> Iterator[_Row]:
    match block:
        case b.Table(columns=columns, rows=rows):
            for index, row in enumerate(rows):
                yield from ((str(index), name, v) for name, v in zip(columns, row, strict=True))
        case b.TokenHeat(tokens=tokens, values=values):
            for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
                yield str(index), token, value
        case b.Bars(labels=labels, values=values, intervals=intervals):
            for index, (name, value) in enumerate(zip(labels, values, strict=True)):
                yield name, "value", value
                if intervals and (interval := intervals[index]):
                    yield name, "low", interval[0]
                    yield name, "high", interval[1]
        case b.Histogram(counts=counts):
            yield from ((name, "count", value) for name, value in counts.items())
        case b.Lines(series=series, intervals=intervals):
            for name, points in series.items():
                yield from ((name, str(x), y) for x, y in points)
                ranges = (intervals or {}).get(name, ())
                for (x, _), interval in zip(points, ranges, strict=False):
                    if interval is not None:
                        yield name, f"{x} low", interval[0]
                        yield name, f"{x} high", interval[1]
        case b.Scatter(points=points):
            for index, point in enumerate(points):
                row = point[2] if len(point) > 2 else str(index)
                yield row, "x", point[0]
                yield row, "y", point[1]
        case b.HeatMap(rows=names, columns=columns, values=values):
            for name, line in zip(names, values, strict=True):
                yield from ((name, where, v) for where, v in zip(columns, line, strict=True))
        case b.Badges(values=values):
            yield from (("", name, value) for name, value in values.items())
