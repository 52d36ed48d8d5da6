"""`generate`: transformers' `generate`, decoded in trees.

transformers prepares processors, criteria and configuration as for plain decoding and hands them
to our loop. A callable `custom_generate` loses `streamer` and `tokenizer` on the way, so the
wrapper keeps them itself.

Shapes: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tenfold.errors import ConfigError
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tenfold_treeflash.choosing import ProcessedChoice, for_row
from tenfold_treeflash.decoding import DecodingStats, DraftSettings, SpeculativeDecoder
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.planning import Planners
from tenfold_treeflash.target import Target, check_tree_attention
from tenfold_treeflash.tree import DraftTree


@dataclass
class TreeGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with `spec_stats`, one record per row."""

    spec_stats: list[DecodingStats] | None = None


_REFUSED = {
    "num_beams": 1, "penalty_alpha": None, "dola_layers": None, "constraints": None,
    "assistant_model": None, "prompt_lookup_num_tokens": None, "guidance_scale": 1,
    "cache_implementation": None, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
_HINTS = {
    "past_key_values": "the drafter needs the states of all tokens; pass the whole text",
    "inputs_embeds": "pass token ids",
    "position_ids": "positions are counted from the attention mask",
    "token_type_ids": "leave it out",
}
_checked: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose tree attention has been tried."""


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: TreeFlashDraftModel | None,
    settings: DraftSettings | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    seeds: Sequence[int] | None = None,
    checked: bool = False,
    budget: Callable[[DraftTree, int], int] | None = None,
    planners: Planners | None = None,
    **kwargs: Any,
) -> Any:
    """What `model.generate(inputs, **kwargs)` writes, in fewer passes of the model.

    Greedy output is equal token for token; so is sampled output of one row for the same seed of
    torch. Rows of a batch are sampled from a generator each. A row that has ended is padded.
    Settings, processors, criteria and outputs are those of `generate`.

    Args:
        model: the target, a decoder-only transformers model.
        inputs: prompt ids `[B, T]`, left-padded (or `input_ids` among the keywords).
        drafter: the target's drafter.
        settings: how rounds are drafted.
        streamer: gets every token as it is chosen (one row).
        tokenizer: needed with `stop_strings`.
        seeds: of every row's generator; None draws them from torch's own where there are several
            rows, and one row uses torch's own generator.
        checked: the target's attention is known to run trees; it is tried once per model else.
        budget: see `SpeculativeDecoder`.
        planners: see `SpeculativeDecoder`.

    Returns:
        Ids `[B, T]`, or with `return_dict_in_generate` a `TreeGenerateOutput`.

    Raises:
        ConfigError: an option of `generate` that trees have no answer to, or a pair that does not
            fit.
        ComponentError: the target cannot run trees.
    """
    config = kwargs.get("generation_config") or model.generation_config
    own = copy.copy(config)
    own.cache_implementation = None
    _refuse(own, kwargs, streamer, inputs)
    decoder = _decoder(model, drafter, settings, checked, budget, planners)
    stop_strings = kwargs.pop("stop_strings", None) or config.stop_strings
    if stop_strings is not None:
        if tokenizer is None:
            raise ConfigError("stop_strings needs the tokenizer: generate(..., tokenizer=...)")
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
        # transformers would look for the tokenizer, which it loses on the way to our loop.
        config = copy.deepcopy(config)
        config.stop_strings = None
        kwargs |= {"stopping_criteria": criteria, "generation_config": config}
        if model.generation_config.stop_strings is not None:
            raise ConfigError(
                "stop_strings in the model's own generation_config cannot be used here; pass it "
                "to generate instead"
            )

    if kwargs.get("cache_implementation") is None and config.cache_implementation is not None:
        # The model's own default; the loop has a cache of its own.
        config = copy.deepcopy(config)
        config.cache_implementation = None
        kwargs["generation_config"] = config

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        # Again: what the caller's configuration leaves open comes from the model's.
        settled = copy.copy(prepared["generation_config"])
        settled.cache_implementation = None
        _refuse(settled, {}, None, None)
        return _decode(decoder, input_ids, streamer, seeds, **prepared)

    return model.generate(inputs, custom_generate=loop, **kwargs)


def tree_decoding(
    model: Any,
    drafter: TreeFlashDraftModel | None,
    settings: DraftSettings | None = None,
    *,
    seeds: Sequence[int] | None = None,
    checked: bool = False,
    budget: Callable[[DraftTree, int], int] | None = None,
    planners: Planners | None = None,
) -> Callable[..., Any]:
    """A loop for `model.generate(ids, custom_generate=tree_decoding(model, drafter))`.

    transformers gives such loops no streamer and no tokenizer: for streams and stop strings use
    `generate` here. Arguments and errors are those of `generate`.
    """
    decoder = _decoder(model, drafter, settings, checked, budget, planners)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        _refuse(prepared["generation_config"], {}, None, input_ids)
        return _decode(decoder, input_ids, None, seeds, **prepared)

    return loop


def _decoder(
    model: Any,
    drafter: TreeFlashDraftModel | None,
    settings: DraftSettings | None,
    checked: bool,
    budget: Callable[[DraftTree, int], int] | None,
    planners: Planners | None,
) -> SpeculativeDecoder:
    """A decoder for a pair that has been looked at."""
    target = Target(model)
    decoder = SpeculativeDecoder(target, drafter, settings, budget=budget, planners=planners)
    if not checked and model not in _checked:
        check_tree_attention(target)
        _checked.add(model)
    return decoder


def _decode(
    decoder: SpeculativeDecoder,
    input_ids: Tensor,
    streamer: Any,
    seeds: Sequence[int] | None,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Any:
    """Our side of `custom_generate`."""
    as_dict = generation_config.return_dict_in_generate
    keep_scores = bool(as_dict and generation_config.output_scores)
    keep_logits = bool(as_dict and generation_config.output_logits)
    shown, read = input_ids.tolist(), _read_tokens(input_ids, attention_mask)
    sample, rows = bool(generation_config.do_sample), len(shown)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    choosers = [
        ProcessedChoice(
            shown[row], len(read[row]),
            logits_processor if rows == 1 else for_row(row, logits_processor), stopping_criteria,
            sample=sample, device=input_ids.device, generator=generator, keep_scores=keep_scores,
            keep_logits=keep_logits, streamer=streamer,
        )
        for row, generator in enumerate(_generators(seeds, rows, sample, input_ids.device))
    ]  # fmt: skip
    if rows == 1:
        text, stats = decoder.decode(read[0], choosers[0])
        texts, records = [text], [stats]
    else:
        texts, records = decoder.decode_batch(read, choosers)
    if streamer is not None:
        streamer.end()
    whole = [s + t[len(r) :] for s, r, t in zip(shown, read, texts, strict=True)]
    sequences: Any = _padded(whole, generation_config, input_ids.device)
    if not as_dict:
        return sequences
    scores: Any = _stacked([c.scores for c in choosers]) if keep_scores else None
    logits: Any = _stacked([c.logits for c in choosers]) if keep_logits else None
    return TreeGenerateOutput(sequences, scores=scores, logits=logits, spec_stats=records)


def _read_tokens(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row that the model reads: those that its mask leaves."""
    if mask is None:
        return ids.tolist()
    for row, left in enumerate(mask.tolist()):
        if not left[-1]:
            raise ConfigError(
                f"attention_mask of row {row} hides the last token; pad prompts on the left"
            )
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def _generators(
    seeds: Sequence[int] | None, rows: int, sample: bool, device: torch.device
) -> list[torch.Generator | None]:
    """A source of random numbers per row; None is torch's own."""
    if seeds is None:
        if not sample or rows == 1:
            return [None] * rows
        seeds = torch.randint(2**62, (rows,)).tolist()
    if len(seeds) != rows:
        raise ConfigError(f"seeds holds {len(seeds)} numbers; there are {rows} rows")
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


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


def _refuse(config: Any, kwargs: dict[str, Any], streamer: Any, inputs: Tensor | None) -> None:
    """Raises ConfigError for what cannot be decoded in trees."""
    for name, plain in _REFUSED.items():
        value = kwargs.get(name, getattr(config, name, plain))
        if value not in (plain, None):
            raise ConfigError(
                f"{name} = {value!r} cannot be decoded in trees; leave it out or use "
                "model.generate itself"
            )
    if kwargs.get("use_cache", config.use_cache) is False:
        raise ConfigError("use_cache = False cannot be decoded in trees; leave it out")
    for name, hint in _HINTS.items():
        if kwargs.get(name) is not None:
            raise ConfigError(f"{name} cannot be decoded in trees: {hint}")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if ids is None:
        return
    if not ids.shape[-1]:
        raise ConfigError("the prompt is empty; give at least one token")
    copies = kwargs.get("num_return_sequences", getattr(config, "num_return_sequences", 1)) or 1
    if streamer is not None and ids.shape[0] * copies > 1:
        raise ConfigError("a streamer takes one text at a time")
