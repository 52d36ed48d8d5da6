"""Capabilities that the host makes from others, automatically, and records in the run.

The planner reads `ADAPTERS`, so nothing heavy is imported here; building an adapter does.
"""

from __future__ import annotations

from typing import Any

ADAPTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "score": (("loss", "tokenize"), "tenfold.adapters:score_from_loss"),
    "generate": (("step", "tokenize"), "tenfold.adapters:generate_from_step"),
}
"""Capability → what it is made from, and the callable that wraps a model with it."""


def score_from_loss(model: Any) -> Any:
    """A model with `loss` and `tokenize`, and `score` added: minus the token losses."""
    from tenfold.lm.adapted import ScoreFromLoss

    return ScoreFromLoss(model)


def generate_from_step(model: Any) -> Any:
    """A model with `step` and `tokenize`, and `generate` added: token by token."""
    from tenfold.lm.adapted import GenerateFromStep

    return GenerateFromStep(model)
