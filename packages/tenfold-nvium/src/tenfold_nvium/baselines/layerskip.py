"""LayerSkip decoding: the first layers draft, all layers check, the text stays the model's own.

One round: the newest token and the drafted ones run through the first E layers, one by one,
each predicting the next with the final norm and head. The upper layers then run once over all
of them, starting from the states that drafting left, and their predictions decide how many
drafted tokens stand. With the N-vium's cache this is deferral: drafted positions wait for
segment 1, the check takes them as one block, and a rejection truncates the cache. Nothing is
computed twice and nothing is copied.

**Exact.** Greedy text equals the dense model's arg-max token for token (up to rounding: a block
of several tokens may round otherwise than single ones), sampled text is a sample of the dense
model under the same temperature and truncation. How well the drafts were trained decides the
speed alone, so any dense model can be decoded this way.

Rows are written one after the other: rounds of different rows have different lengths, and
speculation serves the latency of one text. Shapes: `d` drafted tokens, `V` vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_nvium.baselines.loop import (
    ExitDecoded,
    Writer,
    own_log_probs,
    synchronized,
)
from tenfold_nvium.baselines.modeling import LayerSkipForCausalLM
from tenfold_nvium.baselines.speculation import kept_prefix, verify_greedy, verify_sampled
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.cascade import run_segment
from tenfold_nvium.decode import Stop, checked_limits
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.noise import PositionNoise
from tenfold_nvium.runner_cache import packed_runner
from tenfold_nvium.sampling import Warp, draw, inverse_draw
from tenfold_nvium.trace import DecodeTrace

_ROW = np.array([0])
_KEEP, _DRAFT = 0, 1
"""Which of a position's random numbers decides about keeping its token, and draws its draft;
the token uniform draws what is not drafted."""


@dataclass(slots=True)
class SpeculativeTrace(DecodeTrace):
    """`DecodeTrace` of self-speculation; `depths` are those of the draft and of the model.

    Attributes:
        drafted, kept: drafted tokens, and how many of them stood.
        checks: passes of the upper layers after the prompt's.
    """

    drafted: int = 0
    kept: int = 0
    checks: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that stood; 0 without any."""
        return self.kept / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_check(self) -> float:
        """Tokens written per pass of the upper layers, the prompt's pass left out."""
        first = len({token.row for token in self.tokens})
        return (len(self.tokens) - first) / self.checks if self.checks else 0.0

    def summary(self) -> dict[str, Any]:
        """Totals as JSON values."""
        return {
            **DecodeTrace.summary(self),
            "drafted": self.drafted,
            "kept": self.kept,
            "checks": self.checks,
            "acceptance": self.acceptance,
            "tokens_per_check": self.tokens_per_check,
        }


def split_at(model: Any, depth: int) -> Any:
    """The same model (weights shared) whose configuration has one early exit, at `depth`."""
    view = copy.copy(model)
    view.config = copy.deepcopy(model.config)
    view.config.exit_layers, view.config.num_exits = [depth], 2
    return view


