"""Settings that are either a number or a rule: `0.001`, `auto:1.0`, `relative:1.5`."""

from __future__ import annotations

import math

from tenfold.errors import ConfigError


def number_or_prefixed(
    name: str, value: float | str, prefix: str, *, zero_allowed: bool = False
) -> tuple[bool, float]:
    """Whether `value` carries the prefix, and its number; a bare prefix means 1.0.

    Raises:
        ConfigError: neither form, or a number out of range.
    """
    text, prefixed = value, False
    if isinstance(value, str):
        head, colon, rest = value.partition(":")
        prefixed = head.strip() == prefix
        text = (rest if colon else "1.0") if prefixed else value
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"{name} is {value!r}; it must be a number or '{prefix}:<number>'"
        ) from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero_allowed):
        least = "0 or more" if zero_allowed else "more than 0"
        raise ConfigError(f"{name} is {value!r}; it must be {least}")
    return prefixed, number
