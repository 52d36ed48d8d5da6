"""The report's charts as inline SVG: bars, histogram, lines, scatter, heat map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from tenfold.report import text
from tenfold.report.blocks import Bars, HeatMap, Histogram, Interval, Lines, Scatter
from tenfold.report.scales import Axis, finite, fit_axis, heat_level, heat_scale, tick_label
from tenfold.report.svg import CHARACTER_WIDTH, Canvas

MAX_BARS = 200
MAX_BINS = 200
MAX_SERIES = 16
MAX_LINE_POINTS = 1_000
MAX_ERROR_BARS = 60
MAX_SCATTER_POINTS = 4_000
MAX_HEAT_ROWS = 100
MAX_HEAT_COLUMNS = 120
_ROW = 24
_COLORS = 8


def bars(block: Bars, width: float) -> tuple[Markup, int]:
    """Horizontal bars; and how many bars were left out."""
    shown = min(len(block.values), MAX_BARS)
    values = [v if math.isfinite(v) else 0.0 for v in block.values[:shown]]
    intervals = list(block.intervals[:shown]) if block.intervals else [None] * shown
    reach = [*values, *itertools.chain.from_iterable(i for i in intervals if i)]
    axis = fit_axis(reach, zero=True)
    labels = [text.label(name) for name in block.labels[:shown]]
    most = int(width * 0.36 / CHARACTER_WIDTH)
    left = min(max(map(len, labels), default=0), most) * CHARACTER_WIDTH + 12
    right = 12 + CHARACTER_WIDTH * max((len(_value(v, block.unit)) for v in values), default=0)
    span = max(width - left - right, 40)
    canvas = Canvas(width, shown * _ROW + 8, block.caption or "bars")
    signed = any(v < 0 for v in values)
    zero = left + span * axis.position(0.0)
    for row, (name, value) in enumerate(zip(labels, values, strict=True)):
        y = 4 + row * _ROW
        length = span * axis.position(value) - span * axis.position(0.0)
        css = "bar" if not signed else ("bar negative" if value < 0 else "bar positive")
        original = block.values[row]
        tip = f"{name}: {_value(original, block.unit)}{_interval_text(intervals[row])}"
        canvas.label(left - 8, y + 16, text.label(name, most), "end", tip=name)
        canvas.rect(zero, y + 4, length, _ROW - 9, css, tip)
        _whisker(canvas, axis, intervals[row], left, span, y + _ROW / 2 - 0.5)
        canvas.label(left + span + 8, y + 16, _value(original, block.unit), "value")
    canvas.line(zero, 2, zero, shown * _ROW + 4, "axis")
    return canvas.markup(), len(block.values) - shown


def _value(value: float, unit: str) -> str:
    return f"{text.number(value)} {text.label(unit, 24)}".strip()


def _interval_text(interval: Interval | None) -> str:
    return f" [{text.number(interval[0])}, {text.number(interval[1])}]" if interval else ""


def _whisker(
    canvas: Canvas, axis: Axis, interval: Interval | None, left: float, span: float, y: float
) -> None:
    if interval is None or not all(map(math.isfinite, interval)):
        return
    low, high = (left + span * axis.position(end) for end in interval)
    canvas.line(low, y, high, y, "whisker")
    for end in (low, high):
        canvas.line(end, y - 4, end, y + 4, "whisker")


def histogram(block: Histogram, width: float) -> tuple[Markup, int]:
    """Vertical bars per bin; and how many bins were left out."""
    pairs = [
        (text.label(name, 40), value)
        for name, value in itertools.islice(block.counts.items(), MAX_BINS)
    ]
    vertical = fit_axis([v for _, v in pairs], zero=True)
    frame = _Frame(width, 210, fit_axis((0.0, 1.0)), vertical, foot=26)
    canvas = Canvas(width, frame.height, block.caption or "histogram")
    frame.draw_y(canvas, "")
    slot = frame.span_x / max(len(pairs), 1)
    bar = min(slot * 0.78, 56)
    longest = max((len(name) for name, _ in pairs), default=1)
    every = max(1, math.ceil((longest * CHARACTER_WIDTH + 8) / max(slot, 1)))
    base = frame.y(0.0)
    for index, (name, value) in enumerate(pairs):
        middle = frame.left + slot * (index + 0.5)
        top = frame.y(value) if math.isfinite(value) else base
        tip = f"{name}: {text.number(value)}"
        canvas.rect(middle - bar / 2, min(top, base), bar, abs(base - top), "bar", tip)
        if index % every == 0:
            canvas.label(middle, frame.bottom + 18, name, "middle")
        if len(pairs) <= 16 and slot > 36:
            canvas.label(middle, top - 6, text.number(value, 3), "middle value")
    canvas.line(frame.left, base, frame.left + frame.span_x, base, "axis")
    return canvas.markup(), len(block.counts) - len(pairs)


def lines(block: Lines, width: float) -> tuple[Markup, int]:
    """Line chart with axes and legend; and how many series were left out."""
    chosen = list(block.series.items())[:MAX_SERIES]
    series = [(text.label(name, 60), _usable(points, block.log_x)) for name, points in chosen]
    flat = [point for _, points in series for point in points]
    ranges = [_ranges(block, name) for name, _ in chosen]
    ends = [end for found in ranges for _, interval in found for end in interval]
    frame = _Frame(
        width,
        300 + _legend_height(series, width),
        fit_axis((x for x, _ in flat), log=block.log_x),
        fit_axis([*(y for _, y in flat), *ends]),
        _legend_height(series, width),
    )
    canvas = Canvas(width, frame.height, block.caption or f"{block.y_label} by {block.x_label}")
    frame.draw_x(canvas, text.label(block.x_label))
    frame.draw_y(canvas, text.label(block.y_label))
    for index, (name, points) in enumerate(series):
        color = f"s{index % _COLORS}"
        for x, (low, high) in _thinned(ranges[index], MAX_ERROR_BARS):
            _error_bar(canvas, frame.x(x), frame.y(low), frame.y(high), color)
        kept = _thinned(points, MAX_LINE_POINTS)
        places = [(frame.x(x), frame.y(y)) for x, y in kept]
        if len(places) > 1:
            dash = " dashed" if index >= _COLORS else ""
            canvas.path(places, f"line {color}{dash}", name)
        if len(places) <= 60:
            for (x, y), (px, py) in zip(kept, places, strict=True):
                tip = f"{name}: ({text.number(x)}, {text.number(y)})"
                canvas.circle(px, py, 2.8, f"dot {color}", tip)
    _draw_legend(canvas, series, width)
    return canvas.markup(), len(block.series) - len(chosen)


def _ranges(block: Lines, name: str) -> list[tuple[float, Interval]]:
    """`(x, (low, high))` of a series' error bars that can be drawn."""
    ranges = (block.intervals or {}).get(name, ())
    return [
        (x, interval)
        for (x, y), interval in zip(block.series[name], ranges, strict=False)
        if interval is not None
        and all(_plottable(x, value, block.log_x, log_y=False) for value in (y, *interval))
    ]