class LayerSkipDecoder:
    """Generates from a dense model by self-speculation.

    It keeps packed copies of weights: make a new one after they change.

    Args:
        model: a LayerSkip model, or any dense N-vium (K = 1), in evaluation mode.
        exit_layer: number of layers E that draft; None takes the first trained depth of a
            LayerSkip model. Any depth below L works; untrained ones draft badly.
        draft_length: most tokens drafted per check.
        warp: temperature and truncation, of the draft and of the model alike.
        packed: use packed layers; False runs the model's own modules.

    Raises:
        ConfigError: a model of several exits that mix, or a depth or length out of range.
    """

    def __init__(
        self,
        model: NviumForCausalLM | LayerSkipForCausalLM,
        exit_layer: int | None = None,
        draft_length: int = 4,
        *,
        warp: Warp | None = None,
        packed: bool = True,
    ) -> None:
        self.model: Any = model
        self.exit_layer = drafting_depth(model, exit_layer)
        self.draft_length, self.warp = check_draft_length(draft_length), warp or Warp()
        self._view = split_at(model, self.exit_layer)
        whole = packed_runner(self.model) if packed else SegmentRunner(self.model)
        self._runner = whole.split_at(self._view.config.depths)

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

        Arguments as in `PiggybackDecoder.generate`. A sampled text is a function of the seed,
        the depth and the draft length; its distribution is the model's for all of them.
        `log_probs` are the model's own, unwarped.

        Raises:
            ConfigError: an empty prompt, or a text longer than the model's context.
        """
        config = self._view.config
        limits = checked_limits(config, prompts, max_new_tokens)
        seeds = list(range(len(prompts))) if seeds is None else seeds
        trace = SpeculativeTrace(config.depths)
        writer = Writer(limits, eos_ids, stop, trace)
        for r, prompt in enumerate(prompts):
            if limits[r] > 0:
                _Text(self, writer, r, PositionNoise(seeds[r], 3), log_probs).write(prompt)
        return ExitDecoded(writer.rows, trace)

    def logits(self, states: Tensor) -> Tensor:
        """The model's head on residual streams `[n, H]` of either depth, `[n, V]`."""
        return self._runner.exits[-1].logits(states)


class _Text:
    """One row being written: its cache, and rounds of drafting and checking."""

    def __init__(
        self,
        decoder: LayerSkipDecoder,
        writer: Writer,
        row: int,
        noise: PositionNoise,
        log_probs: bool,
    ) -> None:
        self._decoder, self._writer, self._row = decoder, writer, row
        self._noise, self._log_probs = noise, log_probs
        self._trace: Any = writer.trace
        self._greedy = decoder.warp.temperature == 0
        self._device = decoder.model.device
        self._cache = NviumCache(decoder._view.config, 1)

    def write(self, prompt: Sequence[int]) -> None:
        """The whole text. The newest token is always drawn and not yet read."""
        start = time.perf_counter()
        position = len(prompt) - 1
        self._push(torch.tensor(list(prompt), device=self._device))
        self._run(0)
        scores = self._decoder.logits(self._run(1)[-1:])
        token, score = draw(scores, self._decoder.warp, [self._noise.at(position)[1]])
        own = own_log_probs(scores, token) if self._log_probs else [None]
        newest = int(token)
        going = self._writer.write(
            self._row, newest, float(score), 1, position, (len(prompt),) * 2, start, own[0]
        )
        first = time.perf_counter()
        self._trace.prefill_s += first - start
        while going:
            newest, going = self._round(newest)
        self._trace.decode_s += synchronized(self._device) - first

    def _round(self, newest: int) -> tuple[int, bool]:
        """Drafts, checks, writes what stands and one token more; the newest token, and whether
        the text goes on."""
        start, read = time.perf_counter(), int(self._cache.lengths[0])
        # The check gives one token of its own, so one less than the rest is drafted.
        count = min(self._decoder.draft_length, self._writer.left(self._row) - 1)
        drafted, drafts = self._draft(newest, count, read)
        scores = self._decoder.logits(self._run(1))
        self._trace.checks += 1
        self._trace.launches[1] += 1
        tokens, values, own = self._check(scores, drafted, drafts, read)
        kept = len(tokens) - 1
        self._trace.drafted += count
        going = True
        for i, token in enumerate(tokens):
            self._trace.kept += i < kept
            going = self._writer.write(
                self._row, token, values[i], 1, read + i, (1, count + 1), start, own[i]
            )
            if not going:
                break
        self._cache.truncate([read + kept + 1])
        return tokens[-1], going

    def _draft(self, newest: int, count: int, read: int) -> tuple[Tensor, Tensor]:
        """Reads the newest token and `count` drafted ones through the first layers: drafted
        tokens `[count]`, and the log-distributions `[count, V]` that they were drawn with. The
        host is not waited for."""
        token = torch.tensor([newest], device=self._device)
        tokens, drafts = [], []
        uniforms = self._uniforms(_DRAFT, read, count)
        for i in range(count + 1):
            self._push(token)
            state = self._run(0)
            self._trace.launches[0] += 1
            if i == count:
                break
            log_probs = self._decoder.warp.log_probs(self._decoder.logits(state))
            token = (
                log_probs.argmax(-1)
                if self._greedy
                else inverse_draw(log_probs, uniforms[i : i + 1])
            )
            tokens.append(token)
            drafts.append(log_probs)
        if not tokens:
            return token[:0], torch.zeros(0)
        return torch.cat(tokens), torch.cat(drafts)

    def _check(
        self, scores: Tensor, drafted: Tensor, drafts: Tensor, read: int
    ) -> tuple[list[int], list[float], list[float | None]]:
        """The drafted tokens that stand and the one after them, and their log-probabilities:
        warped, and the model's own if asked for. One wait for the device."""
        count = drafted.shape[0]
        target = self._decoder.warp.log_probs(scores)
        if self._greedy:
            kept, after = verify_greedy(target, drafted)
        elif count:
            kept, after = verify_sampled(
                target, drafts, drafted, self._uniforms(_KEEP, read, count),
                self._uniforms(-1, read, count + 1),
            )  # fmt: skip
        else:
            kept = torch.zeros(0, dtype=torch.bool, device=self._device)
            after = inverse_draw(target, self._uniforms(-1, read, 1))
        stands = kept_prefix(kept)[None]
        tokens = torch.cat([drafted, after[-1:]]).scatter(0, stands, after.gather(0, stands))
        values = target.gather(-1, tokens[:, None])[:, 0]
        facts = torch.cat([stands.double(), tokens.double(), values.double()]).tolist()
        own = own_log_probs(scores, tokens) if self._log_probs else [None] * (count + 1)
        written = int(facts[0]) + 1
        ids = [int(number) for number in facts[1 : written + 1]]
        return ids, facts[count + 2 :], own

    def _uniforms(self, which: int, read: int, count: int) -> Tensor:
        """Numbers of the positions `read .. read + count - 1`; -1 is the token uniform."""
        numbers = [self._noise.at(read + i) for i in range(count)]
        chosen = [token if which < 0 else gates[which] for gates, token in numbers]
        return torch.tensor(chosen, dtype=torch.float64, device=self._device)

    def _push(self, tokens: Tensor) -> None:
        """New tokens `[n]` wait for the first layers."""
        states = self._decoder.model.model.embed_tokens(tokens)
        self._cache.push(0, np.zeros(len(tokens), dtype=np.int64), states)

    def _run(self, segment: int) -> Tensor:
        """All that waits for a segment, `[n, H]`."""
        return run_segment(self._decoder._runner, self._cache, segment, _ROW)[0]


