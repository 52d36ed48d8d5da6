"""A text on a terminal, coloured by the exit that each token left at."""

from __future__ import annotations

import sys
from typing import Any

from tenfold_nvium.streaming import TokenStream

_COLOURS = ("green", "cyan", "blue", "magenta", "yellow", "red")
"""From shallow to deep; the last exit, which runs all layers, has the terminal's own colour."""


def exit_styles(exits: int) -> list[str]:
    """A style per exit, in order; several neighbours share one where there are many."""
    early = exits - 1
    return [*(_COLOURS[k * len(_COLOURS) // max(early, len(_COLOURS))] for k in range(early)), ""]


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters other than line breaks
    and tabs become a replacement character."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def show_coloured(stream: TokenStream, prompt: str, file: Any = None) -> None:
    """Prints the prompt, the text as it comes, and a legend with the exits' shares."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    depths = stream.lm.model.config.depths
    styles = exit_styles(len(depths))

    def write(text: str, style: str) -> None:
        console.print(Text(printable(text), style=style), end="", soft_wrap=True)

    write(prompt, "dim")
    for piece, exit_number in stream:
        write(piece, styles[exit_number - 1])
    console.print()
    parts = zip(depths, styles, stream.trace.exit_shares, strict=True)
    for k, (depth, style, share) in enumerate(parts, 1):
        write(f"  exit {k} after layer {depth}: {share:.0%}", style)
    write(f"  mean depth {stream.trace.mean_depth:.2f} ({stream.policy})\n", "dim")
