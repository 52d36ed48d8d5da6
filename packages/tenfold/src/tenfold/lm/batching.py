"""Token sequences as padded batches. Shapes: `B` rows, `T` the longest row's length.

Masks come from lengths, never from ids: a genuine end-of-sequence token counts even where it
doubles as padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError

SIDES = ("left", "right")


def pad_batch(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    *,
    side: str = "right",
    loss_from: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """Sequences as one padded batch.

    Args:
        sequences: token ids per row; rows may be empty.
        pad_id: id written where a row has no token.
        side: `right` (scoring) or `left` (generation).
        loss_from: per row the first position whose token is scored, counted from the row's own
            first token; default 1, the first token that has one before it.
        device: where the tensors go.

    Returns:
        A batch of `[B, T]` tensors with an explicit `loss_mask`.

    Raises:
        ConfigError: an unknown side, or not one `loss_from` per sequence.
    """
    if side not in SIDES:
        raise ConfigError(f"padding side is {side!r}; known: {', '.join(SIDES)}")
    starts = [1] * len(sequences) if loss_from is None else list(loss_from)
    if len(starts) != len(sequences):
        raise ConfigError(f"{len(starts)} loss_from values for {len(sequences)} sequences")
    width = max((len(s) for s in sequences), default=0)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    scored = torch.zeros_like(ids)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        first = width - len(sequence) if side == "left" else 0
        last = first + len(sequence)
        ids[row, first:last] = torch.as_tensor(list(sequence), dtype=torch.int64)
        mask[row, first:last] = 1
        scored[row, min(first + max(start, 1), last) : last] = 1
    return TokenBatch(ids.to(device), mask.to(device), scored.to(device))


def scored_positions(batch: TokenBatch) -> Tensor:
    """`[B, T]` bool: real tokens that follow a real token and that `loss_mask` asks for."""
    real = batch.attention_mask.bool()
    scored = torch.zeros_like(real)
    scored[:, 1:] = real[:, 1:] & real[:, :-1]
    return scored if batch.loss_mask is None else scored & batch.loss_mask.bool()


def position_ids(attention_mask: Tensor) -> Tensor:
    """`[B, T]` int64 positions counted from each row's first real token, 0 on padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def length_buckets(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups of row indices whose padded size stays within a budget.

    Longest first, ties by index, so the grouping depends on the lengths alone. A row longer
    than the budget gets a group of its own. Put results back in order by writing each to its
    index.

    Raises:
        ConfigError: `token_budget` is less than 1.
    """
    if token_budget < 1:
        raise ConfigError(f"token budget is {token_budget}; it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    buckets, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        buckets.append(order[start : start + rows])
        start += rows
    return buckets
