"""`dabgo:synthetic-topics`: texts from topic bigram tables, a corpus with a known origin.

The tiny reference benchmark: vocabulary 96, texts of 32 tokens, 8 topics. Topic t's table of
next-token probabilities is `0.35 shared + 0.65 own_t`, rows drawn from Dirichlet(0.05) for the
shared and Dirichlet(0.02) for the own part. As text, token i is the i-th character of printable
ASCII and the line break, so that byte-level tokenizers see one byte per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tenfold.errors import ConfigError
from tenfold.records import TextRecord
from tenfold.seeds import content_hash, derive

SHARED_WEIGHT = 0.35
SHARED_CONCENTRATION, OWN_CONCENTRATION = 0.05, 0.02
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
MAX_VOCABULARY = len(ALPHABET)
VERSION = 1


@dataclass(frozen=True)
class TopicCorpus:
    """Token ids `[n, length]` and the topic of each text `[n]`."""

    ids: np.ndarray
    topics: np.ndarray


def topic_tables(vocabulary: int, topics: int, generator: np.random.Generator) -> np.ndarray:
    """`[topics, V, V]` next-token probabilities."""
    shared = generator.dirichlet(np.full(vocabulary, SHARED_CONCENTRATION), size=vocabulary)
    own = generator.dirichlet(np.full(vocabulary, OWN_CONCENTRATION), size=(topics, vocabulary))
    return SHARED_WEIGHT * shared + (1 - SHARED_WEIGHT) * own


def topic_corpus(
    n: int, length: int = 32, vocabulary: int = 96, topics: int = 8, seed: int = 0
) -> TopicCorpus:
    """Draws `n` texts; text i has topic `i mod topics`, its first token is uniform."""
    generator = np.random.default_rng(seed)
    cumulative = topic_tables(vocabulary, topics, generator).cumsum(axis=-1)
    labels = np.arange(n) % topics
    ids = np.zeros((n, length), dtype=np.int64)
    ids[:, 0] = generator.integers(0, vocabulary, n)
    for t in range(1, length):
        rows = cumulative[labels, ids[:, t - 1]]
        drawn = generator.random(n)[:, None] * rows[:, -1:]
        ids[:, t] = (rows < drawn).sum(axis=1).clip(max=vocabulary - 1)
    return TopicCorpus(ids, labels)


class SyntheticTopics:
    """Text records of a topic corpus; `topic` is a metadata column.

    Args:
        n: number of texts.
        length: tokens (characters) per text.
        vocabulary: number of different characters, at most 96.
        topics: number of topics.
        held_out: how many of the last texts form the split `test`.
        split: the split that `load` reads by default.
        limit: at most this many records of a split.
        seed: of the tables and texts (fixed, so that a corpus is a name).

    Raises:
        ConfigError: a vocabulary or a split that cannot be.
    """

    kind = "text"

    def __init__(
        self,
        n: int = 208,
        length: int = 32,
        vocabulary: int = 96,
        topics: int = 8,
        held_out: int = 16,
        split: str = "train",
        seed: int | None = None,
        limit: int | None = None,
    ) -> None:
        if not 2 <= vocabulary <= MAX_VOCABULARY:
            raise ConfigError(f"vocabulary is {vocabulary}; it must be between 2 and 96")
        if not 0 <= held_out < n:
            raise ConfigError(f"held_out is {held_out}; it must be less than n = {n}")
        self.settings = (n, length, vocabulary, topics, seed or 0)
        self.held_out = held_out
        self.default = split
        self.limit = limit
        self._check(split)

    def splits(self) -> Sequence[str]:
        """`train` and, when texts are held out, `test`."""
        return ("train", "test") if self.held_out else ("train",)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[TextRecord]:
        """Records in order, or shuffled."""
        n, length, vocabulary, topics, seed = self.settings
        corpus = topic_corpus(n, length, vocabulary, topics, seed)
        held_out = self._check(split or self.default) == "test"
        chosen = np.arange(n - self.held_out, n) if held_out else np.arange(n - self.held_out)
        if shuffle_seed is not None:
            np.random.default_rng(derive(shuffle_seed, "topics")).shuffle(chosen)
        for i in chosen[: self.limit][:limit]:
            text = "".join(ALPHABET[t] for t in corpus.ids[i])
            topic = f"topic-{corpus.topics[i]}"
            yield TextRecord(id=f"text-{i:05d}", text=text, metadata={"topic": topic})

    def fingerprint(self, split: str = "") -> str:
        """Hash of all settings."""
        facts: list[object] = ["synthetic-topics", VERSION, *self.settings, self.held_out]
        facts.append(split or self.default)
        return content_hash(facts if self.limit is None else [*facts, self.limit])

    def _check(self, split: str) -> str:
        if split not in self.splits():
            raise ConfigError(f"split is {split!r}; known: {', '.join(self.splits())}")
        return split
