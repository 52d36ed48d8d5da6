"""The target's key-value cache for tree decoding: every layer keeps everything, in buffers.

A tree's nodes are appended side by side; `keep` moves the accepted ones together and forgets the
rest. Keys carry their own positions, so nothing is computed again. Layers with a sliding window
keep all keys too: the window is applied in the mask, by position.

Shapes: `B` rows, `G` key-value heads, `C` cached tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_FIRST_CAPACITY = 64


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values `[B, G, capacity, D]`; capacity doubles, so appending is O(1) amortised."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the first buffers."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._reserve(key_states, value_states, key_states.shape[-2])
        self.is_initialized = True

    def _reserve(self, key_states: Tensor, value_states: Tensor, end: int) -> None:
        size = max(end, 2 * self.length, _FIRST_CAPACITY)
        for name, like in (("keys", key_states), ("values", value_states)):
            # Zeros, not garbage: a masked key has weight 0, and 0 x NaN would still be NaN.
            new = like.new_zeros((*like.shape[:-2], size, like.shape[-1]))
            old = getattr(self, name)
            if old is not None:
                new[..., : self.length, :] = old[..., : self.length, :]
            setattr(self, name, new)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends `[B, G, n, D]`; returns all keys and values (views)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self._reserve(key_states, value_states, end)
        self.keys[..., self.length : end, :] = key_states
        self.values[..., self.length : end, :] = value_states
        self.length = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def keep(self, start: int, offsets: Tensor | None, count: int) -> None:
        """Keeps the first `start` tokens and, of those after them, `offsets [count]` in that
        order (None: the first `count`)."""
        if self.keys is not None and self.values is not None and offsets is not None:
            chosen = start + offsets
            self.keys[..., start : start + count, :] = self.keys[..., chosen, :]
            self.values[..., start : start + count, :] = self.values[..., chosen, :]
        self.length = start + count

    def keep_rows(self, source: Tensor, slots: Tensor, length: int) -> None:
        """Moves the tokens at slots `source [B, n]` to `slots [B, n]`; `length` remain."""
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for store in (self.keys, self.values):
            if store is not None:
                store[rows, :, slots] = store[rows, :, source]
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keeps these rows only."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for a mask over this layer."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Cached tokens."""
        return self.length

    def get_max_length(self) -> int:
        """-1: grows without a limit."""
        return -1

    def reset(self) -> None:
        """Empties the layer."""
        self.keys = self.values = None
        self.length, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        self.length = max(self.length - abs(tokens_to_remove), 0)


class TreeCache(Cache):
    """A cache of `TreeCacheLayer`s, one per layer of the target."""

    def __init__(self, layers: int) -> None:
        self.stores = [TreeCacheLayer() for _ in range(layers)]
        super().__init__(layers=list(self.stores))

    @property
    def length(self) -> int:
        """Cached tokens."""
        return self.stores[0].length

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        """Keeps the first `start` tokens, and of those appended after them these (ascending)."""
        store = self.stores[0]
        straight = list(nodes) == list(range(len(nodes)))
        offsets = None
        if not straight and store.keys is not None:
            offsets = torch.tensor(list(nodes), device=store.keys.device)
        for layer in self.stores:
            layer.keep(start, offsets, len(nodes))

    def keep_rows(self, start: int, lengths: Sequence[int], nodes: Sequence[Sequence[int]]) -> None:
        """Keeps the first `lengths[r]` tokens of row r and, behind them, these of the nodes that
        were appended at slot `start`."""
        longest = max(length + len(path) for length, path in zip(lengths, nodes, strict=True))
        keys = self.stores[0].keys
        assert keys is not None
        width = max(map(len, nodes))
        padded = [[*path, *[path[-1]] * (width - len(path))] for path in nodes]
        source = torch.tensor(padded, device=keys.device) + start
        slots = torch.tensor(lengths, device=keys.device)[:, None]
        slots = slots + torch.arange(width, device=keys.device)
        for layer in self.stores:
            layer.keep_rows(source, slots, longest)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows only."""
        for layer in self.stores:
            layer.select(rows)
