"""Estimating the diagonal Fisher from a corpus (kinds of the method's section on F).

sample_mean   F_j = (1/N) sum_i (d L_mean(z_i) / d theta_j)^2      the published one
sample_sum    the same with the summed token loss (T^2 times larger at equal length T)
token         every token its own sample: E_t[d_t^2 (x) a_t^2] layer by layer
sampled       sample_mean on texts drawn from the model itself (the true Fisher)
identity      F = 1
file          read from a safetensors file
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.capabilities import Grad, TokenBatch, supports
from tenfold.errors import CapabilityError, ConfigError
from tenfold.lm.batching import scored_positions
from tenfold.records import GenerationConfig
from tenfold.seeds import derive
from torch import Tensor

from tenfold_dabgo.batches import length_buckets, pad_id, token_batch
from tenfold_dabgo.capture import Unsupported, Use
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal, FisherFacts, identity_fisher
from tenfold_dabgo.fisher_progress import PartialFisher
from tenfold_dabgo.persample import PerSampleGradients
from tenfold_dabgo.team import ALONE, Team
from tenfold_dabgo.weights import Weights, borrowed, device_of, fingerprint

KINDS = ("sample_mean", "sample_sum", "token", "sampled", "identity", "file")
SAVE_EVERY = 50
"""Batches between two saves of a resumable estimate."""
DRAWN_AT_ONCE = 64


def estimate_fisher(
    model: Grad,
    dataset: TokenDataset,
    kind: str = "sample_mean",
    *,
    params: str = "all",
    max_samples: int | None = None,
    seed: int = 0,
    token_budget: int = 4096,
    route: str = "auto",
    advance: Callable[[int], None] | None = None,
    resume: Path | None = None,
    team: Team = ALONE,
) -> FisherDiagonal:
    """Diagonal Fisher of the selected weights at the model's current values.

    The result depends on neither batch size, padding nor order (up to rounding).

    Args:
        model: offers `grad` and `tokenize` (and `generate` for kind `sampled`).
        dataset: the training corpus.
        kind: see the module's text; `file` is not estimated but loaded.
        params: which weights, see `weights.select_parameters`.
        max_samples: use a random subset of at most this many samples.
        seed: seed of that subset and of drawn texts.
        token_budget: tokens per batch, padding included.
        route: how per-sample gradients are taken, see `persample`.
        advance: called with the number of samples done.
        resume: file for a partial estimate, so that an interrupted call can go on.
        team: the processes that share the estimate; all call with equal arguments.

    Raises:
        ConfigError: unknown kind, or no sample has two tokens.
        CapabilityError: kind `sampled` with a model that cannot generate, or kind `token` with
            a model whose layers cannot be captured.
    """
    if kind not in KINDS or kind == "file":
        known = ", ".join(k for k in KINDS if k != "file")
        raise ConfigError(f"fisher kind {kind!r} cannot be estimated; known: {known}")
    with borrowed(model, params) as weights:
        if kind == "identity":
            return identity_fisher(weights)
        chosen = dataset.subset(fisher_subset(dataset, max_samples, seed))
        facts = FisherFacts(
            kind, 0, 0, fingerprint(model), dataset.content_hash(), corpus_size=len(dataset)
        )
        texts = draw_texts(model, chosen, seed) if kind == "sampled" else chosen
        totals = {n: torch.zeros_like(p, requires_grad=False) for n, p in weights.items()}
        key = _key(facts, texts, params, token_budget, device_of(model).type, team)
        partial = PartialFisher.open(_own_part(resume, team), totals, key)
        gradients = PerSampleGradients(
            model, weights, route, reduction="mean" if kind in ("sample_mean", "sampled") else "sum"
        )
        add = _add_token_squares if kind == "token" else _add_sample_squares
        cuts = length_buckets(texts, np.arange(len(texts)), token_budget, device_of(model))
        buckets = team.mine(cuts)
        for number, bucket in enumerate(buckets):
            if number < partial.batches_done:
                continue
            batch = token_batch(texts, bucket, pad_id(model), device_of(model))
            add(gradients, batch, totals)
            partial.n_samples += len(bucket)
            partial.n_tokens += int(scored_positions(batch).sum())
            partial.batches_done = number + 1
            if partial.batches_done % SAVE_EVERY == 0:
                partial.save()
            if advance is not None:
                advance(len(bucket))
    team.sum_in_place(totals.values())
    n_samples, n_tokens = map(int, team.sum_numbers(partial.n_samples, partial.n_tokens))
    count = n_tokens if kind == "token" else n_samples
    if count == 0:
        raise ConfigError("no training sample has two tokens: the Fisher cannot be estimated")
    values = {n: v / count for n, v in totals.items()}
    partial.remove()
    facts = replace(facts, n_samples=n_samples, n_tokens=n_tokens)
    return FisherDiagonal(values, facts)


def fisher_subset(dataset: TokenDataset, max_samples: int | None, seed: int) -> np.ndarray:
    """Sorted indices of the samples the Fisher is taken over."""
    usable = np.flatnonzero(dataset.scorable)
    if max_samples is None or len(usable) <= max_samples:
        return usable
    generator = np.random.default_rng(derive(seed, "fisher"))
    return np.sort(generator.choice(usable, size=max_samples, replace=False))


def draw_texts(model: Any, dataset: TokenDataset, seed: int) -> TokenDataset:
    """Texts from the model itself: each sample's first token, continued to its length.

    Raises:
        CapabilityError: the model cannot generate.
    """
    if not supports(model, "generate"):
        raise CapabilityError(
            "fisher kind 'sampled' draws texts from the model, which lacks `generate`",
            hint="use sample_mean, the published kind",
        )
    texts: list[list[int]] = [[] for _ in range(len(dataset))]
    by_first: dict[int, list[int]] = {}
    for i in range(len(dataset)):
        by_first.setdefault(int(dataset.ids(i)[0]), []).append(i)
    # Equal prompts with equal seeds give equal texts, so one prompt asks for many at once.
    for first, members in by_first.items():
        for start in range(0, len(members), DRAWN_AT_ONCE):
            part = members[start : start + DRAWN_AT_ONCE]
            config = GenerationConfig(
                max_new_tokens=int(dataset.lengths[part].max()) - 1,
                temperature=1.0,
                n=len(part),
                seed=derive(seed, "drawn", start) % 2**31,
            )
            completions = model.generate([[first]], config)[0]
            for i, completion in zip(part, completions, strict=True):
                texts[i] = [first, *completion.token_ids][: int(dataset.lengths[i])]
    return TokenDataset.from_ids(texts)


def _add_sample_squares(gradients: PerSampleGradients, batch: TokenBatch, totals: Weights) -> None:
    def consume(name: str, first: int, block: Tensor) -> None:
        totals[name] += block.square().sum(dim=0).to(totals[name].dtype)

    gradients.run(batch, consume)


def _add_token_squares(gradients: PerSampleGradients, batch: TokenBatch, totals: Weights) -> None:
    try:
        for name, uses in gradients.factors(batch):
            for use in uses:
                totals[name] += _token_squares(use, totals[name].shape)
    except Unsupported as problem:
        raise CapabilityError(
            f"fisher kind 'token' works layer by layer, and this model has {problem}",
            hint="use sample_mean",
        ) from None


def _token_squares(use: Use, shape: torch.Size) -> Tensor:
    """`sum_t d_t^2 (x) a_t^2` of one use, `[*shape]`."""
    assert use.delta is not None
    delta = use.delta.reshape(-1, use.delta.shape[-1]).square()
    if use.kind == "shift":
        return delta.sum(dim=0).reshape(shape)
    assert use.a is not None
    if use.kind == "gather":
        out = delta.new_zeros((shape[0] + 1, shape[1]))
        ids = use.a.reshape(-1)
        return out.index_add_(0, torch.where(ids < 0, shape[0], ids), delta)[:-1]
    a = use.a.reshape(-1, use.a.shape[-1]).square()
    if use.kind == "scale":
        return (delta * a).sum(dim=0).reshape(shape)
    return delta.T @ a if use.kind == "outer" else a.T @ delta


def _own_part(resume: Path | None, team: Team) -> Path | None:
    """This process's file of partial sums."""
    if resume is None or team.alone:
        return resume
    return resume.with_name(f"{resume.name}-{team.rank}-of-{team.size}")


def _key(
    facts: FisherFacts,
    texts: TokenDataset,
    params: str,
    token_budget: int,
    device: str,
    team: Team,
) -> str:
    """What a partial estimate belongs to; the cuts depend on the kind of device, too."""
    text = f"{facts}|{texts.content_hash()}|{params}|{token_budget}|{device}|cheapest cuts"
    text += "" if team.alone else f"|{team}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