def _error_bar(canvas: Canvas, x: float, low: float, high: float, color: str) -> None:
    canvas.line(x, low, x, high, f"whisker {color}")
    for end in (low, high):
        canvas.line(x - 3, end, x + 3, end, f"whisker {color}")


def scatter(block: Scatter, width: float) -> tuple[Markup, int]:
    """Scatter plot; and how many points were left out (evenly, when there are too many)."""
    usable = [p for p in block.points if _plottable(p[0], p[1], block.log_x, block.log_y)]
    kept = _thinned(usable, MAX_SCATTER_POINTS)
    horizontal = fit_axis((p[0] for p in kept), log=block.log_x)
    vertical = fit_axis((p[1] for p in kept), log=block.log_y)
    frame = _Frame(width, 340, horizontal, vertical)
    canvas = Canvas(width, frame.height, block.caption or f"{block.y_label} by {block.x_label}")
    frame.draw_x(canvas, text.label(block.x_label))
    frame.draw_y(canvas, text.label(block.y_label))
    low, high = max(horizontal.low, vertical.low), min(horizontal.high, vertical.high)
    if block.diagonal and low < high:
        canvas.line(frame.x(low), frame.y(low), frame.x(high), frame.y(high), "guide")
    for point in kept:
        name = text.label(point[2], 80) + ": " if len(point) > 2 else ""
        tip = f"{name}({text.number(point[0])}, {text.number(point[1])})"
        canvas.circle(frame.x(point[0]), frame.y(point[1]), 3.2, "point s0", tip)
    return canvas.markup(), len(block.points) - len(kept)


