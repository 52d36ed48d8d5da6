"""The published code's entry point: `spec_generate` with its arguments and its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tenfold.errors import ConfigError
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tenfold_treeflash.choosing import ProcessedChoice
from tenfold_treeflash.decoding import DraftSettings, SpeculativeDecoder
from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.target import Target, check_tree_attention


@dataclass
class SpecGenerateOutput:
    """What the published code returns with `return_stats`.

    Attributes:
        output_ids: prompt and text `[1, T]`.
        num_input_tokens, num_output_tokens: their lengths.
        time_to_first_token: seconds until the first token, the drafter's reading of the prompt
            included.
        time_per_output_token: seconds per token after the first.
        acceptance_lengths: tokens of each round.
    """

    output_ids: Tensor
    num_input_tokens: int
    num_output_tokens: int
    time_to_first_token: float
    time_per_output_token: float
    acceptance_lengths: list[int] = field(default_factory=list)


class _Callback:
    """Hands every token to a function."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def put(self, token: Tensor) -> None:
        """One token."""
        self._function(int(token))


def spec_generate(
    drafter: TreeFlashDraftModel,
    target: Any,
    input_ids: Tensor,
    max_new_tokens: int = 2048,
    stop_token_ids: Sequence[int] | None = None,
    temperature: float = 0.0,
    *,
    drafter_temperature: float = 1.0,
    top_m: int = 16,
    top_k: int = 16,
    tree_size: int = 64,
    is_chain: bool = False,
    is_vanilla: bool = False,
    return_stats: bool = False,
    token_callback: Callable[[int], Any] | None = None,
) -> Tensor | SpecGenerateOutput:
    """Continues one prompt `[1, T]`, greedily at temperature 0 and by sampling above.

    Raises:
        ConfigError: more than one prompt, a temperature below 0, or a pair that does not fit.
        ComponentError: the target cannot run trees.
    """
    if input_ids.shape[0] != 1:
        raise ConfigError(
            f"spec_generate takes one prompt, not {input_ids.shape[0]}; "
            "tenfold_treeflash.generation.generate takes batches"
        )
    if not temperature >= 0:
        raise ConfigError(f"temperature is {temperature}; it must be 0 or more")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    method = "none" if is_vanilla else "chain" if is_chain else "tree"
    if method == "tree" and drafter.looks_back == 0:
        method = "marginal"
    wrapped = Target(target)
    check_tree_attention(wrapped)
    decoder = SpeculativeDecoder(
        wrapped, drafter,
        DraftSettings(method, tree_size, top_m, top_k, drafter_temperature),
    )  # fmt: skip
    ids = input_ids[0].tolist()
    warpers = LogitsProcessorList()
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    criteria = StoppingCriteriaList([MaxLengthCriteria(len(ids) + max_new_tokens)])
    if stop_token_ids:
        criteria.append(EosTokenCriteria(list(stop_token_ids)))
    chooser = ProcessedChoice(
        ids, len(ids), warpers, criteria, sample=temperature > 0, device=input_ids.device,
        streamer=_Callback(token_callback) if token_callback is not None else None,
    )  # fmt: skip
    text, stats = decoder.decode(ids, chooser)
    output = torch.tensor([text], device=input_ids.device)
    if not return_stats:
        return output
    later = max(stats.new_tokens - 1, 1)
    return SpecGenerateOutput(
        output, stats.prompt_tokens, stats.new_tokens, stats.first_token_s,
        (stats.total_s - stats.first_token_s) / later, list(stats.accepted),
    )  # fmt: skip
