"""Text and numbers as a report shows them: cleaned, cut to a limit, never misleading."""

from __future__ import annotations

import math
import re

MAX_LABEL = 200
MAX_CELL = 2_000
MAX_PARAGRAPH = 20_000
MAX_PREFORMATTED = 100_000

_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys((0xFFFE, 0xFFFF), 0xFFFD),
    # Characters that reorder what a reader sees are shown by their code, not obeyed.
    **{
        code: f"⟦U+{code:04X}⟧"
        for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
    0x2028: "⟦U+2028⟧",
    0x2029: "⟦U+2029⟧",
}
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: object, limit: int) -> str:
    """`text` with control and direction characters made visible, cut after `limit` characters.

    Tabs and line feeds stay, `\\r\\n` becomes `\\n`, lone surrogates become U+FFFD; a cut text
    ends with a note of how many characters are missing.
    """
    raw = str(text)
    left_out = len(raw) - limit
    if left_out > 0:
        raw = raw[:limit]
    shown = _SURROGATES.sub("\ufffd", raw.replace("\r\n", "\n")).translate(_VISIBLE)
    return f"{shown} … [{left_out:,} more characters]" if left_out > 0 else shown


def label(text: object, limit: int = MAX_LABEL) -> str:
    """A one-line text: cleaned, white space collapsed, shortened with an ellipsis."""
    line = " ".join(clean(str(text)[: 4 * limit], 4 * limit).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, thousands separated, `–` for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.{digits}e}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    magnitude = abs(value)
    if value and not 1e-4 <= magnitude < 1e9:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(magnitude))) if value else 0
    shown = f"{value:,.{decimals}f}"
    shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def cell(value: object) -> str:
    """A table cell's text."""
    if value is None or isinstance(value, bool | int | float):
        return number(value)
    return clean(value, MAX_CELL)


def is_number(value: object) -> bool:
    """Whether a cell counts as a number (booleans do not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
