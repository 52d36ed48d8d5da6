"""Classes of tokens in code and prose, for asking which tokens leave early."""

from __future__ import annotations

import builtins
import keyword

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
