"""Blocks of training rows: which tokens are anchors, what their slots see and should say.

A block begins at an anchor `a`; slot `k` stands at position `a + k`. All blocks of a row run side
by side: slots see the target features strictly before their anchor (its own do not exist yet
when it is drafted behind) and all slots of their block, nothing else.

Shapes: `B` rows, `S` tokens, `N` anchors per row, `T` slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tenfold.lm.packing import IGNORED
from tenfold.seeds import derive
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a batch.

    Attributes:
        anchors: `[B, N]` position of each block's first token.
        tokens: `[B, N, T]` tokens at the slots' positions (0 beyond the row).
        scored: `[B, N, T]` bool: slots whose token is supervised, along with all before them;
            never slot 0.
    """

    anchors: Tensor
    tokens: Tensor
    scored: Tensor

    @property
    def positions(self) -> Tensor:
        """`[B, N, T]` positions of the slots."""
        size = self.tokens.shape[-1]
        return self.anchors[..., None] + torch.arange(size, device=self.anchors.device)

    def mask(self, length: int) -> Tensor:
        """`[B, 1, N T, S + N T]` bool: what each slot looks at."""
        rows, count, size = self.tokens.shape
        device = self.anchors.device
        keys = torch.arange(length, device=device)
        context = keys < self.anchors[..., None]  # [B, N, S]
        context = context[:, :, None].expand(-1, -1, size, -1).reshape(rows, count * size, length)
        block = torch.arange(count * size, device=device) // size
        own = (block[:, None] == block[None]).expand(rows, -1, -1)
        return torch.cat([context, own], dim=-1)[:, None]


def starts(labels: Tensor) -> Tensor:
    """`[S]` bool: positions that a block may begin at: the token after them is supervised, and
    there is a token before them."""
    usable = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    usable[1:-1] = labels[2:] != IGNORED
    return usable


def sample_anchors(labels: Tensor, count: int, seed: int) -> Tensor:
    """`[count]` different positions of one row, random but a function of the seed; -1 where the
    row has fewer."""
    usable = starts(labels).nonzero()[:, 0].cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = usable[torch.randperm(len(usable), generator=generator)[:count]].sort().values
    missing = torch.full((count - len(chosen),), -1, dtype=chosen.dtype)
    return torch.cat([chosen, missing])


def make_blocks(ids: Tensor, labels: Tensor, count: int, size: int, seeds: list[int]) -> Blocks:
    """Blocks of a batch `ids, labels [B, S]`, anchors of each row by its own seed."""
    rows = [
        sample_anchors(row, count, derive(seed, "anchors"))
        for row, seed in zip(labels, seeds, strict=True)
    ]
    return blocks_at(ids, labels, torch.stack(rows).to(ids.device), size)


def blocks_at(ids: Tensor, labels: Tensor, anchors: Tensor, size: int) -> Blocks:
    """Blocks of `size` slots at given `anchors [B, N]` (-1: none) of a batch `[B, S]`."""
    present = anchors >= 0
    anchors = anchors.clamp_min(0)
    length = ids.shape[1]
    positions = anchors[..., None] + torch.arange(size, device=ids.device)
    inside = (positions < length) & present[..., None]
    flat = positions.clamp_max(length - 1).flatten(1)
    tokens = ids.gather(1, flat).view_as(positions) * inside
    supervised = (labels.gather(1, flat).view_as(positions) != IGNORED) & inside
    supervised[..., 0] = present
    scored = supervised.long().cumprod(-1).bool()
    scored[..., 0] = False
    return Blocks(anchors, tokens, scored)
