"""Transition tables from one drafter pass: marginal candidates, then corrected children.

Stage 1 takes, per depth, the M most likely tokens of the marginal. Stage 2 corrects the state of
every depth for each candidate of the depth before, all in one batch: the correction looks back
one token only, so nothing has to wait for anything. Row 0 of a depth is its most likely candidate.

Shapes: `D` drafted depths, `M` candidates, `K` children, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.tree import TransitionTables

Head = Callable[[Tensor], Tensor]
"""States `[..., H]` to the target's logits `[..., V]`."""

_COLDEST = 1e-5


@torch.no_grad()
def transition_tables(
    drafter: TreeFlashDraftModel,
    hidden: Tensor,
    anchor: int,
    embedding: Tensor,
    head: Head,
    *,
    top_m: int = 16,
    top_k: int = 16,
    temperature: float = 1.0,
    shortlist: int | None = None,
    marginal: bool = False,
) -> TransitionTables:
    """Tables of one block.

    Args:
        hidden: residual streams `[D + 1, H]` of the block's slots.
        anchor: token in slot 0.
        embedding: the target's input embeddings `[V, H]`.
        head: the target's output head.
        top_m, top_k: M and K, cut to the vocabulary.
        temperature: of the drafter's distributions.
        shortlist: score corrected children among the S most likely tokens of a depth's marginal
            only; ranks children, never changes the target's answer.
        marginal: leave the correction out.

    Raises:
        ConfigError: sizes below 1, a negative temperature, or a drafter that looks back two
            tokens (it needs second-order tables).
    """
    _check(top_m, top_k, temperature, shortlist)
    scale = 1.0 / max(temperature, _COLDEST)
    logits = _logits(head, drafter.model.norm(hidden[1:])) * scale
    depth, vocabulary = logits.shape
    rows, children = min(top_m, vocabulary), min(top_k, vocabulary)
    if marginal or drafter.looks_back == 0:
        best = logits.topk(children)
        log_probs = best.values - logits.logsumexp(-1, keepdim=True)
        links = torch.zeros_like(best.indices)
        links[-1] = -1
        return _to_numpy(best.indices[:, None], log_probs[:, None], links[:, None])
    if drafter.looks_back != 1:
        raise ConfigError("trees need a drafter that looks back one token (swiglu or linear)")
    candidates = logits[:-1].topk(rows).indices  # of depths 1 .. D-1
    first = torch.full((1, rows), anchor, device=hidden.device, dtype=candidates.dtype)
    previous = torch.cat([first, candidates])  # [D, M]; depth 1 has one row only
    tokens = previous.new_zeros((depth, rows, children))
    log_probs = logits.new_full((depth, rows, children), -torch.inf)
    embedded = embedding[previous] * drafter.config.input_embedding_scale
    for part, states in ((slice(0, 1), embedded[:1, :1]), (slice(1, depth), embedded[1:])):
        if states.shape[0] == 0:
            continue
        base = hidden[1:][part][:, None].expand(-1, states.shape[1], -1)
        corrected = drafter.model.norm(drafter.correct(base, states[..., None, :]))
        ids, values = _best_children(head, corrected, logits[part], children, scale, shortlist)
        tokens[part, : states.shape[1]] = ids
        log_probs[part, : states.shape[1]] = values
    return _to_numpy(tokens, log_probs, _links(tokens, candidates))


def _best_children(
    head: Head, states: Tensor, marginal: Tensor, count: int, scale: float, shortlist: int | None
) -> tuple[Tensor, Tensor]:
    """Best tokens and log-probabilities `[d, M, K]` of corrected states `[d, M, H]`."""
    weight = getattr(head, "weight", None)
    if shortlist is None or shortlist >= marginal.shape[-1] or weight is None:
        logits = _logits(head, states) * scale
        best = logits.topk(count)
        return best.indices, best.values - logits.logsumexp(-1, keepdim=True)
    listed = marginal.topk(max(shortlist, count)).indices  # [d, S]
    logits = torch.einsum("dmh,dsh->dms", states, weight[listed]).float() * scale
    bias = getattr(head, "bias", None)
    if bias is not None:
        logits = logits + bias[listed][:, None] * scale
    best = logits.topk(count)
    ids = listed[:, None].expand(-1, states.shape[1], -1).gather(-1, best.indices)
    return ids, best.values - logits.logsumexp(-1, keepdim=True)


def _logits(head: Head, states: Tensor) -> Tensor:
    """Logits in fp32 or wider."""
    logits = head(states)
    return logits if logits.dtype == torch.float64 else logits.float()


def _links(tokens: Tensor, candidates: Tensor) -> Tensor:
    """Row of each child among the next candidates; `[D, M, K]`, -1 where it is not one."""
    links = torch.full_like(tokens, -1)
    if candidates.shape[0]:
        equal = tokens[:-1, :, :, None] == candidates[:, None, None, :]
        found, row = equal.max(-1)
        links[:-1] = torch.where(found, row, -1)
    return links


def _to_numpy(tokens: Tensor, log_probs: Tensor, links: Tensor) -> TransitionTables:
    return TransitionTables(
        tokens.cpu().numpy(), log_probs.double().cpu().numpy(), links.cpu().numpy()
    )


def _check(top_m: int, top_k: int, temperature: float, shortlist: int | None) -> None:
    for name, value in (("top_m", top_m), ("top_k", top_k), ("shortlist", shortlist)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not temperature >= 0:
        raise ConfigError(f"drafter_temperature is {temperature}; it must be 0 or more")
