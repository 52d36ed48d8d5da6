"""Configurations of the baselines: an `NviumConfig` without routers and adapters.

`exit_layers` are the depths whose predictions are trained, and the only ones from which a
decoder may leave or draft. Both models have the parameters of a dense model of the same shape
(CALM: one norm more per early exit), so the N-vium's parameter-matched dense width fits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tenfold.errors import ConfigError, nearest

from tenfold_nvium.configuration import NviumConfig

EXIT_NORMS = ("own", "shared")
EXIT_WEIGHTS = ("depth", "equal")
EXIT_CURRICULA = ("all", "gradual", "rotational")
DROPOUT_CURRICULA = ("rising", "constant")


class _ExitConfig(NviumConfig):
    """What both baselines have in common; not used by itself."""

    model_type: ClassVar[str] = "nvium-baseline"

    def __post_init__(self, **kwargs: Any) -> None:
        self.adapter_size, self.final_adapter = 0, False
        self.compute_penalty, self.compute_cost = 0.0, None
        if self.exit_head_tying != "lm_head":
            raise ConfigError(
                f"exit_head_tying is {self.exit_head_tying!r}; CALM and LayerSkip read every "
                "exit with the shared head, so it must be 'lm_head'"
            )
        super().__post_init__(**kwargs)


class CalmConfig(_ExitConfig):
    """Configuration of `CalmForCausalLM`.

    Attributes:
        exit_norms: `own`: every early exit has a norm of its own; `shared`: all use the final
            one.
        exit_weights: weights of the heads' losses, the last one's included: proportional to
            `depth`, or `equal`. They add up to 1.
        exit_ramp: share of the training steps over which the early heads' weights rise linearly
            from 0; 0 gives them their weight at once.
    """

    model_type: ClassVar[str] = "nvium-calm"

    exit_norms: str = "own"
    exit_weights: str = "depth"
    exit_ramp: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("exit_norms", self.exit_norms, EXIT_NORMS)
        check_choice("exit_weights", self.exit_weights, EXIT_WEIGHTS)
        check_range("exit_ramp", self.exit_ramp, 0.0, 1.0)


class LayerSkipConfig(_ExitConfig):
    """Configuration of `LayerSkipForCausalLM`.

    Attributes:
        exit_curriculum: which early heads have a loss at a step: `all`, `gradual` (one more,
            from the deepest on, every T / 2L steps) or `rotational` (every `exit_period`-th,
            another one each step).
        exit_period: period of the rotation; at most the number of early exits counts.
        exit_scale: factor of the early heads' loss against the last head's.
        layer_dropout: largest probability p_max that a layer is skipped for a row in training.
        dropout_curriculum: `rising` (2^(t/T) - 1 of it at step t of T; for training from
            scratch) or `constant`.
    """

    model_type: ClassVar[str] = "nvium-layerskip"

    exit_curriculum: str = "rotational"
    exit_period: int = 8
    exit_scale: float = 1.0
    layer_dropout: float = 0.1
    dropout_curriculum: str = "rising"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("exit_curriculum", self.exit_curriculum, EXIT_CURRICULA)
        check_choice("dropout_curriculum", self.dropout_curriculum, DROPOUT_CURRICULA)
        check_range("layer_dropout", self.layer_dropout, 0.0, 0.99)
        check_range("exit_scale", self.exit_scale, 0.0, float("inf"))
        if self.exit_period < 1:
            raise ConfigError(f"exit_period is {self.exit_period}; it must be at least 1")


def every_second_layer(num_layers: int) -> list[int]:
    """Depths 2, 4, ... below L, LayerSkip's own choice; depth 1 where there is no other."""
    if num_layers < 2:
        raise ConfigError(f"an early exit needs at least 2 layers; the model has {num_layers}")
    return list(range(2, num_layers, 2)) or [1]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError when `value` is none of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{name} {value!r} must be one of {', '.join(choices)}{nearest(value, choices)}"
        )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError when `value` is outside `[low, high]`."""
    if not low <= value <= high:
        right = f"{low:g} or more" if high == float("inf") else f"in {low:g}..{high:g}"
        raise ConfigError(f"{name} is {value}; it must be {right}")
