"""Feedback control of the compute penalty (paper "Adaptive compute penalty").

After every evaluation the controller compares the mixture's validation loss with that of a
dense baseline at the nearest recorded step. Head-room (we are better) raises the penalty beta,
a deficit lowers it:

    gap = CE_base(step) - NLL_mix
    |gap| < dead_band     beta stays
    gap > 0               beta += min(k_up gap, max_step), at most max_weight
    gap < 0               beta += max(k_down gap, -max_step), at least min_weight

A pure object: same inputs, same beta, on every process.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError
from tenfold.files import write_json

FORMAT = "nvium-baseline/1"


@dataclass(frozen=True, slots=True)
class BaselineCurve:
    """Validation cross-entropy (nats per token) of a dense baseline by optimiser step.

    `facts` describe the run it came from: dataset fingerprint, vocabulary hash, model. A curve
    of other data is no baseline; `check` compares.
    """

    values: Mapping[int, float]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for an empty curve or a value that is no finite number."""
        if not self.values:
            raise ConfigError("the baseline curve is empty; it needs at least one evaluation")
        for step, value in self.values.items():
            if not math.isfinite(value) or step < 0:
                raise ConfigError(f"the baseline curve has the value {value} at step {step}")

    @classmethod
    def constant(cls, value: float, **facts: Any) -> BaselineCurve:
        """The same target at every step, e.g. the loss of a base model being converted."""
        return cls({0: value}, facts)

    @classmethod
    def load(cls, path: Path | str) -> BaselineCurve:
        """Reads our form (`{"format", "facts", "values"}`) or a bare `{step: loss}` object.

        Raises:
            ConfigError: no such file, or not such a curve.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read the baseline curve {path}: {error.strerror}",
                hint="train the dense baseline first (dense = true); it writes baseline.json",
            ) from None
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        rows = data.get("values", data) if isinstance(data, dict) else None
        try:
            values = {int(step): float(value) for step, value in dict(rows or {}).items()}
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: a baseline curve maps steps to losses") from None
        facts = data.get("facts", {}) if isinstance(data, dict) and "values" in data else {}
        return cls(values, facts)

    def save(self, path: Path) -> None:
        """Writes the curve atomically."""
        rows = {str(step): self.values[step] for step in sorted(self.values)}
        write_json(path, {"format": FORMAT, "facts": dict(self.facts), "values": rows})

    def at(self, step: int, mode: str = "nearest") -> float:
        """The loss at a step: of the `nearest` recorded one (the earlier of two), or `linear`
        between its neighbours."""
        steps = sorted(self.values)
        place = bisect.bisect_left(steps, step)
        if place == 0:
            return self.values[steps[0]]
        if place == len(steps):
            return self.values[steps[-1]]
        before, after = steps[place - 1], steps[place]
        if mode == "linear":
            share = (step - before) / (after - before)
            return (1 - share) * self.values[before] + share * self.values[after]
        return self.values[before if step - before <= after - step else after]

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raises ConfigError when a fact known on both sides differs."""
        for name, value in facts.items():
            if name in self.facts and self.facts[name] != value:
                raise ConfigError(
                    f"the baseline curve was measured with another {name}: "
                    f"{self.facts[name]!r} there, {value!r} here",
                    hint="train the baseline on the same data with the same tokenizer",
                )


@dataclass(slots=True)
class ComputePenaltyController:
    """Moves beta after every evaluation; see the module.

    Defaults are those of the published configuration. Its 1.5B run used `k_up` 8 and no
    `max_step`, but moved beta on one of four processes only, so that a quarter of each move
    took effect; `gain_scale` 0.25 reproduces that strength on purpose.
    """

    baseline: BaselineCurve
    beta: float = 0.15
    k_up: float = 4.0
    k_down: float = 4.0
    dead_band: float = 0.005
    max_step: float = 0.2
    min_weight: float = 0.0
    max_weight: float = 10.0
    gain_scale: float = 1.0
    history: list[tuple[int, float, float]] = field(default_factory=list)
    """`(step, gap, beta after the move)` of every evaluation."""

    def __post_init__(self) -> None:
        """Raises ConfigError for limits that contradict each other."""
        if not 0 <= self.min_weight <= self.max_weight:
            raise ConfigError(
                f"penalty limits {self.min_weight}..{self.max_weight}: 0 <= min <= max needed"
            )
        if min(self.k_up, self.k_down, self.max_step, self.dead_band, self.gain_scale) < 0:
            raise ConfigError("controller gains, max_step and dead_band must not be negative")

    def step(self, step: int, nll: float) -> float:
        """The new beta after an evaluation at `step` with mixture loss `nll` (nats)."""
        gap = self.baseline.at(step) - nll
        if abs(gap) >= self.dead_band and math.isfinite(gap):
            if gap > 0:
                move = min(self.gain_scale * self.k_up * gap, self.max_step)
                self.beta = min(self.beta + move, self.max_weight)
            else:
                move = max(self.gain_scale * self.k_down * gap, -self.max_step)
                self.beta = max(self.beta + move, self.min_weight)
        self.history.append((step, gap, self.beta))
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as JSON values."""
        return {"beta": self.beta, "history": [list(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self.beta = float(state["beta"])
        self.history = [(int(s), float(g), float(b)) for s, g, b in state["history"]]
