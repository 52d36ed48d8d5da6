"""A text on a terminal, its tokens shaded by their scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tenfold.report.scales import LEVELS, heat_level, heat_scale

_POSITIVE, _NEGATIVE = (230, 120, 20), (40, 110, 220)
"""Colors of support and opposition, as in the reports."""


def heat_styles(values: Sequence[float | None], scale: float | None = None) -> list[str]:
    """A rich style per token: background from neutral to the full color; none for no value."""
    most = heat_scale(values, scale)
    return [_style(heat_level(value, most)) for value in values]


def _style(level: int) -> str:
    if level == 0:
        return ""
    share = abs(level) / LEVELS
    color = _POSITIVE if level > 0 else _NEGATIVE
    mixed = [round(255 + share * (part - 255)) for part in color]
    ink = "black" if share < 0.75 else "white"
    return f"{ink} on rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def printable(text: str) -> str:
    """`text` without what a terminal would obey."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def show_heat(pieces: Sequence[str], values: Sequence[float | None], file: Any = None) -> None:
    """Prints a text with shaded tokens, and a legend."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    text = Text()
    for piece, style in zip(pieces, heat_styles(values), strict=True):
        text.append(printable(piece), style=style)
    console.print(text, soft_wrap=True)
    most = heat_scale(values, None)
    legend = Text()
    legend.append(" supports ", style=_style(LEVELS))
    legend.append(" opposes ", style=_style(-LEVELS))
    legend.append(f"  full color: {most:.3g} nats", style="dim")
    console.print(legend)
