"""DataInf: influence with a closed-form inverse, weight by weight.

The average of inverses stands for the inverse of the average (Sherman-Morrison per sample):

    r = (1/lam) (v - (1/n) sum_i (g_i . v) / (lam + |g_i|^2) g_i),    score_i = g_i . r

for each weight, with v the query's gradient and lam = 0.1 times the mean squared gradient entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tenfold.capabilities import Grad
from torch import Tensor

from tenfold_dabgo.attributor import Progress, blocks, no_progress, query_loss
from tenfold_dabgo.batches import length_buckets, pad_id, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.linear import QUERY_BLOCK, linear_scores
from tenfold_dabgo.persample import PerSampleGradients
from tenfold_dabgo.perturb import gradient
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.weights import Weights, borrowed, device_of

LAMBDA_SHARE = 0.1


@dataclass
class DataInfAttributor:
    """DataInf over all corpus samples.

    Attributes:
        model: offers `grad`.
        dataset: the corpus.
        fisher: `sample_mean` Fisher; its mean per weight is the mean squared gradient entry.
        params: which weights count.
        token_budget: tokens per batch.
        progress: progress bars.
    """

    model: Grad
    dataset: TokenDataset
    fisher: FisherDiagonal
    params: str = "all"
    token_budget: int = 4096
    progress: Progress = no_progress

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query; two passes over the corpus per 16 queries."""
        for block in blocks(queries, QUERY_BLOCK):
            with borrowed(self.model, self.params) as params:
                v = [gradient(params, query_loss(self.model, q)()) for q in block]
                directions = self._inverse_times(v)
                with self.progress("datainf: scores", len(self.dataset), "samples") as bar:
                    scores = linear_scores(
                        self.model,
                        params,
                        self.dataset,
                        directions,
                        token_budget=self.token_budget,
                        advance=bar.advance,
                    )
            for query, values in zip(block, scores, strict=True):
                yield AttributionResult(query.id, "datainf", self.dataset, values, unit="influence")

    def _inverse_times(self, v: Sequence[Weights]) -> list[Weights]:
        """r of each query, in one pass over the corpus."""
        names = list(v[0])
        params = {n: p for n, p in self.model.module().named_parameters() if n in v[0]}
        lam = {n: LAMBDA_SHARE * max(self.fisher.mean({n: 0}), 1e-30) for n in names}
        stacked = {n: torch.stack([d[n].reshape(-1) for d in v], dim=1) for n in names}
        sums = {n: torch.zeros_like(stacked[n]) for n in names}

        def consume(name: str, first: int, block: Tensor) -> None:
            g = block.reshape(len(block), -1)
            weight = (g @ stacked[name]) / (lam[name] + g.square().sum(dim=1, keepdim=True))
            sums[name] += g.T @ weight

        gradients = PerSampleGradients(self.model, params)
        n = int(self.dataset.scorable.sum())
        with self.progress("datainf: curvature", n, "samples") as bar:
            device = device_of(self.model)
            for bucket in length_buckets(
                self.dataset, np.arange(len(self.dataset)), self.token_budget, device
            ):
                batch = token_batch(self.dataset, bucket, pad_id(self.model), device)
                gradients.run(batch, consume)
                bar.advance(len(bucket))
        out: list[Weights] = []
        for q, direction in enumerate(v):
            r = {name: (stacked[name][:, q] - sums[name][:, q] / n) / lam[name] for name in names}
            out.append({name: r[name].reshape(direction[name].shape) for name in names})
        return out
