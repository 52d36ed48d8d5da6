"""What changes over a baseline's training: loss weights, active exits, layer dropout.

Pure functions of the step `t` of `T`, of depths (1-based layer counts) and of the number of
layers `L`.
"""

from __future__ import annotations

from collections.abc import Sequence


def calm_weights(depths: Sequence[int], kind: str, ramp: float = 1.0) -> list[float]:
    """Loss weight of every head, the last one's included; they add up to 1.

    `depth` makes them proportional to the depth, `equal` equal. `ramp` in [0, 1] multiplies
    the early ones before they are normalised.
    """
    raw = [float(depth) if kind == "depth" else 1.0 for depth in depths]
    raw[:-1] = [weight * ramp for weight in raw[:-1]]
    return [weight / sum(raw) for weight in raw]


def linear_ramp(step: int, total: int, share: float) -> float:
    """`(t + 1) / (share T)`, at most 1; 1 throughout when `share` is 0. Never 0, so that every
    head has a gradient at every step."""
    return min(1.0, (step + 1) / (share * total)) if share > 0 else 1.0


def active_exits(
    curriculum: str, count: int, step: int, total: int, layers: int, period: int
) -> list[int]:
    """Indices (0-based) of the `count` early exits that have a loss at step t.

    `gradual` starts with the deepest exit and adds one every `T / 2L` steps. `rotational`
    takes every period-th exit, starting one further each step; the period is cut to the number
    of exits, so that each step has one.
    """
    if curriculum == "gradual":
        shown = min(count, 1 + step * 2 * layers // max(1, total))
        return list(range(count - shown, count))
    if curriculum == "rotational":
        cycle = max(1, min(period, count))
        return [k for k in range(count) if k % cycle == step % cycle]
    return list(range(count))


def layerskip_weights(depths: Sequence[int], active: Sequence[int], scale: float) -> list[float]:
    """Loss weight of every head: the last one's is 1; active early ones are proportional to
    `depth^2` (the paper's (l + 1)^2 of the 0-based layer l before the exit) and add up to
    `scale`, others are 0."""
    squares = {k: float(depths[k]) ** 2 for k in active}
    total = sum(squares.values())
    early = [scale * squares[k] / total if k in squares else 0.0 for k in range(len(depths) - 1)]
    return [*early, 1.0]


def dropout_rates(
    layers: int, step: int, total: int, largest: float, curriculum: str
) -> list[float]:
    """Probability of skipping each layer at step t: `S(t) D(l) p_max` with
    `D(l) = 2^(l / (L - 1)) - 1`, and `S(t) = 2^(t / T) - 1` when rising, else 1. The first
    layer is never skipped."""
    rise = 2.0 ** (step / max(1, total)) - 1.0 if curriculum == "rising" else 1.0
    return [rise * (2.0 ** (i / max(1, layers - 1)) - 1.0) * largest for i in range(layers)]