def heat_map(block: HeatMap, width: float) -> tuple[Markup, int]:
    """A grid of shaded cells; and how many cells were left out."""
    rows = [text.label(name, 60) for name in block.rows[:MAX_HEAT_ROWS]]
    columns = [text.label(name, 40) for name in block.columns[:MAX_HEAT_COLUMNS]]
    left = min(max(map(len, rows), default=0), 24) * CHARACTER_WIDTH + 16
    left += 18 if block.row_label else 0
    size = min((width - left - 8) / max(len(columns), 1), 84)
    head = 24 + (18 if block.column_label else 0)
    canvas = Canvas(width, head + len(rows) * _ROW + 8, block.caption or "heat map")
    scale = heat_scale(finite(v for line in block.values for v in line), block.scale)
    middle = left + size * len(columns) / 2
    if block.column_label:
        canvas.label(middle, 14, text.label(block.column_label), "middle name")
    if block.row_label:
        label = text.label(block.row_label)
        canvas.vertical_label(14, head + len(rows) * _ROW / 2, label, "middle name")
    longest = max(map(len, columns), default=1)
    every = max(1, math.ceil((longest * CHARACTER_WIDTH + 6) / max(size, 1)))
    for index in range(0, len(columns), every):
        canvas.label(left + size * (index + 0.5), head - 8, columns[index], "middle tick")
    for row, name in enumerate(rows):
        y = head + row * _ROW
        canvas.label(left - 8, y + 16, text.label(name, 24), "end tick", tip=name)
        for column, where in enumerate(columns):
            value = block.values[row][column]
            shown = text.number(value, 3) if block.texts is None else block.texts[row][column]
            shown = text.label(shown, 60)
            level = heat_level(value, scale)
            shade = f"p{level}" if level > 0 else f"n{-level}" if level < 0 else "zero"
            css = "cell empty" if value is None else f"cell {shade}"
            tip = f"{name}, {where}: {shown}"
            canvas.rect(left + size * column + 1, y + 1, size - 2, _ROW - 2, css, tip)
            if len(shown) * CHARACTER_WIDTH <= size:
                canvas.label(left + size * (column + 0.5), y + 16, shown, "middle value")
    cells = len(block.rows) * len(block.columns)
    return canvas.markup(), cells - len(rows) * len(columns)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plotting area of a chart with two axes, in canvas pixels."""

    width: float
    height: float
    horizontal: Axis
    vertical: Axis
    legend: float = 0.0
    foot: float = 44.0

    @property
    def left(self) -> float:
        axis = self.vertical
        labels = [tick_label(tick, axis.ticks, log=axis.log) for tick in axis.ticks]
        return 34 + CHARACTER_WIDTH * max(map(len, labels))

    @property
    def top(self) -> float:
        return 16 + self.legend

    @property
    def bottom(self) -> float:
        return self.height - self.foot

    @property
    def span_x(self) -> float:
        return self.width - self.left - 28

    def x(self, value: float) -> float:
        return self.left + self.span_x * self.horizontal.position(value)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.vertical.position(value)

    def draw_x(self, canvas: Canvas, name: str) -> None:
        axis = self.horizontal
        canvas.line(self.left, self.bottom, self.left + self.span_x, self.bottom, "axis")
        for tick in axis.ticks:
            x = self.x(tick)
            canvas.line(x, self.bottom, x, self.bottom + 4, "axis")
            shown = tick_label(tick, axis.ticks, log=axis.log)
            canvas.label(x, self.bottom + 18, shown, "middle tick")
        canvas.label(self.left + self.span_x / 2, self.height - 6, name, "middle name")

    def draw_y(self, canvas: Canvas, name: str) -> None:
        axis = self.vertical
        for tick in axis.ticks:
            y = self.y(tick)
            canvas.line(self.left, y, self.left + self.span_x, y, "grid")
            shown = tick_label(tick, axis.ticks, log=axis.log)
            canvas.label(self.left - 8, y + 4, shown, "end tick")
        if name:
            canvas.vertical_label(14, (self.top + self.bottom) / 2, name, "middle name")


T = TypeVar("T")
Points = list[tuple[float, float]]


def _plottable(x: float, y: float, log_x: bool, log_y: bool) -> bool:
    return (
        math.isfinite(x)
        and math.isfinite(y)
        and max(abs(x), abs(y)) <= 1e300
        and (x > 0 or not log_x)
        and (y > 0 or not log_y)
    )


def _usable(points: Iterable[tuple[float, float]], log_x: bool) -> Points:
    return [(x, y) for x, y in points if _plottable(x, y, log_x, log_y=False)]


def _thinned(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly spread, first and last kept."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _legend_slots(
    series: Sequence[tuple[str, Points]], width: float
) -> list[tuple[float, float, str]]:
    """Place of each legend entry: left edge, line number, name."""
    slots: list[tuple[float, float, str]] = []
    x, row = 12.0, 0
    for name, _ in series:
        need = 34 + len(name) * CHARACTER_WIDTH
        if x > 12 and x + need > width:
            x, row = 12.0, row + 1
        slots.append((x, row, name))
        x += need
    return slots


def _legend_height(series: Sequence[tuple[str, Points]], width: float) -> float:
    slots = _legend_slots(series, width)
    return 20 * (slots[-1][1] + 1) if slots else 0.0


def _draw_legend(canvas: Canvas, series: Sequence[tuple[str, Points]], width: float) -> None:
    for index, (x, row, name) in enumerate(_legend_slots(series, width)):
        y = 12 + 20 * row
        dash = " dashed" if index >= _COLORS else ""
        canvas.line(x, y, x + 18, y, f"line s{index % _COLORS}{dash}")
        canvas.label(x + 24, y + 4, name, "tick")
