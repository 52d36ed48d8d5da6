"""How sure an exit is of its prediction: CALM's measures, one number per token, at most 1.

| measure | value |
|---|---|
| `max_prob` | probability of the likeliest token |
| `margin` | likeliest minus second likeliest probability |
| `saturation` | cosine of the residual streams at this exit and at the one before it |

For the first exit's saturation "the one before" is the embedded token. Measures read the plain
distribution: temperature and truncation change what is drawn, not where a token leaves. All are
in fp32 or wider. Shapes: `b` tokens, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold_nvium.mixture import in_full_precision

MEASURES = ("max_prob", "margin", "saturation")


def top_confidence(logits: Tensor, measure: str) -> Tensor:
    """`max_prob` or `margin` `[b]` of `logits [b, V]`."""
    logits = in_full_precision(logits)
    count = min(2 if measure == "margin" else 1, logits.shape[-1])
    top = (logits.topk(count).values - logits.logsumexp(-1, keepdim=True)).exp()
    return top[:, 0] - top[:, 1] if count == 2 else top[:, 0]


def saturation(state: Tensor, before: Tensor) -> Tensor:
    """Cosine `[b]` of `state [b, H]` and `before [b, H]`."""
    state, before = in_full_precision(state), in_full_precision(before)
    return torch.cosine_similarity(state, before, dim=-1)
