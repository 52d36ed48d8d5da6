"""What deferral can save: a model of decoding time, fitted to measured segments.

A segment that runs on a block of `w` tokens costs `c_m(w)` seconds, measured on the machine; a
token costs a fixed time besides (embedding, one head, drawing). Then (paper "Decoding cost")

    T = fixed + sum_m rho_m E[c_m(W_m)]

where segment m runs with probability `rho_m` per token, on all tokens deferred since its last run.
With `c(w) = a + b w` and many layers this is `L (a d + b)`: the saving tends to `1 / d` (expected
normalised depth d) when reading weights dominates (`b << a`), and to nothing when arithmetic does.
Routers, adapters and bookkeeping are not in it: it is the limit for a decoder without overhead.

Units: seconds. Segments are 0-based, K of them; widths are numbers of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tenfold.errors import ConfigError

from tenfold_nvium.block import SoloBlock
from tenfold_nvium.cache import NviumCache
from tenfold_nvium.cascade import cascade, embed
from tenfold_nvium.layers import SegmentRunner
from tenfold_nvium.policies import FixedExit
from tenfold_nvium.sampling import Warp, draw

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Block widths that are measured."""

WidthCounts = Sequence[Mapping[int, int]]
"""Per segment: how often it ran on a block of each width."""


@dataclass(frozen=True, slots=True)
class SpeedModel:
    """Time of decoding, from the cost of each segment by width.

    Attributes:
        costs: per segment `{width: seconds}`, at least width 1.
        fixed: seconds per token outside the segments.
    """

    costs: tuple[dict[int, float], ...]
    fixed: float

    @classmethod
    def fit(cls, costs: Sequence[Mapping[int, float]], fixed: float) -> SpeedModel:
        """A model from measured times.

        Raises:
            ConfigError: a segment without the cost of width 1.
        """
        for m, by_width in enumerate(costs):
            if 1 not in by_width:
                raise ConfigError(f"segment {m + 1}: the cost of a block of 1 token is missing")
        return cls(tuple(dict(sorted(by_width.items())) for by_width in costs), fixed)

    def cost(self, segment: int, width: int) -> float:
        """Seconds of a segment on `width` tokens: between measured widths on the line between
        them, beyond the last on the line through the last two."""
        table = self.costs[segment]
        widths, values = list(table), list(table.values())
        if width <= widths[-1] or len(widths) == 1:
            return float(np.interp(width, widths, values))
        slope = (values[-1] - values[-2]) / (widths[-1] - widths[-2])
        return values[-1] + max(slope, 0.0) * (width - widths[-1])

    @property
    def dense(self) -> float:
        """Seconds per token without any exit: every segment on one token."""
        return self.fixed + sum(table[1] for table in self.costs)

    def of_widths(self, counts: WidthCounts, tokens: int) -> float:
        """Seconds per token for what a decoder really ran: blocks per segment and width over
        `tokens` tokens."""
        total = sum(
            n * self.cost(segment, width)
            for segment, by_width in enumerate(counts)
            for width, n in by_width.items()
        )
        return self.fixed + total / tokens

    def of_shares(self, shares: Sequence[float]) -> float:
        """Expected seconds per token when tokens leave independently, at exit k with probability
        `shares[k]`: the block of segment m is then geometric with mean `1 / rho_m`.

        Raises:
            ConfigError: not one share per segment, or they do not add up to 1.
        """
        if len(shares) != len(self.costs) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise ConfigError(
                f"exit shares {list(shares)} must be {len(self.costs)} numbers that add up to 1"
            )
        total = self.fixed
        for segment in range(len(self.costs)):
            reach = sum(shares[segment:])
            if reach > 0:
                total += reach * self._expected_cost(segment, reach)
        return total

    def _expected_cost(self, segment: int, reach: float) -> float:
        """`E[c(W)]` for geometric W with success probability `reach`."""
        # Past the last measured width the cost is a line, so the mean of the tail is enough.
        last = max(self.costs[segment])
        total, left = 0.0, 1.0
        for width in range(1, last + 1):
            total += left * reach * self.cost(segment, width)
            left *= 1 - reach
        if left > 0:
            beyond = last + 1 / reach
            low, high = self.cost(segment, int(beyond)), self.cost(segment, int(beyond) + 1)
            total += left * (low + (high - low) * (beyond - int(beyond)))
        return total

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "costs": [{str(w): s for w, s in table.items()} for table in self.costs],
            "fixed": self.fixed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeedModel:
        """From `to_dict`."""
        costs = [{int(w): float(s) for w, s in table.items()} for table in values["costs"]]
        return cls.fit(costs, float(values["fixed"]))


def merged(models: Sequence[SpeedModel]) -> SpeedModel:
    """The median of several measurements of the same model, number by number."""
    costs = [
        {width: float(np.median([m.costs[k][width] for m in models])) for width in table}
        for k, table in enumerate(models[0].costs)
    ]
    return SpeedModel.fit(costs, float(np.median([m.fixed for m in models])))


@torch.inference_mode()
def measure(
    model: NviumForCausalLM,
    runner: SegmentRunner,
    *,
    context: int = 128,
    widths: Sequence[int] = WIDTHS,
    repeats: int = 5,
) -> SpeedModel:
    """Times every segment on blocks of each width behind `context` positions, and the fixed part
    of a token; medians over `repeats`, widths taking turns.

    Segments run in order, as they do in decoding, so that a segment finds its weights as cold as
    the others have left them.

    Raises:
        ConfigError: context and widths do not fit into the model's context.
    """
    limit = model.config.max_position_embeddings
    if context + max(widths) > limit:
        raise ConfigError(
            f"context {context} and width {max(widths)} exceed the model's context of {limit}"
        )
    cache, row = NviumCache(model.config, 1), np.zeros(1, dtype=np.int64)
    tokens = [i % model.config.vocab_size for i in range(context)]
    embed(model, cache, row, [tokens])
    cascade(
        model, runner, cache, row, FixedExit(cache.segments - 1),
        np.zeros((1, cache.segments)), deep=True,
    )  # fmt: skip
    times: list[dict[int, list[float]]] = [{w: [] for w in widths} for _ in range(cache.segments)]
    fixed = []
    for _ in range(repeats + 1):
        for width in widths:
            block = SoloBlock(context, width, model.device)
            states = model.model.embed_tokens(torch.arange(width, device=model.device))
            for segment, by_width in enumerate(times):
                started = _now(model.device)
                states = runner.run(segment, states, block, cache)
                by_width[width].append(_now(model.device) - started)
            if width == 1:
                fixed.append(_fixed(model, runner, states))
    costs = [{w: float(np.median(v[1:])) for w, v in by_width.items()} for by_width in times]
    return SpeedModel.fit(costs, float(np.median(fixed[1:])))


def _fixed(model: NviumForCausalLM, runner: SegmentRunner, states: torch.Tensor) -> float:
    """Seconds of a token's embedding, last norm and head, and of drawing the next token."""
    started = _now(model.device)
    cache = NviumCache(model.config, 1)
    embed(model, cache, np.zeros(1, dtype=np.int64), [[0]])
    tokens, _ = draw(runner.exits[-1].logits(states), Warp(), [0.5])
    tokens.tolist()
    return _now(model.device) - started


def _now(device: torch.device) -> float:
    """The clock, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
