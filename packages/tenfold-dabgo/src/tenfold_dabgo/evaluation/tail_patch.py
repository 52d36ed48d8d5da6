"""Tail-patch: train the model a little on the top-k samples; is the query now likelier?

Everything is computed in log space: a long text's probability underflows, its logarithm does
not. `P` is the probability of the scored completion tokens.

    joint        one AdamW step on the summed gradients of the k samples (the published
                 variant), lr 1e-5, clip 1.0; reported as d log P and as |P' - P| / P
    individual   one step per sample, each from theta_0; mean of d log P, and of P' - P

The absolute relative change rewards harmful samples as much as helpful ones, so the signed
change of log P is the headline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tenfold.capabilities import Grad
from tenfold.errors import ConfigError
from tenfold.seeds import derive
from torch import Tensor, nn

from tenfold_dabgo.batches import pad_id, sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import borrowed, copy_of, device_of, load

VARIANTS = ("joint", "individual")
OPTIMIZERS = ("adamw", "sgd")
Samples = Sequence[Sequence[int] | np.ndarray]
"""Token ids of each sample."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One optimizer step. Defaults: the published joint variant; the individual variant of the
    literature uses lr 1e-3 and no clipping."""

    variant: str = "joint"
    lr: float = 1e-5
    weight_decay: float = 0.01
    clip: float = 1.0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        """Raises ConfigError for settings out of range."""
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant is {self.variant!r}; known: {', '.join(VARIANTS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}; it must be more than 0")


@dataclass(frozen=True, slots=True)
class PatchEffect:
    """Change of the query's probability: `d_log_p` (mean over samples for the individual
    variant), `d_p` the mean absolute change, `percent` the mean signed relative change
    100 (P' - P) / P, and `relative_percent` the published 100 |P' - P| / P."""

    log_p: float
    d_log_p: float
    d_p: float
    percent: float
    relative_percent: float

    @classmethod
    def of(cls, log_p: float, changes: Sequence[float] | np.ndarray) -> PatchEffect:
        """From log P before, and the changes of log P of one or more patches."""
        relative = [relative_change(float(d)) for d in changes]
        return cls(
            log_p=log_p,
            d_log_p=float(np.mean(changes)),
            d_p=float(np.mean([math.exp(log_p + float(d)) - math.exp(log_p) for d in changes])),
            percent=100 * float(np.mean(relative)),
            relative_percent=100 * float(np.mean(np.abs(relative))),
        )


def relative_change(d_log_p: float) -> float:
    """(P' - P) / P from the change of log P; infinite where the exponential overflows."""
    return math.inf if d_log_p >= 700 else math.expm1(d_log_p)


@torch.no_grad()
def log_probability(model: Grad, query: Query) -> float:
    """log P of the scored completion tokens, nats."""
    low, high = query.scored
    return -float(model.token_loss(query.batch(device_of(model)))[0, low:high].double().sum())


def patch_effect(
    model: Grad,
    query: Query,
    samples: Samples,
    patch: Patch,
) -> PatchEffect:
    """Effect of one patch with some token sequences on one query; the weights stay.

    Raises:
        ConfigError: no sample to patch with.
    """
    changes = (
        list(joint_changes(model, query, samples, [len(samples)], patch).values())
        if patch.variant == "joint"
        else individual_changes(model, query, samples, patch)
    )
    return PatchEffect.of(log_probability(model, query), changes)


def joint_changes(
    model: Grad, query: Query, samples: Samples, ks: Sequence[int], patch: Patch
) -> dict[int, float]:
    """Change of log P after one step on the first k samples together, for each k.

    Gradients are summed on the way, so that all k cost one gradient per sample.

    Raises:
        ConfigError: no sample, or a k that is not between 1 and their number.
    """
    wanted = sorted(set(ks))
    if not len(samples) or not wanted:
        raise ConfigError("tail-patch needs at least one sample")
    if wanted[0] < 1 or wanted[-1] > len(samples):
        raise ConfigError(f"k is {wanted}; there are {len(samples)} samples to patch with")
    changes = {}
    with borrowed(model) as params:
        base = copy_of(params)
        before = log_probability(model, query)
        total: list[Tensor] | None = None
        for number, ids in enumerate(samples[: wanted[-1]], start=1):
            parts = _gradient(model, params, ids)
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
            if number in wanted:
                _step(params, total, patch)
                changes[number] = log_probability(model, query) - before
                load(params, base)
    return changes


def individual_changes(model: Grad, query: Query, samples: Samples, patch: Patch) -> np.ndarray:
    """`[k]` changes of log P, each after one step on one sample, from the same weights.

    Raises:
        ConfigError: no sample.
    """
    if not len(samples):
        raise ConfigError("tail-patch needs at least one sample")
    changes = []
    with borrowed(model) as params:
        base = copy_of(params)
        before = log_probability(model, query)
        for ids in samples:
            _step(params, _gradient(model, params, ids), patch)
            changes.append(log_probability(model, query) - before)
            load(params, base)
    return np.asarray(changes)


def _gradient(
    model: Grad, params: Mapping[str, nn.Parameter], ids: Sequence[int] | np.ndarray
) -> list[Tensor]:
    """Gradient of one sample's mean loss, in the order of `params`."""
    dataset = TokenDataset.from_ids([list(map(int, ids))])
    batch = token_batch(dataset, [0], pad_id(model), device_of(model))
    with torch.enable_grad():
        loss = sample_means(model.token_loss(batch), batch)[0]
    parts = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g for g, p in zip(parts, params.values(), strict=True)
    ]


def _step(params: Mapping[str, nn.Parameter], gradient: Sequence[Tensor], patch: Patch) -> None:
    """One step of a fresh optimizer."""
    for p, g in zip(params.values(), gradient, strict=True):
        p.grad = g.clone()  # clipping scales in place, and a running sum is needed again
    if patch.clip > 0:
        nn.utils.clip_grad_norm_(list(params.values()), patch.clip)
    cls = torch.optim.AdamW if patch.optimizer == "adamw" else torch.optim.SGD
    cls(list(params.values()), lr=patch.lr, weight_decay=patch.weight_decay).step()
    for p in params.values():
        p.grad = None


def random_strings(
    k: int, length: int, vocabulary_size: int, seed: int, *labels: object
) -> list[np.ndarray]:
    """k sequences of uniformly random tokens: the control that no method should lose to."""
    generator = np.random.default_rng(derive(seed, "random-strings", *labels))
    return [generator.integers(0, vocabulary_size, length) for _ in range(k)]
