"""Exact accelerated decoding with deferral and piggybacking (paper "Decoding").

`PiggybackDecoder.generate` draws texts from the model's own mixture while running, per token,
only the layers below the sampled exit; skipped layers run later, as part of a batch that a
deeper token needs anyway. Rows of a batch may have different lengths and different frontiers;
one row's text never depends on another's. `recompute` is the reference: no cache, all layers,
same random numbers, same text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_nvium.cache import NviumCache
from tenfold_nvium.cascade import Choice, cascade, embed, flush
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.logprobs import ExitRecorder
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.noise import Noise, PositionNoise
from tenfold_nvium.policies import ExitPolicy, check_policy, make_policy
from tenfold_nvium.runner_cache import packed_runner
from tenfold_nvium.sampling import Warp, draw
from tenfold_nvium.trace import DecodeTrace, TokenTrace

Stop = Callable[[int, list[int]], str]
"""`stop(row, tokens so far) -> reason`: ends a row after the newest token, for a reason such as
`stop`; an empty string lets it go on."""


@dataclass(slots=True)
class DecodedRow:
    """One row's text.

    Attributes:
        tokens: generated ids, a final end-of-sequence token included.
        exits: per token its exit, 0-based.
        scores: log-probability of each token under the (warped) distribution it was drawn
            from, which for an early exit is one head's.
        finish_reason: `eos`, `length`, or what `Stop` answered.
        log_probs: exact mixture log-probabilities, when asked for.
    """

    tokens: list[int] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    finish_reason: str = "length"
    log_probs: list[float] | None = None


@dataclass(slots=True)
class Decoded:
    """Result of `PiggybackDecoder.generate`: rows, the cache with its deferred states, and the
    trace. The cache holds all tokens but each row's last one, which was drawn and not yet
    read; begin the next call's prompt with it."""

    rows: list[DecodedRow]
    cache: NviumCache
    trace: DecodeTrace


