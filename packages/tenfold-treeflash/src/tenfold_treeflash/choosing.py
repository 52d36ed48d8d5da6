"""The target's decoding rule, by transformers' processors and criteria, one text at a time.

Processors and criteria see the text as `generate` shows it to them, padding included; the model
sees the tokens that its attention mask leaves. Shapes: `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class ProcessedChoice:
    """Choices for one row.

    Args:
        shown: the prompt as processors see it.
        read: how many of its tokens the model reads.
        processors, criteria: as `generate` prepared them.
        sample: draw, or take the arg-max.
        generator: of the draws; None is torch's own.
        keep_scores, keep_logits: remember processed scores and raw logits of every token.
        streamer: gets every token.
    """

    def __init__(
        self,
        shown: Sequence[int],
        read: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        *,
        sample: bool,
        device: torch.device,
        generator: torch.Generator | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        streamer: Any = None,
    ) -> None:
        self._processors, self.sample, self.generator = processors, sample, generator
        self._device, self._streamer = device, streamer
        self._keep_scores, self._keep_logits = keep_scores, keep_logits
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.greedy = not (sample or len(processors) or keep_scores or keep_logits)
        self._text, self._filled = torch.tensor([list(shown)], device=device), len(shown)
        self._shift = len(shown) - read
        self._longest, self._eos, self._criteria = _split(criteria)

    def _shown(self, ids: Sequence[int]) -> Any:
        """The text `[1, T]` as processors see it; grows with `ids`, which only ever grow."""
        end = len(ids) + self._shift
        if end > self._text.shape[1]:
            self._text = torch.cat([self._text, torch.empty_like(self._text)], dim=1)
            if end > self._text.shape[1]:
                return self._shown(ids)
        if self._filled < end:
            new = torch.tensor(ids[self._filled - self._shift :], device=self._device)
            self._text[0, self._filled : end] = new
            self._filled = end
        return self._text[:, :end]

    def _scores(self, ids: list[int], logits: Tensor) -> Tensor:
        """Processed scores `[1, V]` in fp32, as `generate` computes them."""
        raw: Any = logits[None].to(copy=True, dtype=torch.float32, device=self._device)
        if self._keep_logits:
            self.logits.append(raw.clone())
        scores: Any = self._processors(self._shown(ids), raw)
        if self._keep_scores:
            self.scores.append(scores)
        return scores

    def choose(self, ids: list[int], logits: Tensor) -> int:
        """See `Chooser`. One draw from a `[1, V]` distribution, as in `generate`."""
        scores = self._scores(ids, logits)
        return self.draw(scores.softmax(-1)) if self.sample else int(scores.argmax(-1))

    def probabilities(self, ids: list[int], logits: Tensor) -> Tensor:
        """The distribution `[1, V]` that `choose` draws from."""
        return self._scores(ids, logits).softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """A token from `[1, V]`."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def ends(self, ids: list[int]) -> bool:
        """See `Chooser`."""
        token = ids[-1]
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        if token in self._eos or len(ids) + self._shift >= self._longest:
            return True
        if not self._criteria:
            return False
        scores: Any = tuple(self.scores) or None
        return any(bool(test(self._shown(ids), scores).all()) for test in self._criteria)


def _split(criteria: Iterable[Any]) -> tuple[int, frozenset[int], list[Any]]:
    """Longest text, ending tokens, and criteria that have to be asked."""
    longest, eos, others = 10**18, set(), []
    for test in criteria:
        if type(test) is MaxLengthCriteria:
            longest = min(longest, test.max_length)
        elif type(test) is EosTokenCriteria:
            eos.update(test.eos_token_id.flatten().tolist())
        else:
            others.append(test)
    return longest, frozenset(eos), others


def for_row(row: int, processors: LogitsProcessorList) -> LogitsProcessorList:
    """A batch's processors for one of its rows: those with a state get one of their own, those
    that hold a value per row get that of this row."""
    out = LogitsProcessorList()
    for processor in processors:
        own: Any = copy.copy(processor)
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            asked = processor._prefix_allowed_tokens_fn
            own._prefix_allowed_tokens_fn = lambda _, ids, asked=asked: asked(row, ids)
        elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
            own.batch_size, own.generated_ngrams = 1, [processor.generated_ngrams[row]]
        for name in ("prompt_ignore_length", "encoder_input_ids"):
            value = getattr(processor, name, None)
            if isinstance(value, Tensor):
                setattr(own, name, value[row : row + 1])
        out.append(own)
    return out
