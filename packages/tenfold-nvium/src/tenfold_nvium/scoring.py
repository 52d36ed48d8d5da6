"""What a teacher-forced pass gives to evaluators: gates and heads of a text, token by token.

Shapes: `n` scored tokens, `K` exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tenfold.records import PromptRecord, Record
from torch import Tensor

from tenfold_nvium.exactness import prompt_of

if TYPE_CHECKING:
    from tenfold_nvium.lm import NviumLM


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """Token ids that are given, never empty, and those that are scored; `cut` tells whether
    the text was longer than what is scored."""

    before: list[int]
    ids: list[int]
    cut: bool


def scored_part(lm: NviumLM, record: Record, most: int) -> ScoredPart | None:
    """What a record asks to score: a prompt's reference behind its prompt, or else the text
    itself behind the token that texts start after; None for chat messages without a reference.

    At most `most` tokens, and no more than fit into the model's context.

    Raises:
        ConfigError: a record of another kind.
    """
    prompt: Any = prompt_of(record)
    text = record.reference if isinstance(record, PromptRecord) else None
    context = "" if text is None else prompt
    text = prompt if text is None else text
    if not isinstance(text, str):
        return None
    before, ids = lm.prompt_ids(context), lm.encode(text)
    room = min(most, max(0, lm.context_length - len(before)))
    return ScoredPart(before, ids[:room], len(ids) > room)


@torch.no_grad()
def gates_and_heads(
    lm: NviumLM, before: Sequence[int], ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Router log-odds `s_k [n, K-1]` and `log p_k(x_t) [n, K]` for the tokens `ids` behind
    `before`, in fp64 from one forward pass."""
    tokens = torch.tensor([[*before, *ids]], device=lm.device)
    # Nothing is predicted from the last token.
    inputs, gates = lm.model.exit_views(lm.model.exit_states(tokens[:, :-1]))
    start = len(before) - 1
    targets = tokens[:, start + 1 :]
    heads = lm.model.target_head_log_probs([a[:, start:] for a in inputs], targets)
    return gates[0, start:].double().cpu(), heads[0].double().cpu()
