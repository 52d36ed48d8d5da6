"""The noise floor: how small a score can be before rounding decides the ranking.

Scores are differences of nearly equal losses. Rounding is measured, not guessed: a probe of
samples is scored once in the usual batches and once row by row, in single precision at least;
exact arithmetic would give the same numbers, so the difference is noise. (Two runs in the same
lower precision would share their roundings and look better than they are.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tenfold.errors import ConfigError, RunFailed
from torch import Tensor

from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.losses import LossPass
from tenfold_dabgo.scores import spearman
from tenfold_dabgo.weights import Weights

PROBE_SAMPLES = 8
LOW_PRECISION_PROBE = 256
SAFE_RATIO = 10.0
"""Below this ratio of a typical score to the noise, rankings of typical samples are doubtful."""
LOW_PRECISION_AGREEMENT = 0.98
"""Rank correlation with single precision that a lower precision has to reach on a probe."""


@dataclass(frozen=True, slots=True)
class NoiseReport:
    """Noise of one score, nats/token: its root mean square `floor`, the median |score|, their
    ratio, and the share of weights that the perturbation changed at all."""

    floor: float
    median_score: float
    ratio: float
    weights_moved: float

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)

    def warning(self) -> str:
        """A sentence when rankings are doubtful, else an empty string."""
        if self.ratio >= SAFE_RATIO:
            return ""
        return (
            f"typical scores ({self.median_score:.1e}) are only {self.ratio:.1f} times the "
            f"rounding noise ({self.floor:.1e} nats/token): use a larger step"
        )


def probe_indices(dataset: TokenDataset, count: int, among: np.ndarray | None = None) -> np.ndarray:
    """Evenly spaced scorable samples, `among [N]` (bool) where given."""
    usable = np.flatnonzero(dataset.scorable if among is None else dataset.scorable & among)
    picks = np.linspace(0, max(len(usable) - 1, 0), min(count, len(usable)))
    return usable[np.unique(picks.round().astype(int))] if len(usable) else usable


def noise_floor(
    passes: LossPass,
    base: Weights,
    scores: np.ndarray,
    means: Mapping[str, np.ndarray] | None = None,
) -> NoiseReport:
    """Measures the noise of `scores [N]`, the differences of a pass's two weight sets.

    A few samples are evaluated again, each alone; `means` are the losses that the pass found
    for them in its batches (evaluated again when left out).

    Raises:
        RunFailed: every score is zero or the same: the step is below what the number format
            can show; names the floor.
    """
    dataset = passes.dataset
    known = scores[np.isfinite(scores)]
    probe = probe_indices(dataset, PROBE_SAMPLES, np.isfinite(scores))
    batched = passes.run(probe).means if means is None else means
    single = {  # one set after the other: the weights change once
        name: replace(
            passes,
            variants={name: passes.variants[name]},
            token_budget=1,
            precision="float32",
        )
        .run(probe)
        .means[name]
        for name in ("ascent", "descent")
    }
    differences = [(m["ascent"] - m["descent"])[probe] for m in (batched, single)]
    level = float(np.nanmean(np.abs(batched["ascent"][probe])))
    # Rounding of one token's loss, averaged over a sample: never report less than this.
    epsilon = torch.finfo(next(iter(passes.params.values())).dtype).eps
    least = epsilon * level / np.sqrt(max(float(dataset.n_scored[probe].mean()), 1.0))
    floor = max(float(np.sqrt(np.nanmean((differences[0] - differences[1]) ** 2))), least)
    changed, count = _moved(base, passes.variants["ascent"], passes.variants["descent"])
    if passes.team.sharded:
        changed, count = passes.team.sum_numbers(changed, count)
    moved = changed / max(count, 1)
    median = float(np.median(np.abs(known))) if known.size else 0.0
    if known.size > 1 and float(np.ptp(known)) == 0.0 and moved < 1.0:
        raise RunFailed(
            f"all {known.size} scores are equal ({known[0]:.3g}): the perturbation changed "
            f"{moved:.1%} of the weights and is below the noise floor of {floor:.1e} nats/token",
            hint="use a larger lr, for instance auto:1.0",
        )
    return NoiseReport(floor, median, median / floor if floor > 0 else float("inf"), moved)


def half_weights_warning(params: Mapping[str, Tensor]) -> list[str]:
    """A sentence when the weights themselves are in half precision, else nothing."""
    kinds = {p.dtype for p in params.values()} & {torch.float16, torch.bfloat16}
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    if not kinds:
        return []
    return [
        f"the weights are {names}: steps below half a unit in their last place vanish; "
        'load the model with dtype = "float32"'
    ]


def low_precision_agrees(passes: LossPass, precision: str) -> tuple[bool, float]:
    """Whether a lower precision ranks a probe as single precision does, and the correlation.

    Raises:
        ConfigError: the device cannot compute in that precision.
    """
    probe = probe_indices(passes.dataset, LOW_PRECISION_PROBE)
    scores = []
    for name in ("float32", precision):
        try:
            means = replace(passes, precision=name).run(probe).means
        except RuntimeError as error:
            if name == "float32" or "not implemented" not in str(error):
                raise
            device = next(iter(passes.params.values())).device.type
            raise ConfigError(
                f"this {device} device cannot compute the model in {precision}: {error}",
                hint="use precision = float32 (or bfloat16)",
            ) from error
        scores.append((means["ascent"] - means["descent"])[probe])
    agreement = spearman(scores[0], scores[1])
    return bool(agreement >= LOW_PRECISION_AGREEMENT), agreement


def _moved(base: Weights, ascent: Weights, descent: Weights) -> tuple[float, float]:
    """How many weights the perturbation changed at all, and how many there are."""
    moved = sum(int(((ascent[n] != b) | (descent[n] != b)).sum()) for n, b in base.items())
    return float(moved), float(sum(b.numel() for b in base.values()))
