"""Reports: blocks of plain data, rendered as one HTML page, as Markdown, or as CSV.

    from tenfold.report import Heading, Table, render_html

Blocks are cheap to import; jinja2 is imported when a page is rendered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tenfold.report.blocks import (
    Badges,
    Bars,
    Block,
    Cell,
    Columns,
    Details,
    Heading,
    HeatMap,
    Histogram,
    Interval,
    Lines,
    Paragraph,
    Point,
    Preformatted,
    Scatter,
    Table,
    TokenHeat,
)

__all__ = [
    "Badges",
    "Bars",
    "Block",
    "Cell",
    "Columns",
    "Details",
    "Heading",
    "HeatMap",
    "Histogram",
    "Interval",
    "Lines",
    "Paragraph",
    "Point",
    "Preformatted",
    "Scatter",
    "Table",
    "TokenHeat",
    "render_csv",
    "render_html",
    "render_markdown",
    "render_svg",
    "table_csv",
]


def render_html(title: str, blocks: Iterable[Block], facts: Mapping[str, Any] | None = None) -> str:
    """One self-contained HTML page: inline styles and charts, a strict content-security
    policy, no request to anywhere. `facts` (name → short value) stand below the title.

    Raises:
        ComponentError: something in `blocks` is no report block.
    """
    from tenfold.report import html

    return html.render_html(title, blocks, facts or {})


def render_markdown(
    title: str, blocks: Iterable[Block], facts: Mapping[str, Any] | None = None
) -> str:
    """The same report as plain Markdown: charts become tables, heat maps list their strongest
    tokens. Text from models and data is escaped, so that it cannot become markup.

    Raises:
        ComponentError: something in `blocks` is no report block.
    """
    from tenfold.report import markdown

    return markdown.render_markdown(title, blocks, facts or {})


def render_svg(block: Block) -> str:
    """One chart (bars, histogram, lines, scatter, heat map) as an SVG file of its own.

    Raises:
        ComponentError: the block is no chart.
    """
    from tenfold.report import html

    return html.render_svg(block)


def render_csv(title: str, blocks: Iterable[Block]) -> str:
    """Every number of the report in long form, one per line: `report, section, block, caption,
    row, column, value`. For one table in its own shape use `table_csv`.

    Raises:
        ComponentError: something in `blocks` is no report block.
    """
    from tenfold.report import tabular

    return tabular.render_csv(title, blocks)


def table_csv(table: Table) -> str:
    """One table as CSV, with its columns as header."""
    from tenfold.report import tabular

    return tabular.table_csv(table)
