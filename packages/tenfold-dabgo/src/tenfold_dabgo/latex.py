"""One training text with its tokens shaded by score, as a LaTeX document that stands alone.

Red supports the query, blue opposes it; the shade is the token's score over the largest one
shown. A document compiles with pdfLaTeX (which prints characters that its fonts lack as their
code points), LuaLaTeX or XeLaTeX, and needs the packages xcolor and iftex only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.capabilities import Tokenizes
from tenfold.errors import ConfigError
from tenfold.files import write_text
from tenfold.lm.tokenizer import token_pieces

from tenfold_dabgo.scores import AttributionResult, sign_convention

SHADES = 15
"""Shades per direction; with white between them, about as many as the paper's figures."""
POSITIVE, NEGATIVE = (0.84, 0.19, 0.15), (0.13, 0.40, 0.67)
"""Colors of the largest score of each sign; both stay readable for color-blind readers."""
_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "^": r"\textasciicircum{}", "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "-": "-{}",
}  # fmt: skip
_LATIN_1 = 0xFF


def write_latex(
    result: AttributionResult,
    path: Path,
    sample: int | str | None = None,
    *,
    model: Tokenizes | None = None,
    view: str = "signed",
    settings: Mapping[str, Any] | None = None,
    top: int | None = None,
) -> Path:
    """Writes the highlights of one training text.

    Args:
        result: scores of one query, with token scores.
        path: the `.tex` file.
        sample: id or index; None takes the best text that has token scores.
        model: decodes the tokens.
        view: which ranking `best` refers to.
        settings: shown in the document's first comment lines.
        top: shade only the so many largest token scores.

    Raises:
        ConfigError: no model, no such sample, or it has no token scores.
    """
    if model is None:
        raise ConfigError("a LaTeX export needs the model, whose tokenizer spells the tokens")
    index = _chosen(result, sample, view)
    scores = np.asarray(result.tokens[index], dtype=float)
    pieces = token_pieces(model, result.dataset.ids(index).tolist())
    name, total = result.dataset.sample_ids[index], result.values[index]
    facts = {"query": result.query_id, "sample": name, "method": result.method}
    facts |= {"unit": result.unit, "sign": sign_convention(result.method), "score": f"{total:+.6g}"}
    facts |= {"settings": json.dumps(dict(settings or {}), default=str)}
    caption = f"Training text {name} for query {result.query_id}: {total:+.4g} {result.unit}"
    write_text(path, document(pieces, scores, caption, facts, top))
    return path


def _chosen(result: AttributionResult, sample: int | str | None, view: str) -> int:
    if sample is None:
        ranked = result.topk(len(result.dataset), "proponents", view)
        sample = next((row.index for row in ranked if row.index in result.tokens), None)
        if sample is None:
            raise ConfigError(
                "no training text has token scores: there is nothing to highlight",
                hint="they are kept for the top_k texts of method dabgo",
            )
    if isinstance(sample, str):
        if sample not in result.dataset.sample_ids:
            raise ConfigError(f"there is no training text {sample!r}")
        sample = result.dataset.sample_ids.index(sample)
    if sample not in result.tokens:
        raise ConfigError(
            f"training text {result.dataset.sample_ids[sample]!r} has no token scores",
            hint="they are kept for the top_k texts of method dabgo; raise top_k",
        )
    return sample


def document(
    pieces: Sequence[str],
    scores: np.ndarray,
    caption: str,
    facts: Mapping[str, Any],
    top: int | None = None,
) -> str:
    """The LaTeX source: `pieces` shaded by `scores [T]` (NaN: unshaded)."""
    levels = shade_levels(scores, top)
    body = "".join(_token(piece, level) for piece, level in zip(pieces, levels, strict=True))
    comments = "".join(f"% {key}: {_comment(value)}\n" for key, value in facts.items())
    colors = "".join(
        f"\\definecolor{{{name}{level}}}{{rgb}}{{{_mixed(color, level / SHADES)}}}\n"
        for name, color in (("pro", POSITIVE), ("opp", NEGATIVE))
        for level in range(1, SHADES + 1)
    )
    used = sorted({c for c in "".join(pieces) + caption if ord(c) > _LATIN_1})
    unknown = "".join(
        f"\\DeclareUnicodeCharacter{{{ord(c):04X}}}{{\\texttt{{[U+{ord(c):04X}]}}}}\n" for c in used
    )
    return (
        f"{comments}\\documentclass{{article}}\n\\usepackage{{iftex}}\n"
        f"\\ifPDFTeX\n\\usepackage[T1]{{fontenc}}\n\\usepackage[utf8]{{inputenc}}\n"
        f"\\usepackage{{textcomp}}\n{unknown}\\else\n\\usepackage{{fontspec}}\n\\fi\n"
        f"\\usepackage{{xcolor}}\n\\setlength{{\\fboxsep}}{{0.5pt}}\n{colors}"
        "\\newcommand{\\shaded}[2]{\\colorbox{#1}{\\strut #2}\\hspace{0pt}}\n"
        "\\pagestyle{empty}\n\\begin{document}\n\\raggedright\\ttfamily\\noindent\n"
        f"{body}\n\n\\bigskip\\noindent\\rmfamily\n{escaped(caption)}. "
        f"\\shaded{{pro{SHADES}}}{{supports}} \\shaded{{opp{SHADES}}}{{opposes}} the query.\n"
        "\\end{document}\n"
    )


def shade_levels(scores: np.ndarray, top: int | None = None) -> list[int]:
    """`[T]` shades from `-SHADES` (opposes most) over 0 (white) to `SHADES`."""
    values = np.nan_to_num(np.asarray(scores, dtype=float))
    if top is not None:
        rest = np.argsort(-np.abs(values), kind="stable")[top:]
        values = values.copy()
        values[rest] = 0.0
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return [0] * len(values)
    return np.round(values / largest * SHADES).astype(int).tolist()


def _token(piece: str, level: int) -> str:
    """One token; line ends stay outside its box, and spaces at its edges are visible."""
    lines = piece.split("\n")
    shown = [_box(line, level) if line else "" for line in lines]
    return "\\par\\noindent\n".join(shown)


def _box(text: str, level: int) -> str:
    inner = escaped(text)
    if level == 0:
        return f"{inner}\\hspace{{0pt}}"
    return f"\\shaded{{{'pro' if level > 0 else 'opp'}{abs(level)}}}{{{inner}}}"


def escaped(text: str) -> str:
    """Text as LaTeX shows it literally; spaces keep their width, control characters go."""
    out = []
    for c in text:
        if c == "\t":
            out.append("~~~~")
        elif c.isspace():
            out.append("~")
        elif c.isprintable():
            out.append(_ESCAPES.get(c, c))
    return "".join(out)


def _comment(value: Any) -> str:
    """One line for a comment, whatever the value holds."""
    return " ".join(str(value).split())


def _mixed(color: tuple[float, float, float], amount: float) -> str:
    """The color over white, as `r,g,b`."""
    return ",".join(f"{1 - amount * (1 - c):.3f}" for c in color)
