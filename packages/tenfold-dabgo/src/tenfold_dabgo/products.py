"""Inner products of per-sample gradients with many directions, layer by layer.

For a linear map, `<G_i, V_q>` with `G_i = sum_t d_it a_it^T` [O, I] can be had in two ways:

    formed       G_i by one product, then all directions at once      2 O I (R + Q)      FLOPs
    factorised   sum_t d_it . (V_q a_it), never forming G_i           2 O I R Q + 2 R O Q

per sample with R rows and Q directions. The cheaper one is taken. `formed` goes over blocks of
output rows through one buffer, so that its memory is bounded whatever the weight's size, and the
block is still in the cache when the directions meet it. Directions lie one after the other, so
that each is written and read in one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUFFER_BYTES = 8 * 2**20
"""Size of the buffer for blocks of G; larger ones leave the cache, smaller ones cost calls."""
MIN_BLOCK = 16
"""Fewest output rows in a block: thinner products run far below full speed."""


def use_products(kind: str, a: Tensor | None, delta: Tensor, directions: Tensor) -> Tensor:
    """`<G_i, V_q>` of one use of a weight, `[B, Q]`.

    Args:
        kind: as in `capture.Use`, with one row of `a` and `delta` per sample and position.
        a: `[B, R, I]` (ids `[B, R]` for `gather`, None for `shift`).
        delta: `[B, R, O]`.
        directions: `[Q, *shape]`, the weight's part of every direction.
    """
    if kind == "shift":
        return delta.sum(dim=1) @ directions.flatten(1).T
    assert a is not None
    if kind == "scale":
        return (delta * a).sum(dim=1) @ directions.flatten(1).T
    if kind == "gather":
        return _lookups(a, delta, directions)
    left, right = (delta, a) if kind == "outer" else (a, delta)
    if factorised_is_cheaper(left.shape[1], left.shape[2], right.shape[2], len(directions)):
        return _factorised(left, right, directions)
    return _formed(left, right, directions)


def factorised_is_cheaper(rows: int, first: int, second: int, queries: int) -> bool:
    """Whether fewer FLOPs are needed without forming G `[first, second]`."""
    formed = first * second * (rows + queries)
    return first * second * rows * queries + rows * first * queries < formed


def _formed(left: Tensor, right: Tensor, directions: Tensor) -> Tensor:
    """`sum_oi (sum_r left_ro right_ri) V_qoi` block by block over o."""
    samples, _, first = left.shape
    second = right.shape[2]
    out = left.new_zeros((samples, len(directions)))
    size = BUFFER_BYTES // (samples * second * left.element_size())
    size = min(max(size, MIN_BLOCK), first)
    buffer = left.new_empty(samples * size * second)
    left = left.transpose(1, 2)
    for start in range(0, first, size):
        part = left[:, start : start + size]
        block = buffer[: samples * part.shape[1] * second].view(samples, part.shape[1], second)
        torch.bmm(part, right, out=block)
        out.addmm_(block.view(samples, -1), directions[:, start : start + size].flatten(1).T)
    return out


def _factorised(left: Tensor, right: Tensor, directions: Tensor) -> Tensor:
    """`sum_ro left_ro (sum_i V_qoi right_ri)`, sample by sample to bound memory."""
    queries, first, second = directions.shape
    matrix = directions.view(queries * first, second).T
    out = [
        torch.einsum("ro,rqo->q", one, (other @ matrix).view(-1, queries, first))
        for one, other in zip(left, right, strict=True)
    ]
    return torch.stack(out)


def _lookups(ids: Tensor, delta: Tensor, directions: Tensor) -> Tensor:
    """`sum_r d_r . V[id_r]` without a gradient of the table's size; ids < 0 do not count."""
    out = []
    for row, gradient in zip(ids, delta, strict=True):
        used = row >= 0
        found = directions[:, row[used]].flatten(1)
        out.append(found @ gradient[used].flatten())
    return torch.stack(out)
