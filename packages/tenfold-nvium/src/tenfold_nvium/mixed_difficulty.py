"""`nvium:mixed-difficulty`: texts with an easy, an impossible and a trivial part.

Each text has three parts, one character per token for byte-level tokenizers:

- *bigram*: every character follows from the one before it by a fixed table, but with probability
  `noise` it is drawn anew. With 16 letters and noise 0.1 that is 0.565 nats per character, and
  the table can be learned by a shallow model;
- *random*: a string of `period` characters drawn from 32: ln 32 = 3.466 nats each, and no model
  does better;
- *repeat*: that string again and again: 0 nats for a model that finds the earlier place. One
  layer that looks a fixed distance back is enough for a fixed period; a varying one takes two.

A model whose depth adapts to the token should therefore treat the parts differently. The metadata
`token_classes`, `[[class, begin, end], ...]` in characters, tells which part is where;
`nvium:profile` reports by these classes.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Iterator, Sequence
from itertools import islice

from tenfold.errors import ConfigError
from tenfold.records import TextRecord
from tenfold.seeds import content_hash, derive

VERSION = 1
LETTERS = string.ascii_lowercase[:16]
"""Characters of the bigram part."""
SYMBOLS = string.ascii_uppercase + string.digits[:6]
"""Characters of the random string and its repetitions."""
CLASSES = ("bigram", "random", "repeat")
_HELD_OUT = ("validation", "test")


class MixedDifficulty:
    """Text records; text i depends on `seed`, its split and i alone.

    Args:
        count: texts in `train`; `validation` and `test` have a tenth each, at least one.
        length: characters per text.
        bigram: share of a text that is its bigram part.
        noise: probability that a character of that part is drawn anew.
        min_period: shortest random string.
        max_period: longest one; equal to `min_period` the distance is always the same, which
            is easier to learn.
        split: the split that `load` reads by default.
        seed: of the table and the texts (fixed, so that a corpus is a name).
        limit: at most this many records.
        shuffle_seed: shuffle by this seed, before `limit`.

    Raises:
        ConfigError: parts that do not fit into a text.
    """

    kind = "text"

    def __init__(
        self,
        count: int = 2000,
        length: int = 96,
        bigram: float = 0.5,
        noise: float = 0.1,
        min_period: int = 12,
        max_period: int = 12,
        split: str = "train",
        seed: int = 0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if min_period > max_period:
            raise ConfigError(
                f"min_period is {min_period} and max_period {max_period}; min must not exceed max"
            )
        self.begin = round(length * bigram)
        if self.begin + 2 * max_period > length:
            raise ConfigError(
                f"a text of {length} characters with {self.begin} in its bigram part has no room "
                f"for {max_period} random ones and a repetition; raise length to at least "
                f"{math.ceil(2 * max_period / max(1e-9, 1 - bigram))}, or lower max_period"
            )
        self.count, self.length, self.noise = count, length, noise
        self.periods = (min_period, max_period)
        self.default, self.seed = split, seed
        self.limit, self.shuffle_seed = limit, shuffle_seed
        self._size(split)
        letters = list(LETTERS)
        random.Random(derive(seed, "table")).shuffle(letters)
        self.table = dict(zip(LETTERS, letters, strict=True))
        """What follows each letter when nothing is drawn anew."""

    def splits(self) -> Sequence[str]:
        """`train`, `validation` and `test`; no text is in two of them."""
        return ("train", *_HELD_OUT)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[TextRecord]:
        """Records by number, or shuffled.

        Raises:
            ConfigError: an unknown split.
        """
        name = split or self.default
        numbers = list(range(self._size(name)))
        seed = self.shuffle_seed if shuffle_seed is None else shuffle_seed
        if seed is not None:
            random.Random(derive(seed, "mixed-difficulty")).shuffle(numbers)
        limits = [n for n in (self.limit, limit) if n is not None]
        return (self._record(name, i) for i in islice(numbers, min(limits, default=None)))

    def fingerprint(self, split: str = "") -> str:
        """Hash of all settings."""
        settings = [self.count, self.length, self.begin, self.noise, self.periods, self.seed]
        selection = [split or self.default, self.limit, self.shuffle_seed]
        return content_hash(["mixed-difficulty", VERSION, settings, selection])

    def _size(self, split: str) -> int:
        if split not in self.splits():
            raise ConfigError(f"no split {split!r} (splits: {', '.join(self.splits())})")
        return self.count if split == "train" else max(1, self.count // 10)

    def _record(self, split: str, number: int) -> TextRecord:
        draw = random.Random(derive(self.seed, split, number))
        period = draw.randint(*self.periods)
        text, last = "", draw.choice(LETTERS)
        for _ in range(self.begin):
            last = draw.choice(LETTERS) if draw.random() < self.noise else self.table[last]
            text += last
        pattern = "".join(draw.choices(SYMBOLS, k=period))
        rest = self.length - self.begin
        text += (pattern * (rest // period + 1))[:rest]
        ends = (0, self.begin, self.begin + period, self.length)
        spans = [
            [name, begin, end]
            for name, (begin, end) in zip(CLASSES, itertools.pairwise(ends), strict=True)
            if begin < end
        ]
        metadata = {"period": period, "token_classes": spans}
        return TextRecord(id=f"{split}-{number:05d}", text=text, metadata=metadata)


def bigram_entropy(noise: float) -> float:
    """Nats per character of the bigram part, given the table."""
    other = noise / len(LETTERS)
    stay = 1 - noise + other
    rest = (len(LETTERS) - 1) * other * math.log(other) if other else 0.0
    return -(stay * math.log(stay)) - rest
