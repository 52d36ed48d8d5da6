"""Trees as text and as SVG, with what was accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from tenfold_treeflash.tree import DraftTree

_WIDTH, _HEIGHT, _RADIUS = 92, 34, 4


def tree_text(
    tree: DraftTree, accepted: Sequence[int] = (), piece: Callable[[int], str] = str
) -> str:
    """An indented drawing; accepted nodes carry a star, numbers are path probabilities."""
    taken = set(accepted)
    lines: list[str] = []

    def draw(node: int, before: str, last: bool) -> None:
        mark = "*" if node in taken else " "
        joint = "" if node == 0 else ("└─ " if last else "├─ ")
        share = "" if node == 0 else f"  {math.exp(tree.log_probs[node]):.3f}"
        lines.append(f"{mark} {before}{joint}{piece(tree.tokens[node])!r}{share}")
        children = list(tree.children[node].values())
        below = before if node == 0 else before + ("   " if last else "│  ")
        for i, child in enumerate(children):
            draw(child, below, i + 1 == len(children))

    draw(0, "", True)
    return "\n".join(lines)


def tree_svg(
    tree: DraftTree, accepted: Sequence[int] = (), piece: Callable[[int], str] = str
) -> str:
    """A drawing from left to right, leaves one below the other; the accepted path is bold."""
    rows: dict[int, float] = {}
    next_row = 0

    def place(node: int) -> float:
        nonlocal next_row
        children = list(tree.children[node].values())
        if children:
            rows[node] = sum(place(child) for child in children) / len(children)
        else:
            rows[node] = float(next_row)
            next_row += 1
        return rows[node]

    place(0)
    taken, parts = set(accepted), []
    for node in range(len(tree)):
        x, y = 12 + tree.depths[node] * _WIDTH, 18 + rows[node] * _HEIGHT
        bold = node in taken
        if node:
            parent = tree.parents[node]
            px, py = 12 + tree.depths[parent] * _WIDTH, 18 + rows[parent] * _HEIGHT
            style = "accepted" if bold else "drafted"
            parts.append(f'<line class="{style}" x1="{px}" y1="{py}" x2="{x}" y2="{y}"/>')
        title = escape(f"{piece(tree.tokens[node])} {math.exp(tree.log_probs[node]):.3f}")
        parts.append(
            f'<circle class="{"accepted" if bold else "drafted"}" cx="{x}" cy="{y}" r="{_RADIUS}">'
            f"<title>{title}</title></circle>"
            f'<text x="{x + 7}" y="{y - 5}">{escape(_short(piece(tree.tokens[node])))}</text>'
        )
    width = 12 + (max(tree.depths) + 1) * _WIDTH
    height = 18 + max(next_row, 1) * _HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="11">'
        "<style>.drafted{stroke:#999;fill:#999}.accepted{stroke:#0a7;fill:#0a7;stroke-width:2.5}"
        "text{fill:currentColor}</style>" + "".join(parts) + "</svg>"
    )


def _short(text: str) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= 10 else f"{shown[:9]}…"
