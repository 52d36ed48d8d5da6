"""Token batches from the corpus: length buckets under a token budget, right padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tenfold.capabilities import TokenBatch
from tenfold.lm import batching
from tenfold.lm.batching import scored_positions
from torch import Tensor

from tenfold_dabgo.corpus import TokenDataset


def length_buckets(
    dataset: TokenDataset, indices: np.ndarray | Sequence[int], token_budget: int
) -> list[np.ndarray]:
    """Groups samples of similar length so that padded size stays within the budget.

    The grouping depends only on the set of samples. Samples without a score are left out.
    """
    chosen = np.unique(np.asarray(indices, dtype=np.int64))
    chosen = chosen[dataset.scorable[chosen]]
    return [chosen[b] for b in batching.length_buckets(dataset.lengths[chosen], token_budget)]


def token_batch(
    dataset: TokenDataset,
    indices: Iterable[int] | np.ndarray,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """The samples as one right-padded batch; every token after the first is scored."""
    rows = [dataset.ids(int(i)).tolist() for i in indices]
    return batching.pad_batch(rows, pad_id, device=device)


def pad_id(model: object) -> int:
    """The model's padding id; 0 for models without a tokenizer (masks hide it anyway)."""
    return int(getattr(model, "pad_id", 0))


def sample_means(token_loss: Tensor, batch: TokenBatch, reduction: str = "mean") -> Tensor:
    """`[B]` loss per sample: the mean over its scored tokens (at least 1), or the sum."""
    total = token_loss.sum(dim=1)
    if reduction == "sum":
        return total
    return total / scored_positions(batch).sum(dim=1).clamp_min(1)


def single_row(batch: TokenBatch, row: int) -> TokenBatch:
    """One row as a batch of its own, without its padding."""
    keep = batch.attention_mask[row].bool()
    loss_mask = None if batch.loss_mask is None else batch.loss_mask[row : row + 1, keep]
    return TokenBatch(
        batch.input_ids[row : row + 1, keep], batch.attention_mask[row : row + 1, keep], loss_mask
    )
