"""Random numbers by position, so that a seed means a text.

Every (row seed, position) owns K - 1 uniforms for the exits and one for the token, whatever
the scheduler, the batch or the number of deferred tokens. The same seed therefore gives the
same text for piggybacked decoding, full recomputation and any batch, which turns exactness
into a deterministic test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from tenfold.seeds import derive

_BLOCK = 128


class Noise(Protocol):
    """Source of a row's random numbers."""

    def at(self, position: int) -> tuple[Sequence[float], float]:
        """`(K - 1 exit uniforms, token uniform)` of a position, all in [0, 1)."""
        ...


class PositionNoise:
    """Uniforms in [0, 1) with 53 random bits, drawn in blocks of positions on the CPU.

    Args:
        seed: the row's seed.
        num_exits: number of exits K.
    """

    def __init__(self, seed: int, num_exits: int) -> None:
        self._seed = seed
        self._width = num_exits
        self._blocks: dict[int, list[list[float]]] = {}

    def at(self, position: int) -> tuple[Sequence[float], float]:
        """`(exit uniforms, token uniform)` of a position (0-based, prompt included)."""
        index, offset = divmod(position, _BLOCK)
        if index not in self._blocks:
            generator = torch.Generator().manual_seed(derive(self._seed, "position", index))
            numbers = torch.rand(_BLOCK, self._width, dtype=torch.float64, generator=generator)
            self._blocks[index] = numbers.tolist()
        row = self._blocks[index][offset]
        return row[:-1], row[-1]


class ScriptedNoise:
    """Noise that makes `ScriptedExit` follow a script of exits (0-based), one per token from
    `first` on; the last exit is taken where the script has ended."""

    def __init__(self, script: Sequence[int], num_exits: int, first: int, seed: int = 0) -> None:
        self._script = script
        self._num_exits = num_exits
        self._first = first
        self._base = PositionNoise(seed, num_exits)

    def at(self, position: int) -> tuple[Sequence[float], float]:
        """Exit uniforms 0 at the scripted exit and 1 before it; a random token uniform."""
        n = position - self._first
        target = self._script[n] if 0 <= n < len(self._script) else self._num_exits - 1
        gates = [0.0 if k == target else 1.0 for k in range(self._num_exits - 1)]
        return gates, self._base.at(position)[1]
