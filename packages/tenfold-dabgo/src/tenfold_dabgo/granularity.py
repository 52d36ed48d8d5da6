"""Scores at other grains than the sample: token, sentence, line, document, vocabulary id.

    s_it = l_t(z_i; theta_ascent) - l_t(z_i; theta_descent);    s_i = (1/T_i) sum_t s_it

A sample's first token has no loss, hence no score (NaN).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tenfold.errors import ConfigError

from tenfold_dabgo.corpus import TokenDataset

SPAN_ENDS = {
    "sentence": re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n\s*"),
    "line": re.compile(r"\n"),
    "paragraph": re.compile(r"\n\s*\n\s*"),
}
"""Where a sentence, line or paragraph ends: after the matched text."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a sample: token range (half-open), text, and mean score of its tokens."""

    start: int
    stop: int
    text: str
    score: float


def token_scores(
    ascent: Mapping[int, np.ndarray], descent: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Sample index → `[T]` token scores, from the token losses of both directions."""
    return {i: ascent[i].astype(np.float64) - descent[i] for i in ascent}


def spans(pieces: Sequence[str], scores: np.ndarray, unit: str = "sentence") -> list[Span]:
    """Groups tokens into sentences, lines or paragraphs by the characters they cover.

    A token belongs to the span that its first character lies in.

    Args:
        pieces: text of each token; their concatenation is the text.
        scores: `[T]` token scores, NaN where there is none.
        unit: `sentence`, `line` or `paragraph`.

    Raises:
        ConfigError: unknown unit.
    """
    if unit not in SPAN_ENDS:
        raise ConfigError(f"unit is {unit!r}; known: {', '.join(SPAN_ENDS)}")
    text = "".join(pieces)
    ends = [m.end() for m in SPAN_ENDS[unit].finditer(text) if 0 < m.end() < len(text)]
    starts = np.cumsum([0] + [len(piece) for piece in pieces])[:-1]
    owner = np.searchsorted(ends, starts, side="right")
    out = []
    for number in np.unique(owner):
        members = np.flatnonzero(owner == number)
        values = scores[members]
        known = values[np.isfinite(values)]
        first, last = int(members[0]), int(members[-1]) + 1
        score = float(known.mean()) if known.size else float("nan")
        out.append(Span(first, last, "".join(pieces[first:last]), score))
    return out


def document_tokens(
    dataset: TokenDataset, tokens: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Document index → `[n_tokens]` scores: a token in several windows gets its windows' mean."""
    totals: dict[int, np.ndarray] = {}
    counts: dict[int, np.ndarray] = {}
    for i, values in tokens.items():
        d = int(dataset.document_of[i])
        document = dataset.documents[d]
        total = totals.setdefault(d, np.zeros(document.n_tokens))
        count = counts.setdefault(d, np.zeros(document.n_tokens))
        low, high = dataset.spans[i] - document.start
        known = np.isfinite(values)
        total[low:high][known] += values[known]
        count[low:high] += known
    with np.errstate(invalid="ignore"):
        return {d: totals[d] / np.where(counts[d] > 0, counts[d], np.nan) for d in totals}


def document_scores(dataset: TokenDataset, tokens: Mapping[int, np.ndarray]) -> dict[int, float]:
    """Document index → mean score over its tokens, overlapping windows counted once."""
    per_token = document_tokens(dataset, tokens)
    return {
        d: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        for d, values in per_token.items()
    }


def vocabulary_scores(
    dataset: TokenDataset, tokens: Mapping[int, np.ndarray]
) -> list[tuple[int, float, int]]:
    """`(token id, mean score, count)` per vocabulary id, highest mean first."""
    ids = np.concatenate([dataset.ids(i) for i in tokens]) if tokens else np.zeros(0, dtype=int)
    values = np.concatenate(list(tokens.values())) if tokens else np.zeros(0)
    known = np.isfinite(values)
    unique, inverse, counts = np.unique(ids[known], return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=values[known], minlength=len(unique)) / counts
    order = np.argsort(-means, kind="stable")
    return [(int(unique[j]), float(means[j]), int(counts[j])) for j in order]
