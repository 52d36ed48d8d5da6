"""`dabgo:mixed`: two text datasets as one, with a column that says where each text is from.

Planted foreign texts are the mixed-dataset test: a model trained on the mixture is asked for
the sources of foreign text, and all foreign texts should come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from tenfold.capabilities import Dataset
from tenfold.errors import ConfigError
from tenfold.records import TextRecord
from tenfold.seeds import content_hash, derive

PARTS = ("own", "foreign")
VERSION = 1


class Mixed:
    """Text records of `own`, then of `foreign`; ids begin with the part's name.

    Args:
        own: the corpus.
        foreign: texts of another kind.
        planted: how many foreign texts, from the beginning; None for all.
        column: metadata column that holds `own` or `foreign`.
        part: `all`, or only one part (for queries).
        split: split of both datasets; empty for their first.

    Raises:
        ConfigError: an unknown part, or a dataset without such a split.
    """

    kind = "text"

    def __init__(
        self,
        own: Dataset,
        foreign: Dataset,
        planted: int | None = None,
        column: str = "source",
        part: str = "all",
        split: str = "",
    ) -> None:
        if part not in ("all", *PARTS):
            raise ConfigError(f"part is {part!r}; known: all, {', '.join(PARTS)}")
        self.parts = {"own": own, "foreign": foreign}
        self.planted = planted
        self.column = column
        self.chosen = PARTS if part == "all" else (part,)
        self.split = split
        for name in self.chosen:
            if split and split not in self.parts[name].splits():
                raise ConfigError(
                    f"split is {split!r}; {name} has: {', '.join(self.parts[name].splits())}"
                )

    def splits(self) -> Sequence[str]:
        """One split, `all`: which split of the two is read is a parameter."""
        return ("all",)

    def load(
        self, split: str = "", limit: int | None = None, shuffle_seed: int | None = None
    ) -> Iterator[TextRecord]:
        """Records of the parts, in order or shuffled.

        Raises:
            ConfigError: no such split, or a record that is no text.
        """
        if split not in ("", "all"):
            raise ConfigError(f"no split {split!r} (splits: all)")
        records = self._records()
        if shuffle_seed is not None:
            held = list(records)
            np.random.default_rng(derive(shuffle_seed, "mixed")).shuffle(held)
            records = iter(held)
        return islice(records, limit)

    def _records(self) -> Iterator[TextRecord]:
        for name in self.chosen:
            rows = self.parts[name].load(self.split)
            for record in islice(rows, self.planted if name == "foreign" else None):
                if not isinstance(record, TextRecord):
                    raise ConfigError(
                        f"{name} holds {record.kind} records; dabgo:mixed mixes text records"
                    )
                metadata = {**record.metadata, self.column: name}
                yield replace(record, id=f"{name}/{record.id}", metadata=metadata)

    def fingerprint(self, split: str = "") -> str:
        """Hash of both datasets' own fingerprints and of what selects from them."""
        prints = [self.parts[name].fingerprint(self.split) for name in self.chosen]
        return content_hash(["mixed", VERSION, *prints, self.chosen, self.planted, self.column])
