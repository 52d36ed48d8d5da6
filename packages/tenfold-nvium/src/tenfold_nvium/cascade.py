"""Running segments with deferral: the exact accelerated decoding step (paper "Decoding").

All work goes through one operation: `run_segment(m)` takes *everything* that waits for segment
m in the given rows, runs it as one block in position order, and leaves the results waiting for
segment m + 1. A token that leaves at exit k simply is not taken further; its state, and those
of older tokens it carried along, wait in the cache. So a segment always receives a gap-free
block that starts at its frontier: every key a query may look at is there, and nothing is
approximated.

Shapes: `b` rows of the step, `n` tokens of a block, `H` hidden, `V` vocabulary, `K` exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tenfold.errors import RunFailed
from torch import Tensor, nn

from tenfold_nvium.block import FIRST_ROW, Block
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.exit_runners import ExitRunner
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.mixture import in_full_precision
from tenfold_nvium.policies import ExitPolicy, log_sigmoid

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM

_ROUNDING = 1e-6
"""Slack of the certificate for fp32 sums of probabilities."""

Observer = Callable[[int, Block, Tensor], None]
"""Called as `(exit index, block, states [n, H])` whenever positions reach an exit, the last one
included."""


@dataclass(slots=True)
class Choice:
    """Where rows left, and the scores to draw their next tokens from.

    Attributes:
        exits: `[b]` 0-based exit per row.
        scores: `[b, V]`: the chosen head's logits, or log mixture probabilities (up to the
            undecided rest, for a certified arg-max).
        log_odds: `[b, K-1]` router log-odds, NaN where a router was not visited.
        widths: `[b, K]` width of the row's block in each visited segment, 0 where none.
    """

    exits: np.ndarray
    scores: Tensor
    log_odds: np.ndarray
    widths: np.ndarray


def embed(
    model: NviumForCausalLM, cache: NviumCache, rows: np.ndarray, tokens: Sequence[Sequence[int]]
) -> None:
    """Lets new tokens (`tokens[i]` for cache row `rows[i]`) wait for the first segment."""
    table = model.model.embed_tokens
    row_of = np.repeat(rows, [len(row) for row in tokens])
    with torch.inference_mode():
        if len(row_of) == 1 and type(table) is nn.Embedding:
            states = table.weight.select(0, tokens[0][0])[None]
        else:
            flat = torch.tensor([t for row in tokens for t in row], device=table.weight.device)
            states = table(flat)
        cache.push(0, row_of, states)


def run_segment(
    runner: SegmentRunner,
    cache: NviumCache,
    segment: int,
    rows: np.ndarray,
    observer: Observer | None = None,
) -> tuple[Tensor, Block]:
    """Runs all that waits for a segment in `rows` (ascending; each must have something).

    Returns the residual streams `[n, H]` after the segment, and their block. They are also
    left waiting for the next segment.
    """
    states, block = cache.take(segment, rows)
    states = runner.run(segment, states, block, cache)
    if observer is not None:
        observer(segment, block, states)
    if segment + 1 < cache.segments:
        cache.push(segment + 1, block.row_of, states)
    return states, block


@torch.inference_mode()
def flush(
    runner: SegmentRunner,
    cache: NviumCache,
    rows: Iterable[int],
    observer: Observer | None = None,
) -> None:
    """Runs everything that waits anywhere in `rows`, in one ascending pass."""
    chosen = np.asarray(sorted(rows), dtype=np.int64)
    for segment in range(cache.segments):
        busy = chosen[cache.waiting_counts(segment)[chosen] > 0]
        if busy.size:
            run_segment(runner, cache, segment, busy, observer)


@torch.inference_mode()
def cascade(
    model: NviumForCausalLM,
    runner: SegmentRunner,
    cache: NviumCache,
    rows: np.ndarray,
    policy: ExitPolicy,
    uniforms: np.ndarray,
    *,
    deep: bool = False,
    observer: Observer | None = None,
) -> Choice:
    """Takes the newest tokens of `rows` (ascending; waiting for segment 0) to their exits.

    Args:
        uniforms: `[b, K-1]` numbers in [0, 1), one per row and early exit.
        deep: run all segments whatever the exits are (prompts); nothing is deferred then, and
            the exit of each row's last position is chosen all the same.

    Raises:
        RunFailed: a router gave NaN.
    """
    if cache.rows == 1 and not (deep or policy.mixes):
        return _solo(runner, cache, policy, uniforms[0], observer)
    step = _Step(runner.exits, policy, uniforms, len(rows))
    undecided = everyone = np.arange(len(rows))
    for k in range(cache.segments):
        running = everyone if deep else undecided
        states, block = run_segment(runner, cache, k, rows[running], observer)
        last = states if block.size == len(running) else states[block.ends]
        if deep and len(undecided) < len(running):
            last = last[torch.from_numpy(undecided).to(last.device)]
            step.widths[undecided, k] = block.widths[undecided]
        else:
            step.widths[undecided, k] = block.widths
        if undecided.size:
            undecided = step.visit(k, undecided, last)
        if not undecided.size and not deep:
            break
    return step.choice()


def _solo(
    runner: SegmentRunner,
    cache: NviumCache,
    policy: ExitPolicy,
    uniforms: np.ndarray,
    observer: Observer | None,
) -> Choice:
    """The step of a cache with one row, in plain numbers: on small models arrays of one element
    cost as much as a layer."""
    last = cache.segments - 1
    odds, widths, k = [math.nan] * last, [0] * cache.segments, 0
    while True:
        states, block = run_segment(runner, cache, k, FIRST_ROW, observer)
        widths[k] = block.width
        at_exit = runner.exits[k]
        newest = states if block.width == 1 else states[-1:]
        if k == last:
            break
        odds[k] = float(at_exit.log_odds(newest)[0])
        if math.isnan(odds[k]):
            raise broken_router(k)
        if policy.leaves_one(k, odds[k], float(uniforms[k])):
            break
        k += 1
    scores = at_exit.logits(newest)
    return Choice(np.array([k]), scores, np.array([odds]), np.array([widths]))


def broken_router(k: int) -> RunFailed:
    """The error of a router that answers NaN."""
    return RunFailed(f"the router of exit {k + 1} gave NaN; the weights are broken")


class _Step:
    """Bookkeeping of one step: visited gates, accumulated mixture, who left where."""

    def __init__(
        self, runners: Sequence[ExitRunner], policy: ExitPolicy, uniforms: np.ndarray, rows: int
    ) -> None:
        self.runners, self.policy, self.uniforms = runners, policy, uniforms
        early = len(runners) - 1
        self.exits = np.full(rows, -1)
        self.log_odds = np.full((rows, early), np.nan)
        self.widths = np.zeros((rows, early + 1), dtype=np.int64)
        self.reach = np.zeros(rows)
        """Log-probability of getting this far."""
        self._parts: list[tuple[np.ndarray, Tensor]] = []
        self._mixed: Tensor | None = None

    def visit(self, k: int, rows: np.ndarray, states: Tensor) -> np.ndarray:
        """Rows (indices of the step) arrive at exit k with `states [len(rows), H]`; those that
        go on are returned."""
        runner = self.runners[k]
        odds = None
        if k + 1 < len(self.runners):
            odds = runner.log_odds(states)
            if np.isnan(odds).any():
                raise broken_router(k)
            self.log_odds[rows, k] = odds
        if self.policy.mixes:
            leaving, scores = self._mix(k, rows, states, odds)
        else:
            leaving = np.ones(len(rows), dtype=bool)
            if odds is not None:
                leaving = self.policy.leaves(k, odds, self.uniforms[rows, k])
            scores = None
            if leaving.any():
                scores = runner.logits(where_rows(states, leaving))
        if scores is not None:
            self._parts.append((rows[leaving], scores))
            self.exits[rows[leaving]] = k
        return rows[~leaving]

    def _mix(
        self, k: int, rows: np.ndarray, states: Tensor, odds: np.ndarray | None
    ) -> tuple[np.ndarray, Tensor | None]:
        """Adds head k's share to the rows' mixtures; which of them are decided, and their
        scores. `self._mixed` holds one line per row still on its way."""
        share = self.reach[rows] + (log_sigmoid(odds) if odds is not None else 0.0)
        heads = in_full_precision(self.runners[k].logits(states)).log_softmax(-1)
        part = heads + torch.from_numpy(share).to(heads)[:, None]
        mixed = part if self._mixed is None else torch.logaddexp(self._mixed, part)
        if odds is None:
            return np.ones(len(rows), dtype=bool), mixed
        self.reach[rows] += log_sigmoid(-odds)
        decided = np.zeros(len(rows), dtype=bool)
        if self.policy.certifies:
            # top1(M) - top2(M) > R: the rest of the mixture cannot change the arg-max.
            top = mixed.topk(2).values.double().exp().cpu().numpy()
            decided = top[:, 0] - top[:, 1] > np.exp(self.reach[rows]) + _ROUNDING
        self._mixed = where_rows(mixed, ~decided)
        return decided, where_rows(mixed, decided) if decided.any() else None

    def choice(self) -> Choice:
        """The finished step, rows in their order."""
        return Choice(self.exits, in_row_order(self._parts), self.log_odds, self.widths)


def in_row_order(parts: Sequence[tuple[np.ndarray, Tensor]]) -> Tensor:
    """One line per row, ascending, from parts of `(rows [n], lines [n, ...])`."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    joined = torch.cat([part for _, part in parts])
    return joined[torch.from_numpy(order).to(joined.device)]


def where_rows(values: Tensor, chosen: np.ndarray) -> Tensor:
    """Rows of `values` where `chosen` is true."""
    if chosen.all():
        return values
    return values[torch.from_numpy(np.flatnonzero(chosen)).to(values.device)]
