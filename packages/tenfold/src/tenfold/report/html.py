"""One self-contained HTML page from blocks: strict content-security policy, nothing loaded.

Every text goes through `tenfold.report.text.clean` and autoescaping. Styles are classes only
(an inline `style` would need a weaker policy), charts are inline SVG, and the one script
(marking the current section in the table of contents) is allowed by its hash; the page is
complete without it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tenfold.errors import ComponentError
from tenfold.report import blocks as b
from tenfold.report import charts, text
from tenfold.report.scales import LEVELS, heat_level, heat_scale

MAX_TOKENS = 6_000
MAX_ROWS = 1_000
MAX_COLUMNS = 60
MAX_BLOCKS = 4_000
MAX_DEPTH = 12
MAX_PAGE_CHARACTERS = 24_000_000
_CONTENT_WIDTH = 800.0
_NARROWEST = 300.0


@dataclass(slots=True)
class _Page:
    """What grows while a page is rendered: the table of contents, and how much is written."""

    contents: list[tuple[int, str, str]] = field(default_factory=list)
    characters: int = 0
    blocks: int = 0

    @property
    def full(self) -> bool:
        return self.characters > MAX_PAGE_CHARACTERS or self.blocks >= MAX_BLOCKS


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block stands: the page, how deep it is nested, and its width in pixels."""

    page: _Page
    width: float = _CONTENT_WIDTH
    depth: int = 0


def render_html(title: str, blocks: Iterable[b.Block], facts: Mapping[str, Any]) -> str:
    """A complete HTML page.

    Args:
        title: shown as the page's heading and window title.
        blocks: the content, in order.
        facts: what the reader should know about the run (name → short value), shown below
            the title.

    Raises:
        ComponentError: something in `blocks` is no report block.
    """
    page = _Page()
    body = _render_all(blocks, _Place(page))
    style, script = _asset("page.css") + heat_css(), _asset("page.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=text.label(title),
            body=body,
            contents=page.contents,
            facts=[(text.label(name), text.cell(value)) for name, value in facts.items()],
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
        )
    )


def render_svg(block: b.Block, width: float = _CONTENT_WIDTH) -> str:
    """One chart as an SVG file of its own, with the page's colors.

    Raises:
        ComponentError: the block is no chart.
    """
    draw = _DRAWERS.get(type(block))
    if draw is None:
        known = ", ".join(kind.__name__ for kind in _DRAWERS)
        raise ComponentError(f"a {type(block).__name__} cannot be drawn as SVG (charts: {known})")
    svg, left_out = draw(block, width)
    note = f"<!-- {left_out:,} more not drawn -->" if left_out else ""
    style = f"<style>{_asset('page.css')}{heat_css()}</style>"
    head, end, rest = str(svg).partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}{end}{style}{note}{rest}\n"


def heat_css() -> str:
    """CSS classes of the diverging scale: `p1..` (positive, orange), `n1..` (negative, blue).

    The two hues stay apart for all common kinds of color blindness; opacity grows linearly, so
    the same classes serve a light and a dark page.
    """
    shade = "background:rgb(var(--{0}) / {1:.3f});fill:rgb(var(--{0}) / {1:.3f})"
    rules = [
        f".{sign}{level}{{{shade.format(name, 0.8 * level / LEVELS)}}}"
        for sign, name in (("p", "positive"), ("n", "negative"))
        for level in range(1, LEVELS + 1)
    ]
    return "\n".join(rules) + "\n"


def _policy(style: str, script: str) -> str:
    def digest(content: str) -> str:
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'"
    )


