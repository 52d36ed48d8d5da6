"""`NviumCache`: keys and values up to a frontier per segment, and the states that wait there.

With deferral the segments of a model are not equally far. `frontier[m, r]` counts the positions
of row r that segment m has processed; they are exactly `0 .. frontier - 1`, so every layer's
cache is a plain prefix. The residual states of the positions between frontier m and frontier
m - 1 wait, in ascending order, for segment m (paper "Deferred execution"; for m = 0 these are
embedded tokens on their way in). The cache owns this state, so conversations do not mix, and
cropping, reordering or saving it cannot lose a token.

Positions count real tokens; padding is never stored. Shapes: `B` rows, `G` key-value heads,
`C` capacity, `D` head size, `H` hidden, `K` segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tenfold.errors import ComponentError, ConfigError
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from tenfold_nvium.block import Block, SoloBlock
from tenfold_nvium.configuration import NviumConfig

if TYPE_CHECKING:
    from tenfold_nvium.layers import SegmentRunner
    from tenfold_nvium.modeling import NviumForCausalLM

_FIRST_CAPACITY = 64


class FrontierLayer(CacheLayerMixin):
    """Keys and values of one layer in a buffer `pair [2, B, G, C, D]`, by true position.

    Capacity doubles, so appending costs O(1) amortised instead of a copy per step. The layer is
    written through `tenfold_nvium.block.Block.store`.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: NviumCache, segment: int) -> None:
        super().__init__()
        self._cache = cache
        self._segment = segment
        self.pair: Tensor | None = None

    def set_pair(self, pair: Tensor) -> None:
        """Makes `[2, B, G, C, D]` the layer's storage; keys and values are its two halves."""
        self.pair, self.keys, self.values = pair, pair[0], pair[1]
        self.dtype, self.device = pair.dtype, pair.device
        self.is_initialized = True

    def room_for(self, block: Block, groups: int, like: Tensor) -> Tensor:
        """The storage, large enough for a block; made like `like [..., D]` at first use."""
        if self.pair is None or block.length > self.pair.shape[3]:
            self.reserve(block.length, groups, like)
        assert self.pair is not None
        return self.pair

    def reserve(self, length: int, groups: int, like: Tensor) -> None:
        """Makes room for at least `length` positions."""
        have = 0 if self.pair is None else self.pair.shape[3]
        size = max(length, 2 * have, _FIRST_CAPACITY)
        # Zeros, not garbage: a masked key has weight 0, and 0 x NaN would still be NaN.
        shape = (2, self._cache.rows, groups, size, like.shape[-1])
        # An ordinary tensor even inside inference mode: later calls may write outside of it.
        with torch.inference_mode(False):
            new = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.pair is not None:
            new[:, :, :, :have] = self.pair
        self.set_pair(new)

    def select(self, rows: Tensor) -> None:
        """Replaces the rows by these (repeats allowed)."""
        if self.pair is not None:
            self.set_pair(self.pair.index_select(1, rows.to(self.pair.device)))

    def reset(self) -> None:
        """Empties the layer."""
        self.pair = self.keys = self.values = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        """Largest number of positions stored in any row."""
        frontier = self._cache.frontier[self._segment]
        return int(frontier.max()) if frontier.size else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for a mask over this layer."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows without a limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made by `reserve`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refused: a plain append would break the frontiers.

        Raises:
            ComponentError: always.
        """
        raise ComponentError(
            "an NviumCache is written by N-vium's own segments only; pass it to the model's "
            "forward or decoder, or use a DynamicCache with other models"
        )


class NviumCache(Cache):
    """Key-value cache with one frontier per segment and row, and the states waiting there.

    Invariant, per row: `lengths >= frontier[0] >= ... >= frontier[K-1]`, and
    `frontier[m-1] - frontier[m]` states wait for segment m (`lengths - frontier[0]` for m = 0).

    Args:
        config: the model's configuration.
        rows: number of rows; 0 lets the first tokens decide.
    """

    def __init__(self, config: NviumConfig, rows: int = 0) -> None:
        self.config = config
        self.segments = len(config.depths)
        self.rows = 0
        self.lengths = np.zeros(0, dtype=np.int64)
        """`[B]` positions of each row, deferred ones included."""
        self.frontier = np.zeros((self.segments, 0), dtype=np.int64)
        """`[K, B]` positions that each segment has processed."""
        self._waiting: list[list[tuple[np.ndarray, Tensor]]] = [[] for _ in range(self.segments)]
        self._solo: SoloBlock | None = None
        self.columns: Tensor | None = None
        """`[B, S]` boolean: which columns of the padded batch were real tokens; only kept when
        `forward` was called with padded columns, as `generate` of transformers does."""
        self.exit_history: list[np.ndarray] = []
        """Exit (0-based) of each row per decoded column, -1 for rows that had ended."""
        self._ended = np.zeros(0, dtype=bool)
        self._frozen = np.zeros(0, dtype=bool)
        self.runner: SegmentRunner | None = None
        """What `forward` runs segments with while `generate` uses this cache."""
        layers = range(config.num_hidden_layers)
        self.stores = [FrontierLayer(self, config.segment_of(i)) for i in layers]
        super().__init__(layers=list(self.stores))
        if rows:
            self.open_rows(rows)

    def open_rows(self, rows: int) -> None:
        """Makes `rows` empty rows of an empty cache.

        Raises:
            ConfigError: the cache already has another number of rows.
        """
        if self.rows == rows:
            return
        if self.rows:
            raise ConfigError(
                f"the cache holds {self.rows} rows, but {rows} were given; use the same batch, "
                "or batch_select_indices / batch_repeat_interleave first"
            )
        self.rows = rows
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.frontier = np.zeros((self.segments, rows), dtype=np.int64)

    def check_model(self, config: NviumConfig) -> None:
        """Raises ConfigError when the cache was made for a model of another shape."""
        _check_shapes(_shape_of(self.config), _shape_of(config))

    # --- Deferred states ----------------------------------------------------------------------

    def push(self, segment: int, row_of: np.ndarray, states: Tensor) -> None:
        """Lets `states [n, H]` wait for `segment`: the next positions, in order, of the rows
        `row_of [n]`."""
        self._waiting[segment].append((row_of, states))
        if segment == 0:
            self.lengths += np.bincount(row_of, minlength=self.rows)

    def take(self, segment: int, rows: np.ndarray) -> tuple[Tensor, Block]:
        """Removes everything that waits for `segment` in `rows` (ascending): flat states
        `[n, H]` and their block. The segment's frontier moves past them."""
        chunks = self._waiting[segment]
        if self.rows == 1:
            self._waiting[segment] = []
            states = chunks[0][1] if len(chunks) == 1 else torch.cat([s for _, s in chunks])
            start, width, solo = int(self.frontier[segment, 0]), states.shape[0], self._solo
            if solo is None or solo.start != start or solo.width != width:
                # The same for all segments unless something was deferred.
                solo = self._solo = SoloBlock(start, width, states.device)
            self.frontier[segment, 0] = solo.length
            return states, solo
        before = self.waiting_counts(segment)
        row_of, states = chunks[0] if len(chunks) == 1 else (
            np.concatenate([r for r, _ in chunks]), torch.cat([s for _, s in chunks])
        )  # fmt: skip
        self._waiting[segment] = []
        if len(rows) < self.rows and before[rows].sum() < len(row_of):
            wanted = np.zeros(self.rows, dtype=bool)
            wanted[rows] = True
            mine = wanted[row_of]
            left = np.flatnonzero(~mine)
            self._waiting[segment] = [(row_of[left], _pick(states, left))]
            kept = np.flatnonzero(mine)
            row_of, states = row_of[kept], _pick(states, kept)
        if len(rows) > 1 and (row_of[1:] < row_of[:-1]).any():
            order = np.argsort(row_of, kind="stable")
            states = _pick(states, order)
        block = Block(rows, self.frontier[segment, rows], before[rows], self.rows, states.device)
        self.frontier[segment, rows] += block.widths
        return states, block

    def waiting_counts(self, segment: int) -> np.ndarray:
        """`[B]` number of positions that wait for `segment`, per row."""
        before = self.lengths if segment == 0 else self.frontier[segment - 1]
        return before - self.frontier[segment]

    def waiting_states(self, segment: int, row: int) -> Tensor:
        """States `[n, H]` of a row that wait for `segment`, ascending (a copy)."""
        parts = [_pick(s, np.flatnonzero(r == row)) for r, s in self._waiting[segment]]
        return torch.cat(parts) if parts else torch.zeros(0, self.config.hidden_size)

    def deferred(self) -> np.ndarray:
        """`[B]` number of positions that have not passed the last segment."""
        return self.lengths - self.frontier[-1]

    @property
    def is_complete(self) -> bool:
        """Whether every position has passed every segment."""
        return not self.deferred().any()

    def flush(self, model: NviumForCausalLM, rows: Sequence[int] | None = None) -> None:
        """Completes all deferred positions (of some rows): one ascending pass, merging."""
        from tenfold_nvium.cascade import flush
        from tenfold_nvium.layers import SegmentRunner

        flush(SegmentRunner(model), self, range(self.rows) if rows is None else rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of token columns seen, padding included, as `generate` counts them."""
        if self.columns is not None:
            return self.columns.shape[1]
        return int(self.lengths.max()) if self.rows else 0

    # --- Rows that end ------------------------------------------------------------------------

    def start_rows(self) -> None:
        """All rows go on: a call of `generate` begins, or is over."""
        self._ended = np.zeros(self.rows, dtype=bool)
        self._frozen = np.zeros(self.rows, dtype=bool)

    def end_rows(self, done: np.ndarray) -> None:
        """Rows `done [B]` have received their last token. That token is still read (it waits,
        nothing runs for it); what `generate` feeds after it is padding and is not stored."""
        if self._ended.shape != done.shape:
            self.start_rows()
        self._ended |= done

    def take_ended(self) -> tuple[np.ndarray, np.ndarray]:
        """`(ended, frozen)`, `[B]` each, for the column about to be read: ended rows read a
        last token now, frozen ones read padding."""
        if self._ended.shape != (self.rows,):
            self.start_rows()
        ended, frozen = self._ended & ~self._frozen, self._frozen.copy()
        self._frozen |= ended
        return ended, frozen

    # --- Editing ------------------------------------------------------------------------------

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keeps the first `lengths[r]` positions of row r, in all segments and queues."""
        limit = np.asarray(lengths, dtype=np.int64)
        for m in range(self.segments):
            # Positions of waiting states follow from their order; drop those past the limit.
            seen, kept = self.frontier[m].copy(), []
            for row_of, states in self._waiting[m]:
                position = np.empty(len(row_of), dtype=np.int64)
                for i, row in enumerate(row_of):
                    position[i] = seen[row]
                    seen[row] += 1
                stay = np.flatnonzero(position < limit[row_of])
                if stay.size:
                    kept.append((row_of[stay], _pick(states, stay)))
            self._waiting[m] = kept
        self.lengths = np.minimum(self.lengths, limit)
        self.frontier = np.minimum(self.frontier, limit)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` columns (a negative number, as everywhere in
        transformers 5); columns that were padding in a row remove nothing there.

        Raises:
            ConfigError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ConfigError(
                f"crop({tokens_to_remove}): give minus the number of tokens to remove; "
                "truncate([...]) takes lengths"
            )
        if tokens_to_remove == 0:
            return
        removed: Any = -tokens_to_remove
        if self.columns is not None:
            removed = self.columns[:, tokens_to_remove:].sum(-1).numpy()
            self.columns = self.columns[:, :tokens_to_remove]
        self.truncate(np.maximum(self.lengths - removed, 0).tolist())

    def _select(self, rows: Tensor) -> None:
        """Replaces the rows by these, deferred states included."""
        order = rows.cpu().numpy()
        for m in range(self.segments):
            chunks = []
            for new, old in enumerate(order):
                states = self.waiting_states(m, int(old))
                if states.shape[0]:
                    chunks.append((np.full(states.shape[0], new), states))
            self._waiting[m] = chunks
        if len(self._ended) == self.rows:
            self._ended, self._frozen = self._ended[order], self._frozen[order]
        self.rows = len(order)
        self.lengths, self.frontier = self.lengths[order], self.frontier[:, order]
        if self.columns is not None:
            self.columns = self.columns[rows.cpu()]
        for layer in self.stores:
            layer.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the rows by `beam_idx`, deferred states included."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order (indices, or a boolean mask)."""
        indices = torch.as_tensor(indices)
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self._select(torch.arange(self.rows).repeat_interleave(repeats))

    def fork(self) -> NviumCache:
        """An independent copy."""
        twin = NviumCache(self.config)
        twin.load_state_dict(self.state_dict())
        return twin

    def reset(self) -> None:
        """Empties the cache; the next tokens decide the number of rows."""
        for layer in self.stores:
            layer.reset()
        self.rows, self.columns, self.exit_history = 0, None, []
        self.lengths, self.frontier = self.lengths[:0], self.frontier[:, :0]
        self._waiting = [[] for _ in range(self.segments)]
        self._solo = None
        self.start_rows()

    # --- Saving -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as named tensors (copies): keys and values up to each frontier, waiting
        states, and the counters."""
        state = {
            "shape": torch.tensor(_shape_of(self.config)),
            "lengths": torch.tensor(self.lengths),
            "frontier": torch.tensor(self.frontier),
        }
        if self.columns is not None:
            state["columns"] = self.columns.clone()
        for i, layer in enumerate(self.stores):
            if layer.pair is not None:
                state[f"layers.{i}"] = layer.pair[:, :, :, : layer.get_seq_length()].clone()
        for m, chunks in enumerate(self._waiting):
            if chunks:
                state[f"waiting.{m}.rows"] = torch.tensor(np.concatenate([r for r, _ in chunks]))
                state[f"waiting.{m}.states"] = torch.cat([s for _, s in chunks])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts a `state_dict` into this cache.

        Raises:
            ConfigError: it comes from a model of another shape.
        """
        _check_shapes(state["shape"].tolist(), _shape_of(self.config))
        self.reset()
        self.open_rows(state["lengths"].shape[0])
        self.lengths = state["lengths"].cpu().numpy().copy()
        self.frontier = state["frontier"].cpu().numpy().copy()
        if "columns" in state:
            self.columns = state["columns"].cpu()
        for i, layer in enumerate(self.stores):
            if f"layers.{i}" in state:
                layer.set_pair(state[f"layers.{i}"].clone())
        for m in range(self.segments):
            if f"waiting.{m}.rows" in state:
                row_of = state[f"waiting.{m}.rows"].cpu().numpy().copy()
                self._waiting[m] = [(row_of, state[f"waiting.{m}.states"].clone())]

    def save(self, path: Path) -> None:
        """Writes the cache as a safetensors file, atomically."""
        from safetensors.torch import save_file
        from tenfold.files import replacing

        with replacing(path) as temporary:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, temporary)

    @classmethod
    def load(cls, path: Path, config: NviumConfig, device: str = "cpu") -> NviumCache:
        """The cache of a file that `save` wrote."""
        from safetensors.torch import load_file

        cache = cls(config)
        cache.load_state_dict(load_file(path, device=device))
        return cache


def _shape_of(config: NviumConfig) -> list[int]:
    """What a cache must have in common with a model."""
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads or 0,
             config.head_dim or 0)  # fmt: skip
    return [*sizes, *(config.exit_layers or ())]


def _check_shapes(cache: list[int], model: list[int]) -> None:
    if cache != model:
        raise ConfigError(
            "this cache belongs to another model: (layers, hidden size, key-value heads, head "
            f"size, exits ...) are {cache} in the cache and {model} in the model"
        )


def _pick(states: Tensor, index: np.ndarray) -> Tensor:
    return states[torch.from_numpy(index).to(states.device)]
