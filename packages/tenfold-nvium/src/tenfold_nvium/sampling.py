"""From scores to a token: warping and inverse-distribution sampling with a given uniform.

Shapes: `b` rows, `V` vocabulary. Warping is the usual temperature, top-k, top-p, min-p, in the
order of transformers. Applied to one head's scores ("head" scope) it does *not* give the warped
mixture: `sum_k pi_k warp(p_k) != warp(sum_k pi_k p_k)`; the "mixture" scope needs all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tenfold.errors import ConfigError
from torch import Tensor

SCOPES = ("head", "mixture")


@dataclass(frozen=True, slots=True)
class Warp:
    """How scores are sharpened and cut before a token is drawn. Temperature 0 takes the
    arg-max."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0, "temperature", self.temperature, "0 (arg-max) or more"),
            (self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "None or at least 1"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)"),
        )
        for ok, name, value, right in checks:
            if not ok:
                raise ConfigError(f"{name} is {value}; it must be {right}")

    @property
    def changes_distribution(self) -> bool:
        """Whether drawing with it differs from drawing with the plain distribution."""
        return self != Warp()

    def log_probs(self, scores: Tensor) -> Tensor:
        """Warped log-distribution `[b, V]` in fp32 or wider from logits or log-probabilities;
        temperature 0 is left to the caller."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.temperature not in (0, 1):
            scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            limit = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < limit, -torch.inf)
        if self.top_p < 1:
            scores = _nucleus(scores, self.top_p)
        if self.min_p > 0:
            probs = scores.softmax(-1)
            low = probs < self.min_p * probs.max(-1, keepdim=True).values
            scores = scores.masked_fill(low, -torch.inf)
        return scores.log_softmax(-1)


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose mass reaches `top_p`."""
    ordered, order = scores.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return scores.masked_fill(dropped, -torch.inf)


def inverse_draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `[b]` with cumulative probability just above `uniforms [b]` (in [0, 1))."""
    total = log_probs.double().exp().cumsum(-1)
    mass = total[..., -1:].contiguous()
    index = torch.searchsorted(total, uniforms.double()[:, None] * mass, right=True)
    # Rounding may place the target on the total mass itself; the last token with any
    # probability is the right answer then.
    last = torch.searchsorted(total, mass)
    return torch.minimum(index, last)[:, 0]


def draw(scores: Tensor, warp: Warp, uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Next tokens `[b]` and their log-probabilities `[b]` under the warped distribution
    (for an arg-max: under the unwarped one)."""
    log_probs = warp.log_probs(scores)
    if warp.temperature == 0:
        tokens = log_probs.argmax(-1)
    else:
        numbers = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)
        tokens = inverse_draw(log_probs, numbers)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]
