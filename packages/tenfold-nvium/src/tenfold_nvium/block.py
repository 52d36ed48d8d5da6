"""The geometry of one segment run: which positions of which rows are computed together.

A block is flat: the tokens of its rows one after the other, each row's positions consecutive
and starting at the row's frontier. Linear layers work on the flat tokens, so rows of different
widths need no padding; only attention sees a padded `[b, w]` grid.

Shapes: `n` tokens of the block, `b` rows, `w` widest row, `S` keys, `B` rows of the cache.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

FIRST_ROW = np.zeros(1, dtype=np.int64)


class Block:
    """Positions `starts[i] .. starts[i] + widths[i] - 1` of cache row `rows[i]`, for each i.

    Args:
        rows: cache rows, ascending.
        starts, widths: first position and number of positions per row.
        cache_rows: number of rows B of the cache.
        device: where index tensors live.
    """

    def __init__(
        self,
        rows: np.ndarray,
        starts: np.ndarray,
        widths: np.ndarray,
        cache_rows: int,
        device: torch.device,
    ) -> None:
        self.rows, self.starts, self.widths = rows, starts, widths
        self.device = device
        self.start = int(starts[0])
        self.length = int((starts + widths).max())
        """Keys that queries may see at most."""
        self.width = int(widths.max())
        self.size = int(widths.sum())
        self.whole = len(rows) == cache_rows
        self._mask: Tensor | None = None
        self.rotation: tuple[Tensor, Tensor] | None = None
        """Cosines and sines `[n, 1, D]` of its positions, kept by the first who needs them."""

    @cached_property
    def row_of(self) -> np.ndarray:
        """Cache row of each token, `[n]`."""
        return np.repeat(self.rows, self.widths)

    @cached_property
    def ends(self) -> Tensor:
        """Index of each row's last token, `[b]`."""
        return self._index(self.widths.cumsum() - 1)

    @cached_property
    def _query(self) -> np.ndarray:
        """Offset of each token inside its row, `[n]`."""
        begins = self.widths.cumsum() - self.widths
        return np.arange(self.size) - np.repeat(begins, self.widths)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token, `[n]`."""
        return self._index(np.repeat(self.starts, self.widths) + self._query)

    @cached_property
    def _cells(self) -> tuple[Tensor, Tensor]:
        return self._index(self.row_of), self.positions

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor] | None:
        """`(row, column)` of each token in the padded grid; None when the grid is full."""
        if self.size == len(self.rows) * self.width:
            return None
        batch = np.repeat(np.arange(len(self.rows)), self.widths)
        return self._index(batch), self._index(self._query)

    @cached_property
    def _row_index(self) -> Tensor:
        return self._index(self.rows)

    @property
    def causal(self) -> bool:
        """Whether plain causal attention (or none, for single queries) is what the block needs."""
        full = self.size == len(self.rows) * self.width
        same = full and bool((self.starts == self.start).all())
        return same and (self.width == 1 or self.start == 0)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores `[b, 1, w, S]`: 0, or minus infinity for keys that a query may
        not look at; None when `causal` says it all. Made once for all layers of a segment."""
        if self._mask is None and not self.causal:
            self._mask = self._made_mask(dtype)
        return self._mask

    def _made_mask(self, dtype: torch.dtype) -> Tensor:
        keys = torch.arange(self.length, device=self.device)
        queries = self._index(self.starts)[:, None] + torch.arange(self.width, device=self.device)
        hidden = (keys > queries[..., None])[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(
            hidden, -torch.inf
        )

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    # --- What layers use ----------------------------------------------------------------------

    def pick(self, table: Tensor) -> Tensor:
        """Rows of a table by position: `[P, D]` to `[n, D]`."""
        return table[self.positions]

    def store(self, pair: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes `states [n, 2, G, D]` (keys and values) into `pair [2, B, G, C, D]`; returns
        the keys and values the block's rows look at, `[b, G, S, D]` each."""
        row, position = self._cells
        pair[:, row, :, position] = states
        seen = pair[:, :, :, : self.length]
        if not self.whole:
            seen = seen.index_select(1, self._row_index)
        return seen[0], seen[1]

    def to_grid(self, queries: Tensor) -> Tensor:
        """Flat `[n, A, D]` to padded `[b, A, w, D]`."""
        if self._grid is None:
            grid = queries.view(len(self.rows), self.width, *queries.shape[1:])
        else:
            grid = queries.new_zeros((len(self.rows), self.width, *queries.shape[1:]))
            grid[self._grid] = queries
        return grid.transpose(1, 2)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Padded `[b, A, w, D]` to flat `[n, A D]`."""
        grid = grid.transpose(1, 2).flatten(2)
        return grid.flatten(0, 1) if self._grid is None else grid[self._grid]


class SoloBlock(Block):
    """A block of a cache with one row: everything is a slice, nothing an index."""

    def __init__(self, start: int, width: int, device: torch.device) -> None:
        self.device = device
        self.start, self.width, self.size = start, width, width
        self.length = start + width
        self.rows = FIRST_ROW
        self._mask = self.rotation = None

    @cached_property
    def starts(self) -> np.ndarray:  # type: ignore[override]
        """See `Block`."""
        return np.array([self.start])

    @cached_property
    def widths(self) -> np.ndarray:  # type: ignore[override]
        """See `Block`."""
        return np.array([self.width])

    @cached_property
    def row_of(self) -> np.ndarray:
        """See `Block`."""
        return np.zeros(self.width, dtype=np.int64)

    @property
    def causal(self) -> bool:
        """See `Block`."""
        return self.width == 1 or self.start == 0

    def _made_mask(self, dtype: torch.dtype) -> Tensor:
        shape = (1, 1, self.width, self.length)
        full = torch.full(shape, -torch.inf, dtype=dtype, device=self.device)
        return full.triu_(self.start + 1)

    def pick(self, table: Tensor) -> Tensor:
        """See `Block`."""
        return table[self.start : self.length]

    def store(self, pair: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """See `Block`."""
        pair[:, 0, :, self.start : self.length] = states.permute(1, 2, 0, 3)
        seen = pair[:, :, :, : self.length]
        return seen[0], seen[1]

    def to_grid(self, queries: Tensor) -> Tensor:
        """See `Block`."""
        return queries[None].transpose(1, 2)

    def from_grid(self, grid: Tensor) -> Tensor:
        """See `Block`."""
        return grid[0].transpose(0, 1).flatten(1)
