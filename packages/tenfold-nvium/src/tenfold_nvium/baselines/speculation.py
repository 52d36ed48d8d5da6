"""Checking a draft against the model: how much of it stands, and which token comes after it.

Sampling is exact rejection sampling: with target p and draft q, a drafted token d is kept with
probability min(1, p(d) / q(d)); the first one that is not kept is replaced by a draw from the
residual max(p - q, 0), normalised. The result is a sample of p, whatever q is. Greedy decoding
keeps a token iff it is the target's arg-max, so the text is the dense model's, token for token.

Shapes: `d` drafted tokens, `V` vocabulary; everything stays on the device of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold_nvium.sampling import inverse_draw


def verify_greedy(target: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """`(kept [d], after [d + 1])`: whether each drafted token is the arg-max of `target
    [d + 1, V]`, and the token that follows when exactly the first i were kept."""
    best = target.argmax(-1)
    return best[:-1] == drafted, best


def verify_sampled(
    target: Tensor,
    draft: Tensor,
    drafted: Tensor,
    keep_uniforms: Tensor,
    draw_uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """`(kept [d], after [d + 1])` by rejection sampling.

    Args:
        target: `[d + 1, V]` log-probabilities of the model, for each drafted token and for the
            one after the last.
        draft: `[d, V]` log-probabilities that `drafted [d]` were drawn with.
        keep_uniforms: `[d]` numbers in [0, 1); token i is kept if `u q(d_i) < p(d_i)`.
        draw_uniforms: `[d + 1]` numbers for the token that follows the kept ones.
    """
    p, q = target.double().exp(), draft.double().exp()
    index = drafted[:, None]
    p_drafted, q_drafted = (x.gather(-1, index)[:, 0] for x in (p[:-1], q))
    # The second case, for a product that rounds up to p where nothing may be refused.
    kept = (keep_uniforms.double() * q_drafted < p_drafted) | (q_drafted <= p_drafted)
    # Nothing is subtracted from the last row: after a whole kept draft, p itself is drawn from.
    residual = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]])
    return kept, inverse_draw(residual.log(), draw_uniforms)


def kept_prefix(kept: Tensor) -> Tensor:
    """Number of drafted tokens before the first one that was not kept; a scalar tensor."""
    return kept.long().cumprod(0).sum()
