"""A small canvas for inline SVG: shapes with classes (the page's CSS colors them), escaped text.

No `style` attributes: the page's content-security policy forbids them.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tenfold.report import text

CHARACTER_WIDTH = 7.2
"""Advance of a character at the charts' 12-pixel text size in the wider system fonts, pixels."""


class Canvas:
    """Collects shapes; `markup` is the finished `<svg>` element."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width = width
        self.height = height
        self._title = text.label(title)
        self._parts: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        shape = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
        self._parts.append(shape.format(css, x1, y1, x2, y2))

    def rect(self, x: float, y: float, width: float, height: float, css: str, tip: str) -> None:
        """A rectangle with a tooltip; a negative width grows to the left."""
        left, width = (x + width, -width) if width < 0 else (x, width)
        shape = Markup(
            '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2">'
            "<title>{}</title></rect>"
        )
        self._parts.append(shape.format(css, left, y, max(width, 0.5), max(height, 0.5), tip))

    def circle(self, x: float, y: float, radius: float, css: str, tip: str) -> None:
        """A dot with a tooltip."""
        shape = Markup(
            '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>'
        )
        self._parts.append(shape.format(css, x, y, radius, tip))

    def path(self, points: Sequence[tuple[float, float]], css: str, tip: str) -> None:
        """A polyline with a tooltip."""
        steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        shape = Markup('<path class="{}" d="M{}"><title>{}</title></path>')
        self._parts.append(shape.format(css, steps, tip))

    def label(self, x: float, y: float, shown: str, css: str, *, tip: str = "") -> None:
        """A line of text; the classes `end` and `middle` set its anchor."""
        shape = Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}{}</text>')
        title = Markup("<title>{}</title>").format(tip) if tip else Markup()
        self._parts.append(shape.format(css, x, y, title, shown))

    def vertical_label(self, x: float, y: float, shown: str, css: str) -> None:
        """Text turned a quarter to the left around (x, y)."""
        shape = Markup(
            '<text class="{}" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>'
        )
        self._parts.append(shape.format(css, x, y, shown))

    def markup(self) -> Markup:
        """The `<svg>` element; it scales down with the page and never up."""
        head = Markup(
            '<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" '
            'width="{:.0f}" height="{:.0f}">'
        ).format(self._title, self.width, self.height, self.width, self.height)
        return head + Markup().join(self._parts) + Markup("</svg>")
