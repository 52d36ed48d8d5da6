"""Transition tables from one drafter pass: marginal candidates, then corrected children.

Stage 1 takes, per depth, the M most likely tokens of the marginal. Stage 2 corrects the state of
every depth for each candidate of the depth before, all in one batch: the correction looks back
one token only, so nothing has to wait for anything. Row 0 of a depth is its most likely candidate.

Shapes: `R` blocks, `D` drafted depths, `M` candidates, `K` children, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tenfold.errors import ConfigError
from torch import Tensor

from tenfold_treeflash.modeling import TreeFlashDraftModel
from tenfold_treeflash.tree import LEAF, TransitionTables

Head = Callable[[Tensor], Tensor]
"""States `[..., H]` to the target's logits `[..., V]`."""

_COLDEST = 1e-5


def transition_tables(
    drafter: TreeFlashDraftModel,
    hidden: Tensor,
    anchor: int,
    embedding: Tensor,
    head: Head,
    **settings: Any,
) -> TransitionTables:
    """Tables of one block with residual streams `hidden [D + 1, H]`; see `batch_tables`."""
    return batch_tables(drafter, hidden[None], [anchor], embedding, head, **settings)[0]


@torch.no_grad()
def batch_tables(
    drafter: TreeFlashDraftModel,
    hidden: Tensor,
    anchors: Sequence[int],
    embedding: Tensor,
    head: Head,
    *,
    top_m: int = 16,
    top_k: int = 16,
    temperature: float = 1.0,
    shortlist: int | None = None,
    marginal: bool = False,
) -> list[TransitionTables]:
    """Tables of a batch of blocks.

    Args:
        hidden: residual streams `[R, D + 1, H]` of the blocks' slots.
        anchors: token in slot 0 of each block.
        embedding: the target's input embeddings `[V, H]`.
        head: the target's output head.
        top_m: M, cut to the vocabulary.
        top_k: K, cut to the vocabulary.
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
    logits = _logits(head(drafter.model.norm(hidden[:, 1:]))) * scale
    _, depth, vocabulary = logits.shape
    rows, children = min(top_m, vocabulary), min(top_k, vocabulary)
    if marginal or drafter.looks_back == 0:
        tokens, log_probs = _best(logits, children)
        links = torch.zeros_like(tokens)
        links[:, -1] = LEAF
        return _to_numpy(tokens[:, :, None], log_probs[:, :, None], links[:, :, None])
    if drafter.looks_back != 1:
        raise ConfigError("trees need a drafter that looks back one token (swiglu or linear)")
    weight = getattr(head, "weight", None)
    short = shortlist is not None and shortlist < vocabulary and weight is not None
    listed = logits.topk(max(rows, children, shortlist or 0) if short else rows).indices
    candidates = listed[:, :-1, :rows]  # of depths 1 .. D-1
    first = torch.tensor(anchors, device=hidden.device)[:, None]
    # One row at depth 1, M at each further one, all in one batch.
    previous = torch.cat([first, candidates.flatten(1)], dim=1)
    states = torch.cat([hidden[:, 1:2], hidden[:, 2:].repeat_interleave(rows, dim=1)], dim=1)
    embedded = F.embedding(previous, embedding) * drafter.config.input_embedding_scale
    states = drafter.model.norm(drafter.correct(states, embedded[:, :, None]))
    places: Tensor | None = None
    if short:
        listed = listed[:, :, : max(shortlist or 0, children)]
        parts = [(states[:, None, :1], listed[:, :1])]
        if depth > 1:
            parts.append((states[:, 1:].unflatten(1, (depth - 1, rows)), listed[:, 1:]))
        chosen = [_best_listed(head, *part, scale, children) for part in parts]
        found = [torch.cat([c[i].flatten(1, 2) for c in chosen], dim=1) for i in range(3)]
        places = _by_depth(found.pop(), depth, rows, 0)
    else:
        found = _best(_logits(head(states)) * scale, children)
    tokens = _by_depth(found[0], depth, rows, 0)
    log_probs = _by_depth(found[1], depth, rows, -torch.inf)
    if places is None:
        return _to_numpy(tokens, log_probs, _links(tokens, candidates))
    # A depth's candidates are the head of its shortlist: a child's place there is its row.
    links = torch.where(places < rows, places, LEAF)
    links[:, -1] = LEAF
    return _to_numpy(tokens, log_probs, links)


def _by_depth(flat: Tensor, depth: int, rows: int, filler: float) -> Tensor:
    """One row of depth 1 and M of each further depth, `[R, 1 + (D - 1) M, K]`, as
    `[R, D, M, K]`."""
    table = flat.new_full((flat.shape[0], depth, rows, flat.shape[2]), filler)
    table[:, 0, :1] = flat[:, :1]
    if depth > 1:
        table[:, 1:] = flat[:, 1:].unflatten(1, (depth - 1, rows))
    return table


def _best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Best entries of `[..., V]` and their log-probabilities, `[..., count]`.

    Rounding must not lift a child above its parent: log-probabilities end at 0.
    """
    best = logits.topk(count)
    return best.indices, (best.values - logits.logsumexp(-1, keepdim=True)).clamp_(max=0)


def _best_listed(
    head: Any, states: Tensor, listed: Tensor, scale: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Best tokens, log-probabilities and places in the list `[R, d, M, K]` of `states
    [R, d, M, H]` among the tokens `listed [R, d, S]`."""
    logits = states @ F.embedding(listed, head.weight).transpose(-1, -2)
    bias = getattr(head, "bias", None)
    if bias is not None:
        logits = logits + bias[listed][:, :, None]
    finish = getattr(head, "finish", None)
    logits = _logits(logits if finish is None else finish(logits)) * scale
    places, log_probs = _best(logits, count)
    ids = listed[:, :, None].expand(-1, -1, states.shape[2], -1).gather(-1, places)
    return ids, log_probs, places


def _logits(logits: Tensor) -> Tensor:
    """Logits in fp32 or wider."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _links(tokens: Tensor, candidates: Tensor) -> Tensor:
    """Row of each child among the next candidates; `[R, D, M, K]`, `LEAF` where it is not one."""
    links = torch.full_like(tokens, LEAF)
    if candidates.shape[1]:
        equal = tokens[:, :-1, :, :, None] == candidates[:, :, None, None, :]
        found, row = equal.max(-1)
        links[:, :-1] = torch.where(found, row, LEAF)
    return links


def _to_numpy(tokens: Tensor, log_probs: Tensor, links: Tensor) -> list[TransitionTables]:
    """One record per block; an accelerator is waited for once, not three times."""
    parts: Any = (tokens, log_probs.double(), links)
    if tokens.is_cuda:
        parts = torch.stack([part.double() for part in parts]).cpu()
        parts = parts[0].long(), parts[1], parts[2].long()
    return [
        TransitionTables(*(part.numpy() for part in row))
        for row in zip(*(part.cpu() for part in parts), strict=True)
    ]


def _check(top_m: int, top_k: int, temperature: float, shortlist: int | None) -> None:
    for name, value in (("top_m", top_m), ("top_k", top_k), ("shortlist", shortlist)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not temperature >= 0:
        raise ConfigError(f"drafter_temperature is {temperature}; it must be 0 or more")
