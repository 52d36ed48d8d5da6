"""Classes of tokens in code and prose, for asking which tokens leave early.

A dataset may bring its own: the metadata column `token_classes` holds `[[class, begin, end],
...]`, spans of a text's characters.
"""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterable, Sequence
from typing import Any

CLASSES = ("blank", "keyword", "builtin", "name", "number", "punctuation", "other")
"""In the order in which they are tried."""

_BUILTINS = frozenset(dir(builtins))


def token_class(piece: str) -> str:
    """Class of a token's text: white space alone, a Python keyword or builtin, the rest of a
    word or name, digits, punctuation, or something else (bytes, several kinds at once)."""
    text = piece.strip()
    if not text:
        return "blank"
    if keyword.iskeyword(text) or text in keyword.softkwlist:
        return "keyword"
    if text in _BUILTINS:
        return "builtin"
    if text.replace("_", "a").isalpha() or text.isidentifier():
        return "name"
    if text.isdigit():
        return "number"
    if all(not c.isalnum() and not c.isspace() and c.isprintable() for c in text):
        return "punctuation"
    return "other"


def piece_classes(pieces: Sequence[str], spans: Any = None) -> list[str]:
    """The class of every token of a text from the tokens' texts: that of the span which its
    first character lies in (`other` outside of all), or `token_class` without spans."""
    if not _are_spans(spans):
        return [token_class(piece) for piece in pieces]
    found, at = [], 0
    for piece in pieces:
        found.append(next((name for name, begin, end in spans if begin <= at < end), "other"))
        at += len(piece)
    return found


def ordered_classes(found: Iterable[str]) -> list[str]:
    """Class names in the usual order, a dataset's own behind them as they came."""
    names = list(dict.fromkeys(found))
    return [c for c in CLASSES if c in names] + [c for c in names if c not in CLASSES]


def _are_spans(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(span, list | tuple)
        and len(span) == 3
        and isinstance(span[0], str)
        and all(isinstance(end, int) for end in span[1:])
        for span in value
    )
