"""Token-by-token control over a model's key-value cache: the `step` capability.

A session keeps, beside the cache, which columns are real (`[B, C]`, prompts are left-padded)
and each column's position. Positions are inside the cached keys, so columns may be dropped or
put in another order without computing anything again; that is what tree decoding needs.

Shapes: `B` rows, `T` new tokens, `C` cached columns, `V` vocabulary, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tenfold.capabilities import StepOutput
from tenfold.errors import ConfigError
from tenfold.lm import architecture


class CacheSession:
    """A running forward computation over a `DynamicCache`; no gradients."""

    def __init__(self, model: Any, context_length: int) -> None:
        self._model = model
        self._context_length = context_length
        self._cache = DynamicCache()
        # `[B, C]` each; None until the first tokens come.
        self._valid: Tensor | None = None
        self._positions: Tensor | None = None

    @property
    def length(self) -> int:
        """Cached columns, padding included."""
        return 0 if self._valid is None else self._valid.shape[1]

    @torch.no_grad()
    def extend(
        self, tokens: Tensor, positions: Tensor | None = None, attention: Tensor | None = None
    ) -> StepOutput:
        """Runs `tokens [B, T]` and caches them.

        Args:
            tokens: new token ids.
            positions: `[B, T]`; default: those after each row's highest cached position.
            attention: `[B, T, C + T]` bool, True = may look; default causal. Padding columns
                are never looked at.

        Raises:
            ConfigError: wrong shapes, a position beyond the model's context, or a pattern for
                more positions than a sliding window holds.
        """
        return self._run(tokens, torch.ones_like(tokens, dtype=torch.bool), positions, attention)

    @torch.no_grad()
    def begin(self, tokens: Tensor, mask: Tensor | None) -> StepOutput:
        """Runs the (left-padded) prompt; `mask [B, T]` is 1 for real tokens. On a running
        session: further tokens, of which rows may have different numbers."""
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return self._run(tokens, real, None, None)

    def _run(
        self, tokens: Tensor, real: Tensor, positions: Tensor | None, attention: Tensor | None
    ) -> StepOutput:
        self._check_rows(tokens)
        if positions is None:
            positions = self._next_positions(real)
        self._check_positions(positions)
        valid = real if self._valid is None else torch.cat([self._valid, real], dim=1)
        arguments: dict[str, Any] = {"attention_mask": self._mask(valid, attention, tokens.shape)}
        if architecture.accepts(self._model, "position_ids"):
            arguments["position_ids"] = positions
        with architecture.head_inputs(self._model) as hidden:
            output = self._model(
                input_ids=tokens, past_key_values=self._cache, use_cache=True, **arguments
            )
        self._positions = (
            positions if self._positions is None else torch.cat([self._positions, positions], 1)
        )
        self._valid = valid
        return StepOutput(output.logits, hidden[0] if hidden else None, self.length)

    def _check_rows(self, tokens: Tensor) -> None:
        if tokens.dim() != 2:
            raise ConfigError(f"tokens must have shape [B, T]; got {tuple(tokens.shape)}")
        if self._valid is not None and tokens.shape[0] != self._valid.shape[0]:
            raise ConfigError(
                f"the session has {self._valid.shape[0]} rows, the tokens {tokens.shape[0]}"
            )

    def _next_positions(self, real: Tensor) -> Tensor:
        steps = (real.long().cumsum(-1) - 1).clamp_min(0)
        if self._positions is None or self._valid is None or self.length == 0:
            return steps
        last = self._positions.masked_fill(~self._valid, -1).amax(dim=1, keepdim=True)
        return last + 1 + steps

    def _check_positions(self, positions: Tensor) -> None:
        if positions.numel() and int(positions.max()) >= self._context_length:
            raise ConfigError(
                f"position {int(positions.max())} is beyond the model's context of "
                f"{self._context_length} tokens"
            )

    def _mask(self, valid: Tensor, attention: Tensor | None, shape: torch.Size) -> Tensor:
        """`[B, C + T]` real columns, or with a pattern the additive `[B, 1, T, C + T]`."""
        if attention is None:
            return valid.long()
        expected = (*shape, valid.shape[1])
        if tuple(attention.shape) != expected:
            raise ConfigError(
                f"attention has shape {tuple(attention.shape)}; [B, T, cache + T] is {expected}"
            )
        window = architecture.sliding_window(self._model)
        if window is not None and valid.shape[1] > window:
            raise ConfigError(
                f"the model looks back {window} tokens only; an attention pattern of one's own "
                f"cannot reach over {valid.shape[1]} cached positions"
            )
        dtype = next(self._model.parameters()).dtype
        allowed = (attention.bool() & valid[:, None, :])[:, None]
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` cached columns.

        Raises:
            ConfigError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ConfigError(f"cannot keep {length} of {self.length} cached positions")
        self._map(lambda t: t[..., :length, :], lambda t: t[:, :length])

    def keep(self, indices: Sequence[int]) -> None:
        """Keeps only these cached columns, in this order.

        Raises:
            ConfigError: an index outside the cache.
        """
        self._check_indices(indices, self.length, "cached positions")
        chosen = self._index(indices)
        self._map(lambda t: t.index_select(-2, chosen), lambda t: t.index_select(1, chosen))

    def reorder(self, rows: Sequence[int]) -> None:
        """Replaces the batch by these rows; repeats and omissions are fine.

        Raises:
            ConfigError: an index outside the batch.
        """
        count = 0 if self._valid is None else self._valid.shape[0]
        self._check_indices(rows, count, "rows")
        chosen = self._index(rows)
        self._map(lambda t: t.index_select(0, chosen), lambda t: t.index_select(0, chosen))

    def compact(self) -> None:
        """Moves each row's real columns together, to the right, and drops what is left over.

        Padding between tokens comes from `begin` on a running session.
        """
        if self._valid is None or self._valid.all():
            return
        width = int(self._valid.sum(-1).max())
        order = self._valid.long().sort(dim=-1, stable=True).indices[:, -width:]

        def cached(t: Tensor) -> Tensor:
            index = order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
            return t.gather(-2, index)

        self._map(cached, lambda t: t.gather(1, order))

    def fork(self) -> CacheSession:
        """An independent copy. Cached tensors are never changed in place, so both hold the
        same ones until one moves on."""
        other = copy(self)
        other._cache = copy(self._cache)
        other._cache.layers = [copy(layer) for layer in self._cache.layers]
        return other

    def _index(self, indices: Sequence[int]) -> Tensor:
        device = None if self._valid is None else self._valid.device
        return torch.tensor(list(indices), dtype=torch.int64, device=device)

    @staticmethod
    def _check_indices(indices: Sequence[int], size: int, what: str) -> None:
        if bad := [i for i in indices if not 0 <= i < size]:
            raise ConfigError(f"index {bad[0]} is outside the session's {size} {what}")

    def _map(self, cached: Any, bookkeeping: Any) -> None:
        """Applies a selection to keys and values `[B, heads, C, D]` and to `[B, C]` records."""
        for layer in self._cache.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                layer.keys, layer.values = cached(layer.keys), cached(layer.values)
        if self._valid is not None and self._positions is not None:
            self._valid, self._positions = bookkeeping(self._valid), bookkeeping(self._positions)
