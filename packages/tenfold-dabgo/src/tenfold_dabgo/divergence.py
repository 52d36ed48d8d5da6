"""How far a perturbed model's predictions moved on the query: KL(theta_0 || theta)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tenfold.capabilities import supports
from torch import Tensor

from tenfold_dabgo.queries import Query


def kl_to_now(model: Any, query: Query) -> Callable[[], float] | None:
    """A function giving KL(theta_0 || theta) in nats per scored token of the query.

    theta_0 are the weights at the time of this call, theta those at the time of the returned
    function's call. None for models without the `step` capability, which offer no logits.
    """
    if not supports(model, "step"):
        return None
    reference = _log_probs(model, query)

    def divergence() -> float:
        now = _log_probs(model, query)
        return float((reference.exp() * (reference - now)).sum(dim=-1).mean())

    return divergence


@torch.no_grad()
def _log_probs(model: Any, query: Query) -> Tensor:
    """`[n, V]` predicted log-probabilities at the scored positions."""
    batch = query.batch(next(iter(model.module().parameters())).device)
    logits = model.start(batch.input_ids)[1].logits
    low, high = query.scored
    return logits[0, low - 1 : high - 1].double().log_softmax(dim=-1)
