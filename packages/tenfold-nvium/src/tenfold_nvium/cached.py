"""`forward` with an `NviumCache`: padded columns in, true positions inside.

This is what `generate` of transformers drives. Columns are unpadded per row (left or right
padding alike), run through the segments together with whatever the cache still owes, and put
back into their columns. Without a policy all new tokens go through every segment; with one,
each row's last token leaves where the policy says and its logits come from that head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_nvium.cache import NviumCache
from tenfold_nvium.cascade import broken_router, cascade, flush, run_segment
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.mixture import exit_log_probs, in_full_precision
from tenfold_nvium.policies import ExitPolicy, make_policy

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM, NviumOutput


@torch.no_grad()
def cached_forward(
    model: NviumForCausalLM,
    cache: NviumCache,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    *,
    logits_to_keep: int | Tensor = 0,
    decode_policy: Any = None,
) -> NviumOutput:
    """Appends the new columns to the cache and returns their logits; see the module."""
    hidden = model.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    cache.check_model(model.config)
    cache.open_rows(hidden.shape[0])
    _check_room(cache, hidden.shape[1], attention_mask, model.config.max_position_embeddings)
    ended, frozen = cache.take_ended()
    real = _new_columns(cache, hidden, attention_mask, frozen)
    cache.push(0, real.nonzero()[:, 0].cpu().numpy(), hidden[real])
    if decode_policy is not None:
        return _routed(model, cache, make_policy(decode_policy), real, ended | frozen)
    return _full_depth(model, cache, real, hidden, logits_to_keep)


def _check_room(cache: NviumCache, new: int, attention_mask: Tensor | None, limit: int) -> None:
    """Raises ConfigError when `new` columns, padding left out, go beyond the context."""
    longest = int(cache.lengths.max(initial=0)) + new
    if longest > limit and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        longest = min(longest, int(attention_mask.sum(-1).max()))
    if longest > limit:
        raise ConfigError(
            f"the text has {longest} tokens, but the model's context is {limit}; "
            "shorten the prompt or max_new_tokens"
        )


def _new_columns(
    cache: NviumCache, hidden: Tensor, attention_mask: Tensor | None, frozen: np.ndarray
) -> Tensor:
    """`[B, T]`: which of the new columns are real; remembers the padding in the cache."""
    rows, length = hidden.shape[:2]
    seen = cache.get_seq_length()
    if attention_mask is None:
        real = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    else:
        raise ConfigError(
            "an NviumCache takes a [batch, columns] attention mask; for a custom 4-D mask pass "
            "a DynamicCache, which runs at full depth"
        )
    if frozen.any():
        real = real & ~torch.from_numpy(frozen).to(real.device)[:, None]
    if cache.columns is None and (not bool(real.all()) or len(set(cache.lengths.tolist())) > 1):
        old = torch.from_numpy(cache.lengths)[:, None]
        cache.columns = torch.arange(seen) >= seen - old
    if cache.columns is not None:
        cache.columns = torch.cat([cache.columns, real.cpu()], -1)
    return real


def _full_depth(
    model: NviumForCausalLM,
    cache: NviumCache,
    real: Tensor,
    hidden: Tensor,
    logits_to_keep: int | Tensor,
) -> NviumOutput:
    """All new tokens through all segments; log p_mix for the columns asked for."""
    from tenfold_nvium.modeling import NviumOutput

    runner, counts = cache.runner or SegmentRunner(model), real.sum(-1).cpu().numpy()
    states = []
    for segment in range(cache.segments):
        rows = np.flatnonzero(cache.waiting_counts(segment))
        place = torch.zeros_like(hidden)
        if rows.size:
            out, block = run_segment(runner, cache, segment, rows)
            # A row's block begins with older, deferred positions; the new ones are its end.
            ends = np.repeat(block.widths.cumsum(), block.widths)
            fresh = np.arange(block.size) >= ends - counts[block.row_of]
            place[real] = out[torch.from_numpy(np.flatnonzero(fresh)).to(out.device)]
        states.append(place)
    inputs, gates = model.exit_views(states)
    broken = gates.isnan().flatten(0, -2).any(0).nonzero()[:, 0].tolist()
    if broken:
        raise broken_router(broken[0])
    weights = exit_log_probs(gates)
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.mixture_logits([a[:, keep] for a in inputs], weights[:, keep])
    return NviumOutput(
        logits=logits, gate_log_odds=gates, exit_log_probs=weights, past_key_values=cache
    )


def _routed(
    model: NviumForCausalLM,
    cache: NviumCache,
    policy: ExitPolicy,
    real: Tensor,
    ended: np.ndarray,
) -> NviumOutput:
    """Each row's last token to its exit; a prompt (several columns) runs all segments. Rows
    that have ended compute nothing and get zeros."""
    from tenfold_nvium.modeling import NviumOutput

    rows = np.flatnonzero(~ended)
    if not bool(real[torch.from_numpy(rows).to(real.device), -1].all()):
        raise ConfigError("routed decoding needs left padding: every row's last column is real")
    runner = cache.runner or SegmentRunner(model)
    uniforms = torch.rand(cache.rows, len(model.exits), dtype=torch.float64).numpy()[rows]
    deep = real.shape[1] > 1
    exits = np.full(cache.rows, -1)
    logits = torch.zeros(cache.rows, model.config.vocab_size, device=real.device)
    if rows.size:
        choice = cascade(model, runner, cache, rows, policy, uniforms, deep=deep)
        exits[rows] = choice.exits
        logits[torch.from_numpy(rows).to(logits.device)] = in_full_precision(choice.scores).to(
            logits.dtype
        )
    cache.exit_history.append(exits)
    limit = model.config.max_deferred
    if limit is not None:
        flush(runner, cache, rows[cache.deferred()[rows] > limit])
    return NviumOutput(
        logits=logits[:, None],
        exits=torch.from_numpy(exits).to(logits.device),
        past_key_values=cache,
    )
