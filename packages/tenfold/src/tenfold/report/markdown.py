"""The Markdown twin of a report: the same content where a browser is not at hand.

Charts become tables, heat maps show their text and list their strongest tokens. Text from
models and data is escaped (or fenced), so that it can become neither markup nor HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tenfold.errors import ComponentError
from tenfold.report import blocks as b
from tenfold.report import text
from tenfold.report.scales import finite, heat_scale

MAX_ROWS = 500
MAX_POINTS = 24
STRONGEST = 10
_BAR = 24
_SPECIAL = re.compile(r"[\\`*_\[\]|~$@]|(?<=\w):(?=//)|(?<=www)\.")
_LINE_MARK = re.compile(r"^([-+#=>:])", re.MULTILINE)
_LIST_NUMBER = re.compile(r"^(\d{1,9})([.)])", re.MULTILINE)
_INDENT = re.compile(r"^[ \t]+", re.MULTILINE)


def render_markdown(title: str, blocks: Iterable[b.Block], facts: Mapping[str, Any]) -> str:
    """A Markdown document; see `tenfold.report.render_markdown`."""
    parts = [f"# {escape(text.label(title))}"]
    if facts:
        rows = [[text.label(name), text.cell(value)] for name, value in facts.items()]
        parts.append(_grid(["fact", "value"], rows))
    parts += _render_all(blocks)
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(raw: str) -> str:
    """Text that Markdown shows as it is: punctuation escaped, HTML neutralized."""
    safe = raw.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    safe = _SPECIAL.sub(lambda found: "\\" + found[0], safe)
    # At the start of a line more characters have a meaning: lists, headings, rules, code.
    safe = _INDENT.sub("", safe)
    return _LIST_NUMBER.sub(r"\1\\\2", _LINE_MARK.sub(r"\\\1", safe))


def fence(raw: str) -> str:
    """A fenced block, its fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", raw)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{raw}\n{ticks}"


def _render_all(blocks: Iterable[b.Block]) -> list[str]:
    parts = []
    for block in blocks:
        renderer = _RENDERERS.get(type(block))
        if renderer is None:
            raise ComponentError(f"a report got a {type(block).__name__}, which is no report block")
        parts.append(renderer(block))
    return parts


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], left_out: int = 0) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(escape(" ".join(cell.split())) for cell in cells) + " |"

    lines = [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]
    if left_out > 0:
        lines += ["", f"_{left_out:,} more rows not shown._"]
    return "\n".join(lines)


def _with_caption(caption: str, body: str) -> str:
    return f"**{escape(text.label(caption, 2_000))}**\n\n{body}" if caption else body


def _heading(block: b.Heading) -> str:
    return "#" * min(max(block.level, 2), 6) + " " + escape(text.label(block.text))


def _paragraph(block: b.Paragraph) -> str:
    return escape(text.clean(block.text, text.MAX_PARAGRAPH).strip())


def _preformatted(block: b.Preformatted) -> str:
    shown = fence(text.clean(block.text, text.MAX_PREFORMATTED))
    return _with_caption(block.caption, shown)


def _table(block: b.Table) -> str:
    rows = [[text.cell(value) for value in row] for row in block.rows[:MAX_ROWS]]
    columns = [text.label(name) for name in block.columns]
    return _with_caption(block.caption, _grid(columns, rows, len(block.rows) - len(rows)))


def _token_heat(block: b.TokenHeat) -> str:
    shown = fence(text.clean("".join(block.tokens), text.MAX_PREFORMATTED))
    valued = [
        (token, value)
        for token, value in zip(block.tokens, block.values, strict=True)
        if value and finite([value])
    ]
    strongest = sorted(valued, key=lambda pair: -abs(pair[1]))[:STRONGEST]
    rows = [[repr(text.label(token, 40)), text.number(value)] for token, value in strongest]
    scale = text.number(heat_scale(block.values, block.scale))
    body = f"{shown}\n\n{_grid(['strongest tokens', f'value (scale {scale})'], rows)}"
    return _with_caption(block.caption, body)