class Decodes(Protocol):
    """What `PiggybackDecoder`, `CalmDecoder` and `LayerSkipDecoder` have in common."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        eos_ids: Sequence[int] = (),
        stop: Stop | None = None,
        log_probs: bool = False,
    ) -> Any:
        """A result with `rows` (of `DecodedRow`) and `trace` (a `DecodeTrace`)."""
        ...


class PiggybackDecoder:
    """Generates from an N-vium model.

    It decodes from packed copies of the weights: make a new one after the weights change. The
    copies are shared by all decoders of a model (`runner_cache`).

    Args:
        model: the model, in evaluation mode.
        policy: an `ExitPolicy` or its name; the default samples the mixture exactly.
        warp: temperature and truncation of the chosen distribution; with a head policy they
            apply to the chosen head, with `FullDepth` to the whole mixture.
        max_deferred: most positions a row may defer; bounds memory, block width and jitter,
            never changes the text. None takes the model's setting.
        packed: use packed layers; False runs the model's own modules (no copy of weights).
    """

    def __init__(
        self,
        model: NviumForCausalLM,
        policy: str | ExitPolicy = "sample",
        *,
        warp: Warp | None = None,
        max_deferred: int | None = None,
        packed: bool = True,
    ) -> None:
        self.model = model
        self.policy = make_policy(policy)
        self.warp = warp or Warp()
        limit = max_deferred if max_deferred is not None else model.config.max_deferred
        if limit is not None and limit < 1:
            raise ConfigError(f"max_deferred is {limit}; None or at least 1")
        self.max_deferred = limit
        self._runner = packed_runner(model) if packed else SegmentRunner(model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        noise: Sequence[Noise] | None = None,
        eos_ids: Sequence[int] = (),
        stop: Stop | None = None,
        cache: NviumCache | None = None,
        log_probs: bool = False,
    ) -> Decoded:
        """Continues every prompt by at most `max_new_tokens` tokens (one number, or one each).

        Args:
            prompts: token ids per row, at least one each; with a `cache`, what follows it.
            seeds: one per row (default 0, 1, ...); the same seed gives the same text.
            noise: sources of random numbers instead of seeds.
            eos_ids: ids that end a row.
            stop: see `Stop`.
            cache: a cache of an earlier call, deferred states included; it is continued.
            log_probs: complete deferred work at the end and return exact mixture
                log-probabilities.

        Raises:
            ConfigError: an empty prompt, a text longer than the model's context, or a policy
                that does not go with the warping or the model.
        """
        exits = self.model.num_exits
        check_policy(self.policy, exits)
        if self.policy.certifies and self.warp.temperature != 0:
            raise ConfigError(
                "certified decoding proves the mixture's arg-max, which sampling does not take",
                hint="set temperature to 0, or use the policy sample or auto",
            )
        if cache is None:
            cache = NviumCache(self.model.config)
        cache.check_model(self.model.config)
        cache.open_rows(len(prompts))
        limits = checked_limits(self.model.config, prompts, max_new_tokens, cache.lengths)
        count = len(prompts)
        for name, given in (("seeds", seeds), ("noise", noise)):
            if given is not None and len(given) != count:
                raise ConfigError(f"{len(given)} {name} for {count} prompts; one each")
        if noise is None:
            seeds = list(range(count)) if seeds is None else seeds
            noise = [PositionNoise(seed, exits) for seed in seeds]
        last = [int(n) + len(p) - 1 for n, p in zip(cache.lengths, prompts, strict=True)]
        recorder = ExitRecorder(last, exits) if log_probs else None
        run = _Run(prompts, DecodeTrace(self.model.config.depths), limits, eos_ids, stop)
        while run.active.size:
            start, deep = time.perf_counter(), run.reads_prompts
            choice, tokens, scores = self._step(cache, run, noise, recorder)
            flushed = self._limit(cache, run.active, recorder)
            run.add(choice, tokens, scores, cache.lengths, flushed, start, deep)
        run.finish()
        if recorder is not None:
            flush(self._runner, cache, range(count), recorder)
            for r, row in enumerate(run.rows):
                row.log_probs = recorder.log_probs(self.model, r, row.tokens).tolist()
        return Decoded(run.rows, cache, run.trace)

    def _step(
        self,
        cache: NviumCache,
        run: _Run,
        noise: Sequence[Noise],
        recorder: ExitRecorder | None,
    ) -> tuple[Choice, list[int], list[float]]:
        """Reads each active row's new tokens and draws its next one."""
        active = run.active
        embed(self.model, cache, active, [run.feed[r] for r in active])
        numbers = [noise[r].at(int(cache.lengths[r]) - 1) for r in active]
        gates = np.array([g for g, _ in numbers]).reshape(len(active), -1)
        choice = cascade(
            self.model, self._runner, cache, active, self.policy, gates,
            deep=run.reads_prompts, observer=recorder,
        )  # fmt: skip
        tokens, scores = draw(choice.scores, self.warp, [u for _, u in numbers])
        return choice, tokens.tolist(), scores.tolist()

    def _limit(
        self, cache: NviumCache, active: np.ndarray, recorder: ExitRecorder | None
    ) -> set[int]:
        """Completes rows that deferred too much; returns them."""
        if self.max_deferred is None:
            return set()
        late = active[cache.deferred()[active] > self.max_deferred]
        if late.size:
            flush(self._runner, cache, late, recorder)
        return set(late.tolist())