@cache
def _asset(name: str) -> str:
    return (files("tenfold.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tenfold.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _macro(name: str, **values: Any) -> Markup:
    module = _environment().get_template("blocks.html").module
    return Markup(getattr(module, name)(**values))


def _render_all(blocks: Iterable[b.Block], place: _Place) -> Markup:
    return Markup("\n").join(_pieces(blocks, place))


def _pieces(blocks: Iterable[b.Block], place: _Place) -> Iterator[Markup]:
    for block in blocks:
        if place.page.full or place.depth > MAX_DEPTH:
            yield _macro("note", text="The page is full: the rest is not shown.")
            return
        renderer = _RENDERERS.get(type(block))
        if renderer is None:
            known = ", ".join(kind.__name__ for kind in b.BLOCK_TYPES)
            raise ComponentError(
                f"a report got a {type(block).__name__}, which is no report block",
                hint=f"blocks of tenfold.report: {known}",
            )
        place.page.blocks += 1
        piece = renderer(block, place)
        place.page.characters += len(piece) if place.depth == 0 else 0
        yield piece


def _heading(block: b.Heading, place: _Place) -> Markup:
    level = min(max(block.level, 2), 4)
    shown = text.label(block.text)
    slug = re.sub(r"[^a-z0-9]+", "-", shown.lower()).strip("-")[:40]
    anchor = f"{slug or 'section'}-{place.page.blocks}"
    if level <= 3 and place.depth == 0:
        place.page.contents.append((level, anchor, shown))
    return _macro("heading", level=level, anchor=anchor, text=shown)


def _paragraph(block: b.Paragraph, place: _Place) -> Markup:
    shown = text.clean(block.text, text.MAX_PARAGRAPH)
    return _macro("paragraphs", parts=[part for part in re.split(r"\n\s*\n", shown) if part])


def _preformatted(block: b.Preformatted, place: _Place) -> Markup:
    shown = text.clean(block.text, text.MAX_PREFORMATTED)
    return _macro("preformatted", text=shown, caption=_caption(block.caption))


def _table(block: b.Table, place: _Place) -> Markup:
    rows = [list(row)[:MAX_COLUMNS] for row in block.rows[:MAX_ROWS]]
    columns = [text.label(name) for name in block.columns[:MAX_COLUMNS]]
    numeric = [_all_numbers(row[index] for row in rows) for index in range(len(columns))]
    left_out = [
        f"{count:,} more {what}"
        for count, what in (
            (len(block.rows) - len(rows), "rows"),
            (len(block.columns) - len(columns), "columns"),
        )
        if count > 0
    ]
    cells = [[text.cell(value) for value in row] for row in rows]
    return _macro(
        "table",
        columns=columns,
        rows=cells,
        numeric=numeric,
        caption=_caption(block.caption),
        left_out=" and ".join(left_out),
    )


def _all_numbers(column: Iterable[b.Cell]) -> bool:
    present = [value for value in column if value is not None]
    return bool(present) and all(map(text.is_number, present))


def _token_heat(block: b.TokenHeat, place: _Place) -> Markup:
    scale = heat_scale(block.values, block.scale)
    tokens = []
    for token, value in zip(block.tokens[:MAX_TOKENS], block.values[:MAX_TOKENS], strict=True):
        level = heat_level(value, scale)
        shade = f"p{level}" if level > 0 else f"n{-level}" if level < 0 else ""
        tip = "no value" if value is None else _signed(value)
        # A line feed gets a visible mark, else its shade could not be seen.
        parts = map(escape, text.clean(token, text.MAX_CELL).split("\n"))
        tokens.append((Markup("<i>↵</i>\n").join(parts), shade, tip))
    signs = {value > 0 for value in block.values if value}
    return _macro(
        "token_heat",
        tokens=tokens,
        caption=_caption(block.caption),
        scale=text.number(scale, 3),
        steps=range(LEVELS, 0, -1),
        both=False in signs,
        positive=text.label(block.positive, 60),
        negative=text.label(block.negative, 60),
        left_out=max(0, len(block.tokens) - MAX_TOKENS),
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + text.number(float(value), 5)


def _chart(draw: Callable[[Any, float], tuple[Markup, int]], what: str) -> Callable[..., Markup]:
    def render(block: Any, place: _Place) -> Markup:
        svg, left_out = draw(block, place.width)
        return _macro(
            "chart", svg=svg, caption=_caption(block.caption), left_out=left_out, what=what
        )

    return render


def _columns(block: b.Columns, place: _Place) -> Markup:
    count = max(len(block.columns), 1)
    width = max(_NARROWEST, (place.width - 28 * (count - 1)) / count)
    inner = replace(place, width=width, depth=place.depth + 1)
    return _macro(
        "columns", count=min(count, 4), parts=[_render_all(c, inner) for c in block.columns]
    )


def _details(block: b.Details, place: _Place) -> Markup:
    inner = replace(place, width=place.width - 36, depth=place.depth + 1)
    body = _render_all(block.blocks, inner)
    return _macro("details", summary=text.label(block.summary, 400), body=body, open=block.open)


def _badges(block: b.Badges, place: _Place) -> Markup:
    pairs = [(text.label(name), text.cell(value)) for name, value in block.values.items()]
    return _macro("badges", pairs=pairs)


def _caption(caption: str) -> str:
    return text.clean(caption, text.MAX_CELL)


_DRAWERS: dict[type, Callable[[Any, float], tuple[Markup, int]]] = {
    b.Bars: charts.bars,
    b.Histogram: charts.histogram,
    b.Lines: charts.lines,
    b.Scatter: charts.scatter,
    b.HeatMap: charts.heat_map,
}

_RENDERERS: dict[type, Callable[[Any, _Place], Markup]] = {
    b.Heading: _heading,
    b.Paragraph: _paragraph,
    b.Preformatted: _preformatted,
    b.Table: _table,
    b.TokenHeat: _token_heat,
    b.Bars: _chart(charts.bars, "bars"),
    b.Histogram: _chart(charts.histogram, "bins"),
    b.Lines: _chart(charts.lines, "series"),
    b.Scatter: _chart(charts.scatter, "points"),
    b.HeatMap: _chart(charts.heat_map, "cells"),
    b.Columns: _columns,
    b.Details: _details,
    b.Badges: _badges,
}
