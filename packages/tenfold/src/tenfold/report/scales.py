"""Axes and color levels: from data values to positions, ticks and shades."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEVELS = 12
"""Shades per sign of the diverging scale."""

_LARGEST = 1e300  # keeps differences of two values finite


def finite(values: Iterable[float | None]) -> list[float]:
    """The finite values, clipped so that their differences stay finite."""
    kept = (float(v) for v in values if v is not None)
    return [min(max(v, -_LARGEST), _LARGEST) for v in kept if math.isfinite(v)]


def heat_scale(values: Sequence[float | None], scale: float | None) -> float:
    """The absolute value that gets the full color; 1 when there is nothing to scale by."""
    if scale is not None and math.isfinite(scale) and scale > 0:
        return scale
    return max((abs(v) for v in finite(values)), default=0.0) or 1.0


def heat_level(value: float | None, scale: float) -> int:
    """Shade of a value: `-LEVELS..LEVELS`, 0 neutral, linear in the value, clipped at `scale`."""
    if value is None or math.isnan(value):
        return 0
    return round(max(-1.0, min(1.0, value / scale)) * LEVELS)


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic axis over `[low, high]`."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def position(self, value: float) -> float:
        """Where a value lies between the axis' ends, 0 to 1."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def fit_axis(values: Iterable[float], *, log: bool = False, zero: bool = False) -> Axis:
    """The axis that shows `values`, its ends on round numbers; `zero` includes 0.

    A logarithmic axis ignores values that are not positive.
    """
    kept = finite(values)
    if log:
        kept = [v for v in kept if v > 0]
    if zero and not log:
        kept.append(0.0)
    low, high = (min(kept), max(kept)) if kept else (1.0 if log else 0.0, 1.0)
    return _log_axis(low, high) if log else _linear_axis(low, high)


def _linear_axis(low: float, high: float) -> Axis:
    if high - low <= abs(high) * 1e-9:
        room = abs(high) * 0.1 or 0.5
        low, high = low - room, high + room
    step = _round_step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(n * step for n in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], False, ticks)


def _round_step(raw: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)


def _log_axis(low: float, high: float) -> Axis:
    if high <= low * 1.001:
        low, high = low / 2, high * 2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    stride = max(1, (last - first) // 8)
    ticks = [f * 10.0**p for p in range(first, last + 1, stride) for f in factors]
    inside = tuple(t for t in ticks if low * 0.999 <= t <= high * 1.001)
    return Axis(low, high, True, inside or (low, high))


def tick_label(value: float, ticks: Sequence[float], *, log: bool = False) -> str:
    """A tick's text, with as many decimals as the distance between ticks needs."""
    magnitude = max(abs(t) for t in ticks)
    if value == 0 or (magnitude and abs(value) < magnitude * 1e-9):
        return "0"
    if magnitude >= 1e6 or (magnitude < 1e-3 and not log) or (log and abs(value) < 1e-3):
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")
    step = abs(value) if log or len(ticks) < 2 else ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "−")