def check_draft_length(draft_length: int) -> int:
    """The number itself.

    Raises:
        ConfigError: it is below 1.
    """
    if draft_length < 1:
        raise ConfigError(f"draft_length is {draft_length}; it must be at least 1")
    return draft_length


def drafting_depth(model: Any, exit_layer: int | None) -> int:
    """The number of layers that draft, checked.

    Raises:
        ConfigError: the model mixes several exits, or the depth is not below L.
    """
    if isinstance(model, NviumForCausalLM):
        if model.num_exits > 1:
            raise ConfigError(
                f"self-speculation checks against the last head, but this N-vium is a mixture of "
                f"{model.num_exits} exits; give a dense or a LayerSkip model"
            )
    elif not isinstance(model, LayerSkipForCausalLM):
        raise ConfigError(
            f"self-speculation needs a LayerSkip or dense model of this plugin; this is a "
            f"{type(model).__name__}"
        )
    layers = model.config.num_hidden_layers
    if exit_layer is None:
        trained = model.config.exit_layers
        if not trained:
            raise ConfigError(
                f"exit_layer is not given, and a dense model has no trained one; give the "
                f"number of layers that draft, in 1..{layers - 1}"
            )
        exit_layer = trained[0]
    if not 1 <= exit_layer < layers:
        raise ConfigError(
            f"exit_layer is {exit_layer}; the layers that draft are in 1..{layers - 1} of the "
            f"model's {layers}"
        )
    return exit_layer
