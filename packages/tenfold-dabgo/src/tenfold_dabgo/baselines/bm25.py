"""BM25: which training texts share rare words with the query.

The Okapi formula of the published baseline, term by term:

    score(q, d) = sum_{w in q} idf(w) * tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(w)      = ln((N - df + 0.5) / (df + 0.5)), negative values replaced by 0.25 * mean idf

Words times documents are computed once and stored sparsely by word, so a query is a sum of a
few short rows. (`variant="lucene"` takes idf = ln(1 + (N - df + 0.5) / (df + 0.5)), which is
never negative.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tenfold.capabilities import Tokenizes
from tenfold.errors import ConfigError

from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult

VARIANTS = ("okapi", "lucene")
NEGATIVE_IDF_SHARE = 0.25
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return WORD.findall(text.lower())


class Bm25Index:
    """Scores of words by document, `k1` = 1.5 and `b` = 0.75 as published.

    Args:
        documents: words of each document.
        k1: saturation of repeated words.
        b: how much long documents are discounted.
        variant: `okapi` or `lucene`.

    Raises:
        ConfigError: no documents, or an unknown variant.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[str]],
        k1: float = 1.5,
        b: float = 0.75,
        variant: str = "okapi",
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigError(f"BM25 variant is {variant!r}; known: {', '.join(VARIANTS)}")
        if not documents:
            raise ConfigError("BM25 needs at least one document")
        self.size = len(documents)
        lengths = np.array([len(d) for d in documents], dtype=np.float64)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-12))
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for number, document in enumerate(documents):
            for word, count in Counter(document).items():
                rows, counts = postings.setdefault(word, ([], []))
                rows.append(number)
                counts.append(count)
        idf = self._idf({w: len(rows) for w, (rows, _) in postings.items()}, variant)
        self.rows = {w: np.array(rows) for w, (rows, _) in postings.items()}
        self.values = {
            w: idf[w] * np.array(counts) * (k1 + 1) / (np.array(counts) + norm[self.rows[w]])
            for w, (_, counts) in postings.items()
        }

    def _idf(self, frequency: dict[str, int], variant: str) -> dict[str, float]:
        df = np.array(list(frequency.values()), dtype=np.float64)
        odds = (self.size - df + 0.5) / (df + 0.5)
        if variant == "lucene":
            values = np.log1p(odds)
        else:
            values = np.log(odds)
            floor = NEGATIVE_IDF_SHARE * (values.mean() if values.size else 0.0)
            values = np.where(values < 0, floor, values)
        return dict(zip(frequency, values.tolist(), strict=True))

    def scores(self, query: Iterable[str]) -> np.ndarray:
        """`[N]` scores; a word that the query repeats counts as often."""
        out = np.zeros(self.size)
        for word, count in Counter(query).items():
            if word in self.rows:
                out[self.rows[word]] += count * self.values[word]
        return out


@dataclass
class Bm25Attributor:
    """BM25 of the query's completion against each sample's text.

    Attributes:
        model: its tokenizer turns ids into text.
        dataset: the corpus.
        split: text → words.
        variant: see `Bm25Index`.
    """

    model: Tokenizes
    dataset: TokenDataset
    split: Callable[[str], list[str]] = words
    variant: str = "okapi"
    _index: Bm25Index | None = field(default=None, init=False, repr=False)

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query; samples without a word score 0."""
        if self._index is None:
            texts = (self._text(self.dataset.ids(i)) for i in range(len(self.dataset)))
            self._index = Bm25Index([self.split(t) for t in texts], variant=self.variant)
        for query in queries:
            low, high = query.span or (0, len(query.completion_ids))
            text = self._text(np.asarray(query.completion_ids[low:high]))
            scores = self._index.scores(self.split(text))
            yield AttributionResult(query.id, "bm25", self.dataset, scores, unit="BM25")

    def _text(self, ids: np.ndarray) -> str:
        return self.model.decode([int(i) for i in ids])
