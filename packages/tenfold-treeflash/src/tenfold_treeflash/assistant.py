"""A drafter as transformers' own DFlash decoding wants it: chains of its backbone's marginals.

    target.generate(ids, assistant_model=as_hf_dflash_assistant(drafter), speculation_type="dflash")

One text at a time; the same weights as in our trees, for comparisons on equal terms.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.modeling import TreeFlashDraftModel


class HFDFlashAssistant:
    """What transformers calls once per round; see `as_hf_dflash_assistant`."""

    def __init__(self, drafter: TreeFlashDraftModel) -> None:
        self._drafter, self.config = drafter, drafter.config
        self._contexts: weakref.WeakKeyDictionary[Any, DraftCache] = weakref.WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        """Where the drafter computes."""
        return self._drafter.device

    @torch.no_grad()
    def __call__(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Any:
        """States of a block `noise_embeds [1, T, H]` behind new context
        `context_hidden_states [1, n, F H]`, at `position_ids [1, n + T]`.

        transformers' cache stays empty: it only names the text that the block belongs to.
        """
        drafter, new = self._drafter, context_hidden_states.shape[1]
        cache = self._contexts.setdefault(past_key_values, DraftCache())
        drafter.extend(cache, context_hidden_states, position_ids[:, :new])
        block = noise_embeds * drafter.config.input_embedding_scale
        states = drafter.model(block, position_ids[:, new:], cache.pairs())
        return SimpleNamespace(last_hidden_state=drafter.model.norm(states))


def as_hf_dflash_assistant(drafter: TreeFlashDraftModel) -> HFDFlashAssistant:
    """The `assistant_model` for `generate(..., speculation_type="dflash")`.

    Raises:
        ConfigError: a drafter whose mask is a learned vector; transformers knows tokens only.
    """
    if drafter.config.mask_token_id is None:
        raise ConfigError(
            "this drafter's mask is a learned vector (mask_token_id is none); transformers' own "
            "DFlash decoding needs a mask token"
        )
    return HFDFlashAssistant(drafter)