def _bar(value: float, largest: float) -> str:
    usable = finite([value])
    return "█" * round(_BAR * abs(usable[0]) / largest) if usable and largest else ""


def _bars(block: b.Bars) -> str:
    largest = max(map(abs, finite(block.values)), default=0.0)
    intervals = block.intervals or [None] * len(block.values)
    rows = []
    triples = zip(block.labels, block.values, intervals, strict=True)
    for name, value, interval in list(triples)[:MAX_ROWS]:
        bounds = _interval(interval)
        unit = f" {text.label(block.unit)}" if block.unit else ""
        rows.append([text.label(name), text.number(value) + unit, bounds, _bar(value, largest)])
    if not any(row[2] for row in rows):
        grid = _grid(["", "value", ""], [[r[0], r[1], r[3]] for r in rows])
    else:
        grid = _grid(["", "value", "interval", ""], rows)
    return _with_caption(block.caption, grid)


def _histogram(block: b.Histogram) -> str:
    return _bars(b.Bars(list(block.counts), list(block.counts.values()), caption=block.caption))


def _lines(block: b.Lines) -> str:
    rows = []
    for name, points in block.series.items():
        ranges = list((block.intervals or {}).get(name, ())) or [None] * len(points)
        for (x, y), interval in _spread(list(zip(points, ranges, strict=True))):
            row = [text.label(name), text.number(x), text.number(y)]
            rows.append(row if block.intervals is None else [*row, _interval(interval)])
    columns = ["series", text.label(block.x_label), text.label(block.y_label)]
    columns += [] if block.intervals is None else ["interval"]
    return _with_caption(block.caption, _grid(columns, rows[:MAX_ROWS], len(rows) - MAX_ROWS))


def _interval(interval: b.Interval | None) -> str:
    return ", ".join(text.number(end) for end in interval) if interval else ""


def _scatter(block: b.Scatter) -> str:
    rows = [
        [text.number(p[0]), text.number(p[1]), text.label(p[2]) if len(p) > 2 else ""]
        for p in _spread(list(block.points))
    ]
    columns = [text.label(block.x_label), text.label(block.y_label), "label"]
    return _with_caption(block.caption, _grid(columns, rows, len(block.points) - len(rows)))


def _heat_map(block: b.HeatMap) -> str:
    grid = block.texts or [[text.number(v) for v in line] for line in block.values]
    corner = " / ".join(filter(None, (block.row_label, block.column_label)))
    rows = [
        [text.label(name), *(text.label(cell) for cell in line)]
        for name, line in list(zip(block.rows, grid, strict=True))[:MAX_ROWS]
    ]
    columns = [text.label(corner), *(text.label(name) for name in block.columns)]
    return _with_caption(block.caption, _grid(columns, rows, len(block.rows) - len(rows)))


def _spread(points: list[Any]) -> list[Any]:
    """At most `MAX_POINTS`, evenly spread, first and last kept."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _columns(block: b.Columns) -> str:
    return "\n\n".join(part for column in block.columns for part in _render_all(column))


def _details(block: b.Details) -> str:
    inner = "\n\n".join(_render_all(block.blocks))
    return f"**{escape(text.label(block.summary, 400))}**\n\n{inner}"


def _badges(block: b.Badges) -> str:
    pairs = block.values.items()
    return " · ".join(
        f"{escape(text.label(name))} **{escape(text.label(text.cell(value)))}**"
        for name, value in pairs
    )


_RENDERERS: dict[type, Callable[[Any], str]] = {
    b.Heading: _heading,
    b.Paragraph: _paragraph,
    b.Preformatted: _preformatted,
    b.Table: _table,
    b.TokenHeat: _token_heat,
    b.Bars: _bars,
    b.Histogram: _histogram,
    b.Lines: _lines,
    b.Scatter: _scatter,
    b.HeatMap: _heat_map,
    b.Columns: _columns,
    b.Details: _details,
    b.Badges: _badges,
}
