"""CALM decoding: a token leaves at the first exit that is confident enough.

**Approximate.** The text is not a sample of the dense model: an early head speaks instead of
the last one, and later tokens see propagated keys and values (`propagation`). Only a threshold
of 1 or more, which no measure exceeds, gives the dense model's own text.

Prompts are read at full depth, and their next token comes from the last head. After that one
token per row is read: segment by segment, until an exit's confidence is above the threshold.
Its state then waits in the cache, as a deferred token of an N-vium does; when a later token
needs the segment, all that waits there is filled by one batched projection. Tokens above the
last deep one are never filled. Layers, cache and blocks are those of the N-vium decoder.

Shapes: `b` rows of a step, `n` tokens of a block, `H` hidden, `V` vocabulary, `K` exits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tenfold.errors import ConfigError, RunFailed
from torch import Tensor

from tenfold_nvium.baselines.confidence import MEASURES, saturation, top_confidence
from tenfold_nvium.baselines.configuration import check_choice
from tenfold_nvium.baselines.loop import (
    ExitDecoded,
    Writer,
    own_log_probs,
    synchronized,
)
from tenfold_nvium.baselines.modeling import CalmForCausalLM
from tenfold_nvium.baselines.propagation import Propagator
from tenfold_nvium.block import Block
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.cascade import embed, in_row_order, where_rows
from tenfold_nvium.decode import Stop, checked_limits
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.noise import PositionNoise
from tenfold_nvium.runner_cache import packed_runner
from tenfold_nvium.sampling import Warp, draw
from tenfold_nvium.trace import DecodeTrace


@dataclass(slots=True)
class CalmTrace(DecodeTrace):
    """`DecodeTrace` of CALM.

    Attributes:
        fills: how often each segment's skipped positions were filled by projection.
        filled: positions filled per segment.
    """

    fills: list[int] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        DecodeTrace.__post_init__(self)
        self.fills, self.filled = [0] * len(self.depths), [0] * len(self.depths)

    def summary(self) -> dict[str, Any]:
        """Totals as JSON values."""
        totals = DecodeTrace.summary(self)
        return {**totals, "approximate": True, "fills": self.fills, "filled": self.filled}


@dataclass(slots=True)
class _Step:
    """Where a step's rows left: `exits [b]`, `scores [b, V]`, `widths [b, K]`."""

    exits: np.ndarray
    scores: Tensor
    widths: np.ndarray


