"""Token losses without the full logits.

`[B, T, V]` logits in fp32 are the largest tensor of a small language model: 2 GB for 16 rows of
1024 tokens and 32,000 words. A loss needs one number per token, so logits are made for a chunk
of scored tokens at a time, and made again in the backward pass.

Shapes: `B` batch, `T` time, `H` hidden, `V` vocabulary, `N` scored tokens. Losses are in nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tenfold.capabilities import TokenBatch
from tenfold.lm.batching import scored_positions

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: 128 MB in fp32 for a vocabulary of 32,000."""


def token_nll(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    chunk: int = CHUNK_TOKENS,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `targets` under `softmax(hidden · head_weightᵀ + bias)`, entry by entry.

    Nothing is shifted: entry `(b, t)` compares `hidden[b, t]` with `targets[b, t]`; see
    `shifted_token_nll`. Equals the unchunked loss, gradients included.

    Args:
        hidden: `[B, T, H]` inputs of the head.
        head_weight: `[V, H]`.
        targets: `[B, T]` int64.
        mask: `[B, T]`, non-zero where there is a loss; others are 0 and cost nothing.
        chunk: scored tokens whose logits exist at once; 0 takes all together.
        bias: `[V]`, for heads that have one.

    Returns:
        `[B, T]` nats in fp32 (fp64 for fp64 inputs).
    """
    keep = mask.bool()
    rows = hidden[keep]
    labels = targets[keep]
    size = chunk if chunk > 0 else max(1, rows.shape[0])
    if rows.shape[0] <= size:
        values = _chunk_nll(rows, head_weight, bias, labels)
    else:
        values = torch.cat(
            [
                _recomputed(rows[i : i + size], head_weight, bias, labels[i : i + size])
                for i in range(0, rows.shape[0], size)
            ]
        )
    return torch.zeros(keep.shape, dtype=values.dtype, device=hidden.device).masked_scatter(
        keep, values
    )


def _recomputed(rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """A chunk's losses; its logits are dropped and made again in the backward pass."""
    if not torch.is_grad_enabled():
        return _chunk_nll(rows, weight, bias, labels)
    return checkpoint(
        _chunk_nll, rows, weight, bias, labels, use_reentrant=False, preserve_rng_state=False
    )


def _chunk_nll(rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(widened(F.linear(rows, weight, bias)), labels, reduction="none")


def widened(logits: Tensor) -> Tensor:
    """Logits in at least fp32: sums of exponentials lose too much in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def shifted_token_nll(
    hidden: Tensor,
    head_weight: Tensor,
    batch: TokenBatch,
    chunk: int = CHUNK_TOKENS,
    bias: Tensor | None = None,
) -> Tensor:
    """`token_nll` of a batch's own next tokens: `[B, T]`, entry t is `-log p(x_t | x_<t)`."""
    scored = scored_positions(batch)
    losses = token_nll(
        hidden[:, :-1], head_weight, batch.input_ids[:, 1:], scored[:, 1:], chunk, bias
    )
    return F.pad(losses, (1, 0))


def shifted_nll(logits: Tensor, batch: TokenBatch, chunk: int = CHUNK_TOKENS) -> Tensor:
    """The same from logits `[B, T, V]` that exist already (heads that are not one matrix).

    Only `chunk` rows at a time are widened to fp32. Returns `[B, T]` nats, 0 where not scored.
    """
    scored = scored_positions(batch)[:, 1:]
    rows = logits[:, :-1][scored]
    labels = batch.input_ids[:, 1:][scored]
    size = chunk if chunk > 0 else max(1, rows.shape[0])
    parts = [
        F.cross_entropy(widened(rows[i : i + size]), labels[i : i + size], reduction="none")
        for i in range(0, rows.shape[0], size)
    ]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values = torch.cat(parts) if parts else widened(rows).sum(-1)
    losses = torch.zeros(scored.shape, dtype=dtype, device=logits.device)
    return F.pad(losses.masked_scatter(scored, values), (1, 0))
