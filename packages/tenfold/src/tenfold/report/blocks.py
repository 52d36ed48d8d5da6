"""The building blocks of a report: plain data that a plugin may build without any HTML.

Text may come from models and data: every renderer escapes it and makes control characters
visible. Everything is bounded: what is left out of a page is said on the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from tenfold.errors import ComponentError

Cell = str | int | float | bool | None
"""A table cell; numbers are aligned right, None is shown as a dash."""

Interval = tuple[float, float]
Point = tuple[float, float] | tuple[float, float, str]
"""`(x, y)` or `(x, y, label)`."""


def _same_length(block: str, **sizes: int) -> None:
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ComponentError(f"report block {block} has {counts}; the numbers must be equal")


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 2 (section) and 3 (sub-section) appear in the table of contents."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of prose; blank lines in `text` start new paragraphs."""

    text: str


@dataclass(frozen=True, slots=True)
class Preformatted:
    """Text shown as it is, in a fixed-width face: generated code, a log, a run file."""

    text: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table; every row has as many cells as there are columns.

    Raises:
        ComponentError: a row has another length.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            _same_length(f"Table (row {number})", columns=len(self.columns), cells=len(row))


@dataclass(frozen=True, slots=True)
class TokenHeat:
    """Text whose tokens are shaded by a value: 0 is neutral, the two signs have two colors.

    `scale` is the absolute value that gets the full color (default: the largest one), so that
    several heat maps can be compared. None marks a token without a value. `positive` and
    `negative` are the legend's words for the two ends.

    Raises:
        ComponentError: `tokens` and `values` differ in length.
    """

    tokens: Sequence[str]
    values: Sequence[float | None]
    caption: str = ""
    scale: float | None = None
    positive: str = ""
    negative: str = ""

    def __post_init__(self) -> None:
        _same_length("TokenHeat", tokens=len(self.tokens), values=len(self.values))


@dataclass(frozen=True, slots=True)
class Bars:
    """Horizontal bars from zero, with an optional `(low, high)` interval each.

    Raises:
        ComponentError: the sequences differ in length.
    """

    labels: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[Interval | None] | None = None
    unit: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        sizes = {"labels": len(self.labels), "values": len(self.values)}
        if self.intervals is not None:
            sizes["intervals"] = len(self.intervals)
        _same_length("Bars", **sizes)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Vertical bars of counts (or weights) per bin label, in the mapping's order."""

    counts: Mapping[str, float]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Lines:
    """One line per named series of `(x, y)` points, drawn in the given order.

    `intervals` gives the points of a series `(low, high)` ranges of y, drawn as error bars.

    Raises:
        ComponentError: a series has another number of intervals than of points.
    """

    series: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str
    y_label: str
    caption: str = ""
    log_x: bool = False
    intervals: Mapping[str, Sequence[Interval | None]] | None = None

    def __post_init__(self) -> None:
        for name, ranges in (self.intervals or {}).items():
            points = self.series.get(name, ())
            _same_length(f"Lines (series {name!r})", points=len(points), intervals=len(ranges))


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points in the plane; a third element of a point is its label (a tooltip).

    `diagonal` adds the line y = x, for plots that compare two measurements of one thing.
    """

    points: Sequence[Point]
    x_label: str
    y_label: str
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    diagonal: bool = False


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A grid of cells shaded by a value: 0 is neutral, the two signs have two colors.

    `values[r][c]` belongs to `rows[r]` and `columns[c]`; None leaves the cell empty. `texts`
    are written into the cells where they fit, and otherwise stand in the tooltip; without them
    the values do. `scale` is the absolute value that gets the full color (default: the largest).

    Raises:
        ComponentError: the grid does not match its labels.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]] | None = None
    row_label: str = ""
    column_label: str = ""
    caption: str = ""
    scale: float | None = None

    def __post_init__(self) -> None:
        grids = [self.values] if self.texts is None else [self.values, self.texts]
        for grid in grids:
            _same_length("HeatMap", rows=len(self.rows), lines=len(grid))
            for number, line in enumerate(grid):
                _same_length(f"HeatMap (row {number})", columns=len(self.columns), cells=len(line))


@dataclass(frozen=True, slots=True)
class Columns:
    """Lists of blocks side by side (one below the other on a narrow screen)."""

    columns: Sequence[Sequence[Block]]


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks that are folded away behind a summary line."""

    summary: str
    blocks: Sequence[Block]
    open: bool = False


@dataclass(frozen=True, slots=True)
class Badges:
    """A line of small name-value labels."""

    values: Mapping[str, Cell]


Block = (
    Heading
    | Paragraph
    | Preformatted
    | Table
    | TokenHeat
    | Bars
    | Histogram
    | Lines
    | Scatter
    | HeatMap
    | Columns
    | Details
    | Badges
)
"""Anything a report is made of."""

BLOCK_TYPES: tuple[type, ...] = get_args(Block)