class CalmDecoder:
    """Generates from a CALM model; see the module for what is approximate.

    It keeps packed copies of weights: make a new one after they change.

    Args:
        model: the model, in evaluation mode.
        threshold: a token leaves where its confidence is above it; from 1 on none leaves early.
        measure: one of `MEASURES`.
        warp: temperature and truncation of the distribution that a token is drawn from.
        packed: use packed layers; False runs the model's own modules.

    Raises:
        ConfigError: another model, an unknown measure, a negative threshold.
    """

    def __init__(
        self,
        model: CalmForCausalLM,
        threshold: float = 0.9,
        *,
        measure: str = "margin",
        warp: Warp | None = None,
        packed: bool = True,
    ) -> None:
        check_settings(model, threshold, measure)
        self.model: Any = model
        self.threshold, self.measure, self.warp = threshold, measure, warp or Warp()
        self._runner = packed_runner(self.model) if packed else SegmentRunner(self.model)
        early = range(1, model.num_exits)
        self._fillers = {m: Propagator(model, m) for m in early} if threshold < 1 else {}

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        eos_ids: Sequence[int] = (),
        stop: Stop | None = None,
        log_probs: bool = False,
    ) -> ExitDecoded:
        """Continues every prompt by at most `max_new_tokens` tokens (one number, or one each).

        Arguments as in `PiggybackDecoder.generate`; a seed gives the random numbers that a
        dense model draws with there. `log_probs` are those of the exit's own unwarped head.

        Raises:
            ConfigError: an empty prompt, or a text longer than the model's context.
        """
        limits = checked_limits(self.model.config, prompts, max_new_tokens)
        seeds = list(range(len(prompts))) if seeds is None else seeds
        noise = [PositionNoise(seed, 1) for seed in seeds]
        trace = CalmTrace(self.model.config.depths)
        writer = Writer(limits, eos_ids, stop, trace)
        cache = NviumCache(self.model.config, len(prompts))
        feed = [list(prompt) for prompt in prompts]
        active = np.flatnonzero(np.asarray(limits) > 0)
        began, first = time.perf_counter(), None
        while active.size:
            start = time.perf_counter()
            step = self._step(cache, active, [feed[r] for r in active], first is None, trace)
            positions = cache.lengths[active] - 1
            uniforms = [noise[r].at(int(p))[1] for r, p in zip(active, positions, strict=True)]
            drawn, scores = draw(step.scores, self.warp, uniforms)
            own = own_log_probs(step.scores, drawn) if log_probs else [None] * len(active)
            tokens, values, going = drawn.tolist(), scores.tolist(), []
            for i, r in enumerate(active.tolist()):
                k = int(step.exits[i])
                goes_on = writer.write(
                    r, tokens[i], values[i], k, int(positions[i]), step.widths[i, : k + 1].tolist(),
                    start, own[i],
                )  # fmt: skip
                feed[r] = [tokens[i]]
                if goes_on:
                    going.append(r)
            active = np.asarray(going, dtype=np.int64)
            if first is None:
                first = time.perf_counter()
                trace.prefill_s = first - began
        if first is not None:
            trace.decode_s = synchronized(self.model.device) - first
        return ExitDecoded(writer.rows, trace)

    @torch.inference_mode()
    def log_probs(
        self, prompt: Sequence[int], text: Sequence[int]
    ) -> tuple[list[float], list[int]]:
        """Log-probability of each token of `text` after `prompt`, in the way CALM writes it,
        and its exit (0-based): every token from the (unwarped) head it leaves at, with
        propagated keys and values before it. One step per token; the only right measure of
        CALM's quality at a threshold.

        Raises:
            ConfigError: an empty prompt, or a text longer than the model's context.
        """
        checked_limits(self.model.config, [prompt], len(text))
        cache, row = NviumCache(self.model.config, 1), np.array([0])
        trace, values, exits, feed = CalmTrace(self.model.config.depths), [], [], list(prompt)
        for i, token in enumerate(text):
            step = self._step(cache, row, [feed], i == 0, trace)
            values += own_log_probs(step.scores, torch.tensor([token], device=step.scores.device))
            exits.append(int(step.exits[0]))
            feed = [token]
        return values, exits

    @torch.inference_mode()
    def _step(
        self,
        cache: NviumCache,
        rows: np.ndarray,
        feed: Sequence[Sequence[int]],
        deep: bool,
        trace: CalmTrace,
    ) -> _Step:
        """Reads the rows' new tokens (`feed`); where each row's newest one leaves. `deep`
        reads all layers and leaves at the last exit."""
        embed(self.model, cache, rows, feed)
        fresh, last = np.array([len(tokens) for tokens in feed]), self.model.num_exits - 1
        exits, widths = np.full(len(rows), -1), np.zeros((len(rows), last + 1), dtype=np.int64)
        parts: list[tuple[np.ndarray, Tensor]] = []
        here = np.arange(len(rows))
        before = None
        if self.measure == "saturation":
            newest = torch.tensor([tokens[-1] for tokens in feed], device=self.model.device)
            before = self.model.model.embed_tokens(newest)
        for k in range(last + 1):
            states, widths[here, k] = self._segment(cache, k, rows[here], fresh[here], trace)
            trace.launches[k] += 0 if deep else 1
            if deep and k < last:
                continue
            leaving, scores = self._visit(k, states, before)
            if scores is not None:
                parts.append((here[leaving], scores))
                exits[here[leaving]] = k
            if leaving.all():
                break
            if leaving.any():
                stay = torch.from_numpy(np.flatnonzero(~leaving)).to(states.device)
                states, here = states[stay], here[~leaving]
            before = states if self.measure == "saturation" else None
        return _Step(exits, in_row_order(parts), widths)

    def _segment(
        self, cache: NviumCache, k: int, rows: np.ndarray, fresh: np.ndarray, trace: CalmTrace
    ) -> tuple[Tensor, np.ndarray]:
        """Fills what was skipped in segment k, runs the `fresh` newest tokens of each row, and
        returns each row's newest state `[b, H]` and the blocks' widths."""
        states, block = cache.take(k, rows)
        skipped = block.widths - fresh
        if skipped.any():
            begins = block.widths.cumsum() - block.widths
            old = np.arange(block.size) < np.repeat(begins + skipped, block.widths)
            some = skipped > 0
            past = Block(rows[some], block.starts[some], skipped[some], cache.rows, states.device)
            waiting, states = where_rows(states, old), where_rows(states, ~old)
            self._fillers[k].fill(waiting, past, cache)
            trace.fills[k] += 1
            trace.filled[k] += past.size
            if k + 1 < cache.segments:
                cache.push(k + 1, past.row_of, waiting)
            block = Block(rows, block.starts + skipped, fresh, cache.rows, states.device)
        states = self._runner.run(k, states, block, cache)
        if k + 1 < cache.segments:
            cache.push(k + 1, block.row_of, states)
        newest = states if block.size == len(rows) else states[block.ends]
        return newest, block.widths

    def confidence(
        self, k: int, states: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Confidence `[b]` of the states `[b, H]` at early exit k (0-based), and their logits
        `[b, V]` where it needed them; a row leaves where it is above the threshold. `before`
        holds the states one exit earlier, for `saturation`. Timings along chosen exit patterns
        override this."""
        if before is not None:
            return saturation(states, before), None
        logits = self._logits(k, states)
        return top_confidence(logits, self.measure), logits

    def _logits(self, k: int, states: Tensor) -> Tensor:
        """Head k's logits `[b, V]` on residual streams `[b, H]`."""
        return self._runner.exits[k].logits(states)

    def _visit(
        self, k: int, states: Tensor, before: Tensor | None
    ) -> tuple[np.ndarray, Tensor | None]:
        """Which rows leave at exit k, and their logits."""
        everyone = np.ones(states.shape[0], dtype=bool)
        if k == self.model.num_exits - 1:
            return everyone, self._logits(k, states)
        if self.threshold >= 1:
            return ~everyone, None
        sure, logits = self.confidence(k, states, before)
        confidence = sure.double().cpu().numpy()
        if np.isnan(confidence).any():
            raise RunFailed(f"the confidence at exit {k + 1} is NaN; the weights are broken")
        leaving = confidence > self.threshold
        if not leaving.any():
            return leaving, None
        if logits is None:
            return leaving, self._logits(k, where_rows(states, leaving))
        return leaving, where_rows(logits, leaving)


def check_settings(model: Any, threshold: float, measure: str) -> None:
    """Raises ConfigError for another model, an unknown measure, or a negative threshold."""
    if not isinstance(model, CalmForCausalLM):
        raise ConfigError(
            f"CALM decodes a model whose exits were trained for it, a CalmForCausalLM; "
            f"this is a {type(model).__name__}"
        )
    check_choice("measure", measure, MEASURES)
    if not threshold >= 0:
        raise ConfigError(
            f"threshold is {threshold}; it must be 0 or more (1 or more: always full depth)"
        )
