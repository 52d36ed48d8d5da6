"""`generate`: transformers' `generate`, decoded in trees.

transformers prepares processors, criteria and configuration as for plain decoding and hands them
to our loop. A callable `custom_generate` loses `streamer` and `tokenizer` on the way, so the
wrapper keeps them itself. Rows of a batch are decoded one after the other.

Shapes: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tenfold.errors import ConfigError
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tenfold_treeflash.decoding import DecodingStats, DraftSettings, SpeculativeDecoder
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.target import Target, check_pair


@dataclass
class TreeGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with `spec_stats`, one record per row."""

    spec_stats: list[DecodingStats] | None = None


class ProcessedChoice:
    """Choices by transformers' processors and criteria, for one row.

    Args:
        processors, criteria: as `generate` prepared them.
        sample: draw, or take the arg-max.
        keep_scores, keep_logits: remember processed scores and raw logits of every token.
        streamer: gets every token.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        *,
        sample: bool,
        device: torch.device,
        keep_scores: bool = False,
        keep_logits: bool = False,
        streamer: Any = None,
    ) -> None:
        self._processors, self._criteria, self._sample = processors, criteria, sample
        self._device, self._streamer = device, streamer
        self._keep_scores, self._keep_logits = keep_scores, keep_logits
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.greedy = not (sample or len(processors) or keep_scores or keep_logits)

    def choose(self, ids: list[int], logits: Tensor) -> int:
        """See `Chooser`. One draw from a `[1, V]` distribution in fp32, as `generate` does."""
        raw = logits[None].to(copy=True, dtype=torch.float32, device=self._device)
        text: Any = torch.tensor([ids], device=self._device)
        scores: Any = self._processors(text, raw)
        if self._keep_scores:
            self.scores.append(scores)
        if self._keep_logits:
            self.logits.append(logits[None].float())
        if self._sample:
            return int(torch.multinomial(scores.softmax(-1), 1))
        return int(scores.argmax(-1))

    def ends(self, ids: list[int]) -> bool:
        """See `Chooser`."""
        if self._streamer is not None:
            self._streamer.put(torch.tensor(ids[-1:]))
        scores: Any = tuple(self.scores) or None
        return bool(self._criteria(torch.tensor([ids], device=self._device), scores).all())


_REFUSED = {
    "num_beams": 1, "penalty_alpha": None, "dola_layers": None, "constraints": None,
    "assistant_model": None, "prompt_lookup_num_tokens": None, "guidance_scale": None,
    "cache_implementation": None,
}  # fmt: skip


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: TreeFlashDraftModel | None,
    settings: DraftSettings | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    checked: bool = False,
    **kwargs: Any,
) -> Any:
    """What `model.generate(inputs, **kwargs)` writes, in fewer passes of the model.

    Greedy output is equal token for token; sampled output is for the same seed of torch (one
    row). Settings, processors, criteria and outputs are those of `generate`.

    Args:
        model: the target, a decoder-only transformers model.
        inputs: prompt ids `[B, T]`, left-padded (or `input_ids` among the keywords).
        drafter: the target's drafter.
        settings: how rounds are drafted.
        streamer: gets every token as it is chosen (one row).
        tokenizer: needed with `stop_strings`.
        checked: the pair has passed `check_pair` before.

    Returns:
        Ids `[B, T]`, or with `return_dict_in_generate` a `TreeGenerateOutput`.

    Raises:
        ConfigError: an option of `generate` that trees have no answer to, or a pair that does not
            fit.
        ComponentError: the target cannot run trees.
    """
    _refuse(model, kwargs, streamer, inputs)
    target = Target(model)
    if not checked:
        check_pair(target, drafter)
    decoder = SpeculativeDecoder(target, drafter, settings)
    stop_strings = kwargs.pop("stop_strings", None)
    if stop_strings is not None:
        if tokenizer is None:
            raise ConfigError("stop_strings needs the tokenizer: generate(..., tokenizer=...)")
        from transformers.generation.stopping_criteria import StopStringCriteria

        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
        kwargs["stopping_criteria"] = criteria

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return _decode_rows(decoder, input_ids, streamer, **prepared)

    return model.generate(inputs, custom_generate=loop, **kwargs)


def _decode_rows(
    decoder: SpeculativeDecoder,
    input_ids: Tensor,
    streamer: Any,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Any:
    """Our side of `custom_generate`."""
    device = input_ids.device
    as_dict = generation_config.return_dict_in_generate
    keep_scores = bool(as_dict and generation_config.output_scores)
    keep_logits = bool(as_dict and generation_config.output_logits)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    texts, records, choosers = [], [], []
    for row, ids in enumerate(input_ids.tolist()):
        first = 0 if attention_mask is None else int((attention_mask[row] == 0).sum())
        chooser = _PaddedChoice(
            logits_processor, stopping_criteria, sample=bool(generation_config.do_sample),
            device=device, keep_scores=keep_scores, keep_logits=keep_logits, streamer=streamer,
        )  # fmt: skip
        chooser.padding = ids[:first]
        text, stats = decoder.decode(ids[first:], chooser)
        texts.append(ids[:first] + text)
        records.append(stats)
        choosers.append(chooser)
    if streamer is not None:
        streamer.end()
    sequences: Any = _padded(texts, generation_config, device)
    if not as_dict:
        return sequences
    scores: Any = _stacked([c.scores for c in choosers]) if keep_scores else None
    logits: Any = _stacked([c.logits for c in choosers]) if keep_logits else None
    return TreeGenerateOutput(sequences, scores=scores, logits=logits, spec_stats=records)


class _PaddedChoice(ProcessedChoice):
    """Choices for a row whose processors and criteria see its padding, as in plain `generate`."""

    padding: Sequence[int] = ()

    def choose(self, ids: list[int], logits: Tensor) -> int:
        """See `Chooser`."""
        return super().choose([*self.padding, *ids] if self.padding else ids, logits)

    def ends(self, ids: list[int]) -> bool:
        """See `Chooser`."""
        return super().ends([*self.padding, *ids] if self.padding else ids)


def _padded(texts: list[list[int]], generation_config: Any, device: torch.device) -> Tensor:
    """`[B, T]`, shorter rows filled with padding on the right."""
    longest = max(map(len, texts))
    pad = generation_config._pad_token_tensor
    if pad is None and any(len(text) < longest for text in texts):
        raise ConfigError("rows end at different lengths and no pad_token_id says what follows")
    filler = 0 if pad is None else int(pad)
    rows = [text + [filler] * (longest - len(text)) for text in texts]
    return torch.tensor(rows, device=device)


def _stacked(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """One `[B, V]` tensor per new token; rows that have ended give zeros."""
    longest = max(map(len, rows))
    empty = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(
        torch.cat([row[i] if i < len(row) else empty for row in rows]) for i in range(longest)
    )


def _refuse(model: Any, kwargs: dict[str, Any], streamer: Any, inputs: Tensor | None) -> None:
    """Raises ConfigError for what cannot be decoded in trees."""
    config = kwargs.get("generation_config") or model.generation_config
    for name, plain in _REFUSED.items():
        value = kwargs.get(name, getattr(config, name, plain))
        if value not in (plain, None):
            raise ConfigError(
                f"{name} = {value!r} cannot be decoded in trees; leave it out or use "
                "model.generate itself"
            )
    if kwargs.get("use_cache") is False:
        raise ConfigError("use_cache = False cannot be decoded in trees; leave it out")
    if kwargs.get("past_key_values") is not None:
        raise ConfigError(
            "past_key_values cannot be continued: the drafter needs the states of all tokens; "
            "pass the whole text"
        )
    if kwargs.get("inputs_embeds") is not None:
        raise ConfigError("inputs_embeds cannot be decoded in trees; pass token ids")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if streamer is not None and ids is not None and ids.shape[0] > 1:
        raise ConfigError("a streamer takes one text at a time")
