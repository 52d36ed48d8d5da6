"""Gradient similarity: <g_i, g_x> or its cosine, with no Fisher (F = 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tenfold.capabilities import Grad
from torch import Tensor, nn

from tenfold_dabgo.attributor import Progress, blocks, no_progress, query_loss
from tenfold_dabgo.batches import length_buckets, pad_id, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.linear import QUERY_BLOCK, linear_scores
from tenfold_dabgo.persample import PerSampleGradients
from tenfold_dabgo.perturb import gradient
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.weights import Weights, borrowed, device_of


@dataclass
class GradientAttributor:
    """Inner product of the sample's and the query's loss gradients.

    Attributes:
        model: offers `grad`.
        dataset: the corpus.
        cosine: divide by both gradients' norms.
        params: which weights count.
        token_budget: tokens per batch.
        progress: progress bars.
    """

    model: Grad
    dataset: TokenDataset
    cosine: bool = False
    params: str = "all"
    token_budget: int = 4096
    progress: Progress = no_progress
    _norms: np.ndarray | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """`gradient-dot` or `gradient-cosine`."""
        return "gradient-cosine" if self.cosine else "gradient-dot"

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query; up to 16 queries share a pass over the corpus."""
        for block in blocks(queries, QUERY_BLOCK):
            with borrowed(self.model, self.params) as params:
                sizes: list[float] = []
                directions = self._directions(params, block, sizes)
                with self.progress(self.name, len(self.dataset), "samples") as bar:
                    scores = linear_scores(
                        self.model,
                        params,
                        self.dataset,
                        directions,
                        token_budget=self.token_budget,
                        advance=bar.advance,
                    )
            if self.cosine:
                scores = scores / (np.sqrt(sizes)[:, None] * self._sample_norms())
            for query, values in zip(block, scores, strict=True):
                unit = "cosine" if self.cosine else "squared gradient"
                yield AttributionResult(query.id, self.name, self.dataset, values, unit=unit)

    def _directions(
        self, params: Mapping[str, nn.Parameter], block: Sequence[Query], sizes: list[float]
    ) -> Iterator[Weights]:
        """Each query's gradient in turn; its squared norm goes to `sizes`."""
        for query in block:
            found = gradient(params, query_loss(self.model, query)())
            sizes.append(sum(float(g.double().square().sum()) for g in found.values()))
            yield found

    def _sample_norms(self) -> np.ndarray:
        """`[N]` norms of the samples' gradients, computed once."""
        if self._norms is None:
            squared = np.full(len(self.dataset), np.nan)
            with borrowed(self.model, self.params) as params:
                gradients = PerSampleGradients(self.model, params)
                everything, device = np.arange(len(self.dataset)), device_of(self.model)
                for bucket in length_buckets(self.dataset, everything, self.token_budget, device):
                    batch = token_batch(self.dataset, bucket, pad_id(self.model), device)
                    totals = torch.zeros(len(bucket), dtype=torch.float64)

                    def consume(name: str, first: int, g: Tensor, totals: Tensor = totals) -> None:
                        part = g.reshape(len(g), -1).double().square().sum(dim=1)
                        totals[first : first + len(g)] += part.cpu()

                    gradients.run(batch, consume)
                    squared[bucket] = totals.numpy()
            self._norms = np.sqrt(squared)
        return self._norms
