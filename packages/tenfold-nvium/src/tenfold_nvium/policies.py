"""Exit policies: where a token leaves the model, and what its next token is drawn from.

| policy | leaves at exit k when | next token from | exact for |
|---|---|---|---|
| `SampleExit` | u < sigma((s_k + delta) / T) | head k | the mixture, at T = 1 and delta = 0 |
| `GreedyRouter` | g_k > 1/2 | head k | nothing; the fastest |
| `FixedExit` | k is the given one | head k | that head |
| `FullDepth` | never | all heads, mixed | the mixture, under any warping |
| `CertifiedGreedy` | the arg-max is decided | all heads so far | the mixture's arg-max |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tenfold.errors import ConfigError, nearest


@dataclass(frozen=True)
class ExitPolicy:
    """Decides, exit by exit, whether a token leaves.

    `mixes` tells the decoder to evaluate every visited head and to accumulate the mixture;
    `certifies` to leave as soon as the arg-max of the whole mixture is decided.
    """

    name: ClassVar[str] = ""
    mixes: ClassVar[bool] = False
    certifies: ClassVar[bool] = False

    def leaves(self, exit_index: int, log_odds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Which tokens leave at early exit `exit_index` (0-based): boolean `[b]` from the
        router's log-odds `[b]` and the positions' uniform random numbers in [0, 1) `[b]`."""
        return np.zeros(len(log_odds), dtype=bool)

    def leaves_one(self, exit_index: int, log_odds: float, uniform: float) -> bool:
        """`leaves` for a single token; overridden where plain numbers are quicker."""
        return bool(self.leaves(exit_index, np.array([log_odds]), np.array([uniform]))[0])


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """`log sigmoid(x)`, without overflow."""
    return np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, without overflow."""
    return np.exp(log_sigmoid(x))


@dataclass(frozen=True)
class SampleExit(ExitPolicy):
    """Samples the exit: token and exit together follow the mixture.

    `offset` is added to every router's log-odds and `temperature` divides the sum; anything but
    0 and 1 draws from another mixture (a higher offset from a shallower, faster one).
    """

    name: ClassVar[str] = "sample"
    temperature: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"router temperature is {self.temperature}; above 0 (for 0 use GreedyRouter)"
            )
        if not math.isfinite(self.offset):
            raise ConfigError(
                f"router offset is {self.offset}; a finite number (fixed:<exit> opens one exit)"
            )

    def leaves(self, exit_index: int, log_odds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """`u < g_k`."""
        return uniform < sigmoid((log_odds + self.offset) / self.temperature)

    def leaves_one(self, exit_index: int, log_odds: float, uniform: float) -> bool:
        """See `ExitPolicy`."""
        x = (log_odds + self.offset) / self.temperature
        return uniform < math.exp(min(x, 0.0) - math.log1p(math.exp(-abs(x))))


@dataclass(frozen=True)
class GreedyRouter(ExitPolicy):
    """Leaves at the first exit whose router says more likely than not. Not exact: the text
    follows neither the mixture nor its arg-max."""

    name: ClassVar[str] = "greedy-router"

    def leaves(self, exit_index: int, log_odds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """`g_k > 1/2`."""
        return log_odds > 0


@dataclass(frozen=True)
class FixedExit(ExitPolicy):
    """Always leaves at the same exit (0-based; the last one is K - 1)."""

    name: ClassVar[str] = "fixed"
    exit_index: int = 0

    def __post_init__(self) -> None:
        if self.exit_index < 0:
            raise ConfigError(f"fixed:{self.exit_index + 1}: exits are counted from 1")

    def leaves(self, exit_index: int, log_odds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Whether this is the exit."""
        return np.full(len(log_odds), exit_index == self.exit_index)


@dataclass(frozen=True)
class ScriptedExit(ExitPolicy):
    """Leaves where the random numbers say, whatever the routers answer: `u < 1/2`. Together
    with `ScriptedNoise` for exactness checks and timings along chosen exit patterns."""

    name: ClassVar[str] = "scripted"

    def leaves(self, exit_index: int, log_odds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """`u < 1/2`."""
        return uniform < 0.5

    def leaves_one(self, exit_index: int, log_odds: float, uniform: float) -> bool:
        """See `ExitPolicy`."""
        return uniform < 0.5


@dataclass(frozen=True)
class FullDepth(ExitPolicy):
    """Runs all layers and mixes all heads: the reference, without any saving."""

    name: ClassVar[str] = "full"
    mixes: ClassVar[bool] = True


@dataclass(frozen=True)
class CertifiedGreedy(ExitPolicy):
    """Greedy decoding of the mixture that stops as soon as its arg-max is certain.

    With `M(y) = sum_{j<=k} pi_j p_j(y)` and remaining mass `R = prod_{j<=k} (1 - g_j)`, the
    arg-max is decided once `top1(M) - top2(M) > R`. Equal to `FullDepth` with arg-max, token
    for token.
    """

    name: ClassVar[str] = "certified"
    mixes: ClassVar[bool] = True
    certifies: ClassVar[bool] = True


AUTO = "auto"
"""Name of the policy that a call decides: certified when greedy, sampling exits otherwise."""

POLICIES: dict[str, type[ExitPolicy]] = {
    policy.name: policy
    for policy in (SampleExit, GreedyRouter, FixedExit, FullDepth, CertifiedGreedy)
}


def make_policy(policy: str | ExitPolicy) -> ExitPolicy:
    """A policy from its name; `fixed:2` leaves at exit 2 (1-based), `sample:0.8` samples
    exits at router temperature 0.8, `sample:1:0.5` with 0.5 added to the log-odds.

    Raises:
        ConfigError: unknown name, or a bad argument.
    """
    if isinstance(policy, ExitPolicy):
        return policy
    name, _, argument = policy.partition(":")
    if name not in POLICIES:
        raise ConfigError(
            f"unknown decode policy {policy!r}{nearest(name, POLICIES)} "
            f"(known: {', '.join(POLICIES)}, fixed:<exit>, "
            "sample:<temperature>[:<offset>])"
        )
    if not argument:
        return POLICIES[name]()
    try:
        if name == "fixed":
            return FixedExit(int(argument) - 1)
        if name == "sample":
            temperature, _, offset = argument.partition(":")
            return SampleExit(float(temperature), float(offset or 0))
    except ValueError:
        pass
    raise ConfigError(f"decode policy {policy!r}: {argument!r} is no argument for {name!r}")


def check_policy(policy: ExitPolicy, num_exits: int) -> None:
    """Raises ConfigError for a fixed exit that a model of so many exits does not have."""
    if isinstance(policy, FixedExit) and policy.exit_index >= num_exits:
        raise ConfigError(
            f"exit {policy.exit_index + 1} does not exist; the model has {num_exits} exits"
        )
