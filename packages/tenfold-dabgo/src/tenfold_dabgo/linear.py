"""First-order scores of many queries in one pass over the corpus.

For small steps `s_i = 2 eta K <g_i, Pi g_x>`, with g_i the gradient of sample i and g_x that of
the query. Two exact routes give `<g_i, v>`: per-sample gradients met with all directions v at
once (forward + backward + outer products, plus 1/T of a forward per query), and a forward-mode
derivative of the losses along each v (no backward pass, one pass per query).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tenfold.capabilities import Grad, TokenBatch
from tenfold.errors import ConfigError
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tenfold_dabgo.batches import length_buckets, pad_id, sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.persample import PerSampleGradients
from tenfold_dabgo.products import use_products
from tenfold_dabgo.weights import Weights, device_of

MODES = ("gradients", "jvp")
QUERY_BLOCK = 16
"""Directions are padded to a multiple of this, so that a query's scores do not depend on how
many others share the pass (matrix kernels change with the shape)."""


def linear_scores(
    model: Grad,
    params: Mapping[str, nn.Parameter],
    dataset: TokenDataset,
    directions: Iterable[Weights],
    *,
    mode: str = "gradients",
    indices: Sequence[int] | np.ndarray | None = None,
    token_budget: int = 4096,
    route: str = "auto",
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """`[Q, N]` float64 inner products `<g_i, v_q>`; NaN for samples not evaluated.

    Args:
        model: offers `token_loss` and `module`.
        params: the weights concerned (from `weights.borrowed`).
        dataset: the corpus.
        directions: v of each query, by parameter name; taken one at a time, so that a generator
            saves the memory of a second copy.
        mode: `gradients` or `jvp`.
        indices: samples to score (default: all).
        token_budget: tokens per batch, padding included.
        route: how per-sample gradients are taken, see `persample`.
        advance: called with the number of samples done.

    Raises:
        ConfigError: unknown mode, or the model's loss has no forward-mode derivative.
    """
    if mode not in MODES:
        raise ConfigError(f"linear mode is {mode!r}; known: {', '.join(MODES)}")
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    score = (
        _GradientScorer(model, params, directions, route)
        if mode == "gradients"
        else _JvpScorer(model, params, list(directions))
    )
    out = np.full((score.n_queries, len(dataset)), np.nan)
    device = device_of(model)
    for bucket in length_buckets(dataset, chosen, token_budget, device):
        batch = token_batch(dataset, bucket, pad_id(model), device)
        out[:, bucket] = score(batch).double().cpu().numpy()
        if advance is not None:
            advance(len(bucket))
    return out


class _GradientScorer:
    """Meets per-sample gradients with all directions by one product per weight."""

    def __init__(
        self,
        model: Grad,
        params: Mapping[str, nn.Parameter],
        directions: Iterable[Weights],
        route: str,
    ) -> None:
        self.gradients = PerSampleGradients(model, params, route)
        self.n_queries = 0
        self.columns = 0
        # [Q, *shape]: one query after the other, each written in one piece.
        self.stacked: dict[str, Tensor] = {}
        for direction in directions:
            if self.n_queries == self.columns:
                self._widen(params)
            for name in params:
                self.stacked[name][self.n_queries] = direction[name]
            self.n_queries += 1
        if not self.stacked:
            self._widen(params)

    def _widen(self, params: Mapping[str, nn.Parameter]) -> None:
        self.columns += QUERY_BLOCK
        for name, p in params.items():
            wider = torch.zeros((self.columns, *p.shape), dtype=p.dtype, device=p.device)
            if name in self.stacked:
                wider[: self.n_queries] = self.stacked[name]
            self.stacked[name] = wider

    def __call__(self, batch: TokenBatch) -> Tensor:
        """`[Q, B]` inner products."""
        rows = batch.input_ids.shape[0]
        first = next(iter(self.stacked.values()))
        out = torch.zeros((rows, self.columns), dtype=first.dtype, device=first.device)

        def consume(name: str, start: int, block: Tensor) -> None:
            out[start : start + len(block)] += block.flatten(1) @ self.stacked[name].flatten(1).T

        captured = self.gradients.captured(batch)
        if captured is None:
            self.gradients.run(batch, consume)
        else:
            for name, pieces in captured[1]:
                for kind, a, delta in pieces:
                    out += use_products(kind, a, delta, self.stacked[name])
        return out[:, : self.n_queries].T


class _JvpScorer:
    """One forward-mode pass per direction."""

    def __init__(
        self, model: Grad, params: Mapping[str, nn.Parameter], directions: Sequence[Weights]
    ) -> None:
        self.model = model
        self.params = params
        self.directions = directions
        self.n_queries = len(directions)

    def __call__(self, batch: TokenBatch) -> Tensor:
        """`[Q, B]` directional derivatives of the samples' mean losses."""
        return torch.stack([self._one(batch, direction) for direction in self.directions])

    def _one(self, batch: TokenBatch, direction: Weights) -> Tensor:
        # Fused attention kernels have no forward-mode derivative; the plain one has.
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {
                name: forward_ad.make_dual(p.detach(), direction[name])
                for name, p in self.params.items()
            }
            try:
                with swapped(self.model.module(), self.params, duals):
                    losses = sample_means(self.model.token_loss(batch), batch)
                tangent = forward_ad.unpack_dual(losses).tangent
            except (NotImplementedError, RuntimeError) as error:
                raise ConfigError(
                    f"the model's loss has no forward-mode derivative: {error}",
                    hint='use linear mode "gradients"',
                ) from error
        return torch.zeros_like(losses) if tangent is None else tangent


@contextmanager
def swapped(
    module: nn.Module, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Replaces parameters by other tensors, wherever (and however often) they are held."""
    by_id = {id(p): values[name] for name, p in params.items()}
    places = [
        (owner, key, p)
        for owner in module.modules()
        for key, p in list(owner._parameters.items())
        if p is not None and id(p) in by_id
    ]
    try:
        for owner, key, p in places:
            del owner._parameters[key]
            object.__setattr__(owner, key, by_id[id(p)])
        yield
    finally:
        for owner, key, p in places:
            if key in owner.__dict__:
                object.__delattr__(owner, key)
            owner._parameters[key] = p
