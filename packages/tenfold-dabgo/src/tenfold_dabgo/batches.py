"""Token batches from the corpus: length buckets under a token budget, right padding.

Padding is computed like text, so samples are grouped by a small dynamic programme that minimizes
padded tokens plus a price per batch, with batches that never exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm import batching
from tenfold.lm.batching import scored_positions
from torch import Tensor

from tenfold_dabgo.corpus import TokenDataset

BATCH_PRICE = 128
"""What a batch costs beyond its tokens, in tokens: thin matrix products and a change of weights."""
CPU_TOKENS = 2048
"""Largest useful batch on a CPU: products are at full speed from some 256 rows, and larger
activations fall out of the caches (and, past 32 MB, are returned to the system each time)."""
BLOCK = 4096
"""Samples that are grouped together; keeps the grouping of millions linear in time."""


def length_buckets(
    dataset: TokenDataset,
    indices: np.ndarray | Sequence[int],
    token_budget: int,
    device: torch.device | str = "cpu",
) -> list[np.ndarray]:
    """Groups samples of similar length so that padded size stays within the budget.

    Longest first. The grouping depends only on the set of samples, the budget and the kind of
    device (a CPU takes at most `CPU_TOKENS`). Samples without a score are left out, and one
    longer than the budget gets a batch of its own.

    Raises:
        ConfigError: `token_budget` is less than 1.
    """
    if token_budget < 1:
        raise ConfigError(f"token budget is {token_budget}; it must be at least 1")
    if torch.device(device).type == "cpu":
        token_budget = min(token_budget, CPU_TOKENS)
    chosen = np.unique(np.asarray(indices, dtype=np.int64))
    chosen = chosen[dataset.scorable[chosen]]
    lengths = dataset.lengths[chosen]
    order = np.argsort(-lengths, kind="stable")
    out = []
    for start in range(0, len(order), BLOCK):
        part = order[start : start + BLOCK]
        out += [chosen[part[i:j]] for i, j in cheapest_cuts(lengths[part], token_budget)]
    return out


def cheapest_cuts(
    lengths: np.ndarray, token_budget: int, price: int = BATCH_PRICE
) -> list[tuple[int, int]]:
    """Cuts descending lengths `[n]` into runs `[i, j)` of least total cost.

    A run costs `lengths[i] * (j - i) + price` and holds at most `token_budget` padded tokens
    (one row is always allowed).
    """
    n = len(lengths)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(n + 1, dtype=np.int64)
    for i in range(n):
        width = int(lengths[i])
        rows = min(max(1, token_budget // max(width, 1)), n - i)
        costs = best[i] + price + width * np.arange(1, rows + 1)
        better = costs < best[i + 1 : i + rows + 1]
        best[i + 1 : i + rows + 1][better] = costs[better]
        previous[i + 1 : i + rows + 1][better] = i
    cuts = []
    end = n
    while end > 0:
        cuts.append((int(previous[end]), end))
        end = int(previous[end])
    return cuts[::-1]


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
