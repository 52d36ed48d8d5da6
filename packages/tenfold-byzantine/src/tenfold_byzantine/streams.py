"""Where every random number of a game comes from (spec, Appendix C).

A game owns one seed; each use of chance has its own stream, named by labels, so that drawing more
in one place changes nothing elsewhere. Nothing touches the global generator.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tenfold.seeds import derive


def stream(seed: int, *labels: object) -> random.Random:
    """The generator of a seed and labels, e.g. `stream(7, "links", 3)`."""
    return random.Random(derive(seed, *labels))


def replicate_seed(seed: int, replicate: int) -> int:
    """Seed of a sweep's replicate; the same in all cells, so that games can be paired."""
    return derive(seed, "replicate", replicate)


def seats(seed: int, agents: int, byzantine: int) -> tuple[list[int], list[int]]:
    """Which agents are Byzantine, and the order in which the others take the honest seats.

    Returns:
        Byzantine agents and honest agents, both in random order: groups of a mixed side are dealt
        along it, so that an agent's number says nothing about its group.
    """
    order = list(range(agents))
    stream(seed, "roles").shuffle(order)
    return order[:byzantine], order[byzantine:]


def initial_values(seed: int, honest: Sequence[int], low: int, high: int) -> dict[int, int]:
    """Initial values of the honest agents, uniform on `low ... high`, both included.

    The k-th honest agent by number draws the k-th value, so that games of one seed share values
    whatever the number of Byzantine agents.
    """
    values = stream(seed, "initial values").choices(range(low, high + 1), k=len(honest))
    return dict(zip(sorted(honest), values, strict=True))
