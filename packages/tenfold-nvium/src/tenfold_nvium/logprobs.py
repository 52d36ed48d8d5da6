"""Exact mixture log-probabilities of generated text, from work that is done anyway.

A token that left early was drawn from one head; its `log p_mix` needs the heads above. When its
deferred state later passes those exits, the recorder keeps it, and in the end one pass over
heads and routers (no decoder layer) completes the sum. Shapes: `n` tokens, `H`, `K`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenfold_nvium.block import Block
from tenfold_nvium.mixture import exit_log_probs, mixture_log_prob

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM


class ExitRecorder:
    """Observer of the cascade that keeps the residual streams at every exit.

    Args:
        first: per row the first position whose prediction is of interest.
        num_exits: number of exits K.
    """

    def __init__(self, first: Sequence[int], num_exits: int) -> None:
        self._first = list(first)
        self._states: list[list[list[Tensor]]] = [[[] for _ in range(num_exits)] for _ in first]

    def __call__(self, exit_index: int, block: Block, states: Tensor) -> None:
        """A block's positions reached an exit with `states [n, H]`."""
        begin = 0
        for row, start, width in zip(block.rows, block.starts, block.widths, strict=True):
            skip = max(0, self._first[row] - start)
            if skip < width:
                self._states[row][exit_index].append(states[begin + skip : begin + width])
            begin += width

    def complete(self, row: int) -> int:
        """Number of positions, from the first, that have passed all exits."""
        return min(sum(s.shape[0] for s in states) for states in self._states[row])

    @torch.no_grad()
    def log_probs(self, model: NviumForCausalLM, row: int, tokens: Sequence[int]) -> Tensor:
        """`log p_mix` of a row's generated tokens, `[n]` in fp32 or wider; `n` is limited by
        `complete` (flush the cache first to have them all)."""
        count = min(self.complete(row), len(tokens))
        states = [torch.cat(s)[:count][None] for s in self._states[row]] if count else []
        if not count:
            return torch.zeros(0)
        inputs, gates = model.exit_views(states)
        targets = torch.tensor(list(tokens[:count]), device=gates.device)[None]
        heads = model.target_head_log_probs(inputs, targets)
        return mixture_log_prob(exit_log_probs(gates), heads)[0]
