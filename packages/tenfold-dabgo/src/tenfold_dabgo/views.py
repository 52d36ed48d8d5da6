"""Ways to look at scores, and which methods have them. Imports nothing heavy: plans check it."""

from __future__ import annotations

from tenfold.errors import ConfigError

VIEWS = ("signed", "abs", "ascent", "descent")
ONE_SIDED = ("ascent", "descent")
"""Differences from the losses of the unchanged model; only DABGO moves a model two ways."""


def check_view(method: str, view: str | None) -> None:
    """Refuses a one-sided view of a method that has no two sides.

    Raises:
        ConfigError: the method has no such view.
    """
    if view in ONE_SIDED and method != "dabgo":
        raise ConfigError(
            f"view {view!r} exists for method dabgo only, not {method}",
            hint='use view = "signed" or "abs"',
        )
