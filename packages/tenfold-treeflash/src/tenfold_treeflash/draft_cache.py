"""The drafter's context: keys and values of target features, per layer, in growing buffers.

The block's own keys never enter: they belong to tokens that may be rejected. Shapes: `B` rows,
`G` key-value heads, `S` context tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class DraftCache:
    """Per layer `[2, B, G, capacity, D]`; capacity doubles, so appending costs O(1) amortised."""

    def __init__(self) -> None:
        self.length = 0
        self._stores: list[Tensor] = []

    def append(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds keys and values `[B, G, n, D]`, one pair per layer."""
        new = pairs[0][0].shape[2]
        end = self.length + new
        if not self._stores or end > self._stores[0].shape[3]:
            self._grow(pairs, end)
        for store, (keys, values) in zip(self._stores, pairs, strict=True):
            store[0, :, :, self.length : end] = keys
            store[1, :, :, self.length : end] = values
        self.length = end

    def append_rows(
        self, pairs: Sequence[tuple[Tensor, Tensor]], slots: Tensor, length: int
    ) -> None:
        """Adds keys and values `[B, G, n, D]` at `slots [B, n]`, each row behind its own tokens.

        `length` is that of the longest row afterwards; what padding wrote behind a row's end is
        overwritten by the row's next tokens.
        """
        end = self.length + slots.shape[1]
        if not self._stores or end > self._stores[0].shape[3]:
            self._grow(pairs, end)
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for store, (keys, values) in zip(self._stores, pairs, strict=True):
            store[0][rows, :, slots] = keys.transpose(1, 2)
            store[1][rows, :, slots] = values.transpose(1, 2)
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keeps these rows only."""
        self._stores = [store[:, rows] for store in self._stores]

    def _grow(self, pairs: Sequence[tuple[Tensor, Tensor]], end: int) -> None:
        size = max(end, _FIRST_CAPACITY, 2 * self.length)
        stores = []
        for index, (keys, _) in enumerate(pairs):
            rows, groups, _, width = keys.shape
            # Zeros, not garbage: a masked key has weight 0, and 0 x NaN would still be NaN.
            store = keys.new_zeros((2, rows, groups, size, width))
            if self._stores:
                store[:, :, :, : self.length] = self._stores[index][:, :, :, : self.length]
            stores.append(store)
        self._stores = stores

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer keys and values `[B, G, S, D]` (views)."""
        return [(s[0, :, :, : self.length], s[1, :, :, : self.length]) for s in self._stores]
