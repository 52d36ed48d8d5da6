"""Token batches from the corpus: length buckets under a token budget, right padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tenfold.capabilities import TokenBatch
from torch import Tensor

from tenfold_dabgo.corpus import TokenDataset


def length_buckets(
    dataset: TokenDataset, indices: np.ndarray | Sequence[int], token_budget: int
) -> list[np.ndarray]:
    """Groups samples of similar length so that padded size stays within the budget.

    Sorted by length (ties by index), so the grouping depends only on the set of samples. A
    sample longer than the budget gets a batch of its own. Samples without a score are left
    out.
    """
    chosen = np.unique(np.asarray(indices, dtype=np.int64))
    lengths = dataset.lengths[chosen]
    chosen = chosen[lengths >= 2]
    order = chosen[np.argsort(dataset.lengths[chosen], kind="stable")[::-1]]
    buckets, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // int(dataset.lengths[order[start]]))
        buckets.append(order[start : start + rows])
        start += rows
    return buckets


def token_batch(
    dataset: TokenDataset,
    indices: Sequence[int] | np.ndarray,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """The samples as one right-padded batch; every token after the first is scored.

    Masks come from lengths, never from ids: a genuine end-of-sequence token counts even when
    it doubles as padding.
    """
    rows = [dataset.ids(int(i)) for i in indices]
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = row
        mask[r, : len(row)] = 1
    return TokenBatch(
        torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), loss_mask=None
    )


def pad_id(model: object) -> int:
    """The model's padding id; 0 for models without a tokenizer (masks hide it anyway)."""
    return int(getattr(model, "pad_id", 0))


def scored_mask(batch: TokenBatch) -> Tensor:
    """`[B, T]` bool: positions with a loss (a real token before them, and asked for)."""
    real = batch.attention_mask.bool()
    mask = torch.zeros_like(real)
    mask[:, 1:] = real[:, 1:] & real[:, :-1]
    return mask if batch.loss_mask is None else mask & batch.loss_mask.bool()


def sample_means(token_loss: Tensor, batch: TokenBatch, reduction: str = "mean") -> Tensor:
    """`[B]` loss per sample: the mean over its scored tokens (at least 1), or the sum."""
    total = token_loss.sum(dim=1)
    if reduction == "sum":
        return total
    return total / scored_mask(batch).sum(dim=1).clamp_min(1)


def single_row(batch: TokenBatch, row: int) -> TokenBatch:
    """One row as a batch of its own, without its padding."""
    keep = batch.attention_mask[row].bool()
    loss_mask = None if batch.loss_mask is None else batch.loss_mask[row : row + 1, keep]
    return TokenBatch(
        batch.input_ids[row : row + 1, keep], batch.attention_mask[row : row + 1, keep], loss_mask
    )
