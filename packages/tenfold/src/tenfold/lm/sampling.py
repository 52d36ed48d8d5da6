"""Choosing tokens row by row, so that no row ever sees its neighbours.

`transformers.generate` runs greedily; sampling happens in its logits processors: the usual
warpers, then the Gumbel-max trick. The arg-max of `log p + g` with independent standard Gumbel
`g` is a sample of `p`. Each row draws its `g` from a generator of its own, always on the CPU,
so that one seed means one sample on every device and in every batch.

Shapes: `B` rows, `T` tokens so far (prompt included), `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tenfold.capabilities import Tokenizes
from tenfold.records import Completion, GenerationConfig
from tenfold.seeds import derive

_STOP_WINDOW = 16
"""Tokens looked at beyond a stop string's length: unfinished characters, special tokens."""


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One text to write.

    Attributes:
        ids: prompt token ids, at least one.
        limit: most tokens that may be added.
        seed: seed of the row's own generator.
    """

    ids: list[int]
    limit: int
    seed: int


@dataclass(slots=True)
class GeneratedRow:
    """What was written: token ids (an end token included), and why it ended there.

    `logprobs` are under the model itself (temperature 1, nothing masked), in nats.
    """

    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    stats: dict[str, Any] = field(default_factory=dict)


class GumbelMax(LogitsProcessor):
    """Adds each row's own Gumbel noise to its scores; the arg-max is then a sample."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores with noise; excluded tokens stay at minus infinity."""
        noise = torch.empty(scores.shape, dtype=torch.float64)
        for row, generator in enumerate(self._generators):
            noise[row].exponential_(generator=generator)
        return scores - noise.log_().to(scores.device, scores.dtype)


class PositionedGumbelMax(LogitsProcessor):
    """Gumbel noise by seed and position, so that a token's noise does not depend on how many
    tokens before it were drawn.

    Args:
        seeds: per row.
        width: length of the padded prompts; the position is counted from there.
    """

    def __init__(self, seeds: Sequence[int], width: int) -> None:
        self._seeds, self._width = list(seeds), width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores with noise; excluded tokens stay at minus infinity."""
        return with_noise(scores, self._seeds, [input_ids.shape[1] - self._width] * len(scores))


def with_noise(scores: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """`[B, V]` scores with the Gumbel noise of each row's seed and position."""
    noise = torch.empty(scores.shape, dtype=torch.float64)
    generator = torch.Generator()
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        noise[row].exponential_(generator=generator.manual_seed(derive(seed, position)))
    return scores - noise.log_().to(scores.device, scores.dtype)


class LogProbRecorder(LogitsProcessor):
    """Remembers the log-probability of each chosen token; comes before any other processor.

    Only the last step's logits are held: a step's choice is seen when the next one begins.
    """

    def __init__(self) -> None:
        self._pending: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes note and returns the scores as they are."""
        self._settle(input_ids)
        self._pending = scores.clone()
        return scores

    def _settle(self, input_ids: Tensor) -> None:
        if self._pending is not None:
            log_probs = self._pending.float().log_softmax(-1)
            self._chosen.append(log_probs.gather(-1, input_ids[:, -1:])[:, 0].cpu())
            self._pending = None

    def rows(self, sequences: Tensor) -> list[list[float]]:
        """Per row the log-probabilities of all its new tokens; call once, at the end."""
        self._settle(sequences)
        return torch.stack(self._chosen, dim=1).tolist() if self._chosen else []


class RowStopper(StoppingCriteria):
    """Ends each row by itself: at an end token, a stop string, or its own limit.

    `ends[row]` is `(tokens added, reason)` once the row has ended.
    """

    eos_token_id = None
    """Makes `generate` write padding into rows that have ended."""

    def __init__(
        self,
        rows: Sequence[GenerationRow],
        width: int,
        tokenizer: Tokenizes,
        eos_ids: frozenset[int],
        stop: Sequence[str],
    ) -> None:
        self._limits = [row.limit for row in rows]
        self._width = width
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._stop = [s for s in stop if s]
        self._window = max(map(len, self._stop), default=0) + _STOP_WINDOW
        self.ends: list[tuple[int, str] | None] = [None] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`[B]` bool: rows that have ended."""
        fresh = input_ids[:, self._width :].tolist()
        for row, ids in enumerate(fresh):
            if self.ends[row] is None and (reason := self.reason(ids, self._limits[row])):
                self.ends[row] = (len(ids), reason)
        done = [end is not None for end in self.ends]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def reason(self, ids: Sequence[int], limit: int) -> str:
        """Why a row that has just received its last token ends, or an empty string."""
        if not ids:
            return ""
        if ids[-1] in self._eos_ids:
            return "eos"
        if self._stop:
            tail = self._tokenizer.decode(ids[-self._window :])
            if any(s in tail for s in self._stop):
                return "stop"
        return "length" if len(ids) >= limit else ""


class GenerationControls:
    """Everything that steers one batch of rows through `transformers.generate`.

    Decoders with a loop of their own call `processors(input_ids, logits)` and take the
    arg-max, call `stopping(input_ids, None)`, and hand the sequences to `collect`.
    `by_position` draws noise by position, for constraints whose prescribed tokens other
    decoders write without drawing.
    """

    def __init__(
        self,
        rows: Sequence[GenerationRow],
        config: GenerationConfig,
        *,
        width: int,
        tokenizer: Tokenizes,
        eos_ids: frozenset[int],
        constraint: LogitsProcessor | None = None,
        by_position: bool = False,
    ) -> None:
        self.rows = list(rows)
        self.width = width
        """Length of the padded prompts; new tokens follow."""
        self._recorder = LogProbRecorder() if config.logprobs else None
        self._stopper = RowStopper(rows, width, tokenizer, eos_ids, config.stop)
        first = [self._recorder, constraint]
        self.processors = LogitsProcessorList([p for p in first if p is not None])
        if config.temperature > 0:
            self.processors += warpers(config)
            seeds = [row.seed for row in rows]
            noise = PositionedGumbelMax(seeds, width) if by_position else GumbelMax(seeds)
            self.processors.append(noise)
        self.stopping = StoppingCriteriaList([self._stopper])

    def collect(self, sequences: Tensor) -> list[GeneratedRow]:
        """The rows of finished sequences `[B, T]` (padded prompts included)."""
        fresh = sequences[:, self.width :].tolist()
        logprobs = self._recorder.rows(sequences) if self._recorder else None
        results = []
        for row, ids in enumerate(fresh):
            length, reason = self._stopper.ends[row] or (len(ids), "length")
            chosen = None if logprobs is None else logprobs[row][:length]
            results.append(GeneratedRow(ids[:length], reason, chosen))
        return results


def warpers(config: GenerationConfig) -> LogitsProcessorList:
    """Temperature, then top-k, then top-p, each left out where it would do nothing."""
    chosen = LogitsProcessorList()
    if config.temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k is not None:
        chosen.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chosen.append(TopPLogitsWarper(config.top_p))
    return chosen


def completion(
    row: GeneratedRow, tokenizer: Tokenizes, eos_ids: frozenset[int], stop: Sequence[str]
) -> Completion:
    """The row as text: without its end token, and cut before the first stop string."""
    ids = row.token_ids
    written = ids[:-1] if ids and ids[-1] in eos_ids else ids
    text = tokenizer.decode(written)
    cuts = [at for s in stop if s and (at := text.find(s)) >= 0]
    return Completion(
        text=text[: min(cuts)] if cuts else text,
        token_ids=ids,
        logprobs=row.logprobs,
        finish_reason=row.finish_reason,
        stats=row.stats,
    )
