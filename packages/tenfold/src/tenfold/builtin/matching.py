"""When a completion counts as equal to its reference: extraction, normalisation, comparison."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass

from tenfold.errors import ConfigError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
_NOT_IN_NUMBERS = str.maketrans("", "", ", _$€£%")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»…–—")


@dataclass(frozen=True, slots=True)
class Normalization:
    """What is taken out of both texts before they are compared (SQuAD's rules, each on its
    own switch)."""

    case: bool = False
    whitespace: bool = True
    punctuation: bool = False
    articles: bool = False

    def __call__(self, text: str) -> str:
        """The text as it is compared."""
        if self.case:
            text = text.casefold()
        if self.punctuation:
            text = text.translate(_PUNCTUATION)
        if self.articles:
            text = _ARTICLES.sub(" ", text)
        return " ".join(text.split()) if self.whitespace else text


@dataclass(frozen=True, slots=True)
class Extraction:
    """The part of a text that is compared: the last match's first group, or the whole match.

    Raises:
        ConfigError: the pattern is no regular expression.
    """

    pattern: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"extract is {self.pattern!r}, which is no regular expression: {error}"
            ) from None

    def __call__(self, text: str) -> str | None:
        """The part, or None without a match; the whole text when there is no pattern."""
        if not self.pattern:
            return text
        last = None
        for match in re.finditer(self.pattern, text):
            last = match
        return None if last is None else last[1 if last.re.groups else 0]


def agrees(answer: str, reference: str, compare: str) -> bool:
    """Whether two normalised texts agree: `equal`, `starts-with` and `contains` say what the
    answer does with the reference; `number` compares values (`1,000.0` is `1000`)."""
    if compare == "starts-with":
        return answer.startswith(reference)
    if compare == "contains":
        return reference in answer
    if compare == "number":
        first, second = number(answer), number(reference)
        return first is not None and second is not None and math.isclose(first, second)
    return answer == reference


def number(text: str) -> float | None:
    """The number a text is, without currency signs and thousands separators; else None."""
    try:
        value = float(text.translate(_NOT_IN_NUMBERS).rstrip("."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
