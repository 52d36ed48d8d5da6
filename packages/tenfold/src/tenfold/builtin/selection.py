"""What the built-in datasets share: splits by a stable hash, limits, seeded shuffles."""

from __future__ import annotations

import random
from collections.abc import MutableSequence
from dataclasses import dataclass
from typing import Any

from tenfold.errors import ConfigError, nearest
from tenfold.seeds import derive

HASH_RANGE = 2**63
"""`derive` gives integers below this."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Train, validation and test parts, decided for each key by its hash alone.

    A key (a module, a file, a record id) keeps its part when others come or go; a larger
    `validation` takes from `train` only, so the test part stays as it was.

    Attributes:
        default: the part that is read where none is named.
        validation: share of the keys in `validation`; 0 leaves that part out.
        test: share of the keys in `test`.

    Raises:
        ConfigError: the shares exceed 1, or the default part is empty by construction.
    """

    default: str = "train"
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        if self.validation + self.test > 1:
            raise ConfigError(
                f"validation = {self.validation} and test = {self.test} are more than everything; "
                "their sum must be at most 1"
            )
        self.check(self.default)

    def names(self) -> tuple[str, ...]:
        """The parts there are, the default one first; `all` stands for them together."""
        parts = ["train"]
        parts += ["validation"] if self.validation else []
        parts += ["test"] if self.test else []
        parts += ["all"] if len(parts) > 1 else []
        return tuple(dict.fromkeys((self.default, *parts)))

    def check(self, split: str) -> str:
        """The part's name, with the default for an empty one.

        Raises:
            ConfigError: there is no such part.
        """
        name = split or self.default
        sizes = {"validation": self.validation, "test": self.test, "train": 1, "all": 1}
        if name not in sizes:
            raise ConfigError(
                f"no split {name!r}{nearest(name, sizes)} (splits: {', '.join(self.names())})"
            )
        if not sizes[name]:
            raise ConfigError(
                f"the split {name!r} is empty: its share is 0", hint=f"set {name} = 0.1, say"
            )
        return name

    def holds(self, split: str, key: str) -> bool:
        """Whether a key belongs to a (checked) part."""
        return split == "all" or self.part_of(key) == split

    def part_of(self, key: str) -> str:
        """`train`, `validation` or `test`."""
        place = derive(0, "split", key) / HASH_RANGE
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


@dataclass(frozen=True, slots=True)
class Selection:
    """A dataset's own limit and shuffle, which `load`'s arguments narrow or replace."""

    limit: int | None = None
    shuffle_seed: int | None = None

    def count(self, limit: int | None) -> int | None:
        """How many records to give: the smaller of both limits, None for all."""
        limits = [value for value in (self.limit, limit) if value is not None]
        return min(limits, default=None)

    def seed(self, shuffle_seed: int | None) -> int | None:
        """The shuffle to use: the given one, else the dataset's own, else none."""
        return self.shuffle_seed if shuffle_seed is None else shuffle_seed


def shuffle(items: MutableSequence[Any], seed: int, *labels: object) -> None:
    """Shuffles in place; equal seeds and labels give equal orders on every machine."""
    random.Random(derive(seed, "shuffle", *labels)).shuffle(items)