class _Run:
    """State of one `generate` call: rows still going, what each reads next, and the trace."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        trace: DecodeTrace,
        limits: Sequence[int],
        eos_ids: Sequence[int],
        stop: Stop | None,
    ) -> None:
        self.rows = [DecodedRow() for _ in prompts]
        self.trace, self._eos, self._stop = trace, set(eos_ids), stop
        self._limits = list(limits)
        self.active = np.flatnonzero(np.asarray(self._limits) > 0)
        self.feed = [list(prompt) for prompt in prompts]
        self._began = time.perf_counter()
        self._first: float | None = None

    @property
    def reads_prompts(self) -> bool:
        """Whether some row reads several tokens in this step; all layers run then."""
        return any(len(self.feed[r]) > 1 for r in self.active)

    def add(
        self,
        choice: Choice,
        tokens: list[int],
        scores: list[float],
        lengths: np.ndarray,
        flushed: set[int],
        start: float,
        deep: bool,
    ) -> None:
        """Records one step's tokens and drops the rows that have ended."""
        end, trace = time.perf_counter(), self.trace
        if self._first is None:
            self._first = end
        trace.flushes += len(flushed)
        if not deep:
            trace.ran(choice.widths.sum(axis=0).tolist())
        going = []
        for i, r in enumerate(self.active.tolist()):
            row, exit_index = self.rows[r], int(choice.exits[i])
            row.tokens.append(tokens[i])
            row.exits.append(exit_index)
            row.scores.append(scores[i])
            visited = exit_index + 1
            trace.tokens.append(
                TokenTrace(
                    r, int(lengths[r]) - 1, tokens[i], visited,
                    tuple(choice.log_odds[i, :visited].tolist()),
                    tuple(choice.widths[i, :visited].tolist()),
                    r in flushed, start - self._began, end - self._began,
                )
            )  # fmt: skip
            self.feed[r] = [tokens[i]]
            if not self._ends(r, row):
                going.append(r)
        self.active = np.asarray(going, dtype=np.int64)

    def _ends(self, r: int, row: DecodedRow) -> bool:
        """Whether a row ends with its newest token; notes why."""
        reason = "eos" if row.tokens[-1] in self._eos else ""
        if not reason and self._stop is not None:
            reason = self._stop(r, row.tokens)
        row.finish_reason = reason or row.finish_reason
        return bool(reason) or len(row.tokens) >= self._limits[r]

    def finish(self) -> None:
        """Closes the trace's clocks."""
        first = self._first or self._began
        self.trace.prefill_s = first - self._began
        self.trace.decode_s = time.perf_counter() - first


@torch.no_grad()
def recompute(
    model: NviumForCausalLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    noise: Noise,
    *,
    policy: str | ExitPolicy = "sample",
    warp: Warp | None = None,
    eos_ids: Sequence[int] = (),
) -> DecodedRow:
    """The reference decoder: for every token one full forward pass over the whole text, then
    the same exit decision, the same head and the same random numbers. Slow by design."""
    policy, warp, row = make_policy(policy), warp or Warp(), DecodedRow()
    text = list(prompt)
    for _ in range(max_new_tokens):
        gates, uniform = noise.at(len(text) - 1)
        output = model(
            torch.tensor([text], device=model.device), logits_to_keep=1, output_exit_logits=True
        )
        odds = output.gate_log_odds[0, -1].double().cpu().numpy()
        last = len(odds)
        scores: Tensor = output.logits[:, -1]
        chosen = last
        if not policy.mixes:
            leaves = (
                bool(policy.leaves(k, odds[k : k + 1], np.array(gates[k : k + 1]))[0])
                for k in range(last)
            )
            chosen = next((k for k, leave in enumerate(leaves) if leave), last)
            scores = output.exit_logits[:, -1, chosen]
        tokens, values = draw(scores, warp, [uniform])
        row.tokens.append(int(tokens))
        row.exits.append(chosen)
        row.scores.append(float(values))
        text.append(int(tokens))
        if int(tokens) in eos_ids:
            row.finish_reason = "eos"
            break
    return row


def checked_limits(
    config: NviumConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    cached: Sequence[int] | np.ndarray | None = None,
) -> list[int]:
    """One limit of new tokens per prompt; `cached` counts the tokens that come before each.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a text longer than the
            model's context, or limits for another number of prompts.
    """
    one = isinstance(max_new_tokens, int)
    limits = [max_new_tokens] * len(prompts) if one else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ConfigError(f"{len(limits)} limits of new tokens for {len(prompts)} prompts")
    context = config.max_position_embeddings
    for r, (prompt, new) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise ConfigError(
                f"prompt {r} is empty; give at least one token (such as the model's "
                "beginning- or end-of-text token)"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ConfigError(
                f"prompt {r} has a token outside the vocabulary of {config.vocab_size}"
            )
        before = 0 if cached is None else int(cached[r])
        # The last new token is drawn but never read, so it needs no position.
        needed = before + len(prompt) + new - 1
        if needed > context:
            raise ConfigError(
                f"prompt {r} needs {needed} positions ({before} cached + {len(prompt)} prompt + "
                f"{new} new - 1), but the model's context is {context}; shorten the prompt or "
                "max_new_tokens"
            )
    return limits
