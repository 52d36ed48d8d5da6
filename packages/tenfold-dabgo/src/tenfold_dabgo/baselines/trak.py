"""TRAK: the after-kernel of projected gradients.

    score(x, z_i) = phi_x^T (Phi^T Phi + lam I)^{-1} phi_i

with `Phi [N, d]` the projected gradients of the corpus, here of the mean token loss (for a
language model the loss is the model output of interest, and the correction Q is left at 1).
`lam` is relative to the mean eigenvalue of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tenfold.capabilities import Grad

from tenfold_dabgo.attributor import Progress, no_progress
from tenfold_dabgo.baselines.projection import Projector, joined
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult


@dataclass
class TrakAttributor:
    """TRAK with one checkpoint.

    Attributes:
        model: offers `grad`.
        dataset: the corpus.
        rank: r of the two-sided projection per weight matrix; None for no projection.
        damping: lam, relative.
        seed: of the projections.
        token_budget: tokens per batch.
        progress: progress bars.
    """

    model: Grad
    dataset: TokenDataset
    rank: int | None = 8
    damping: float = 0.1
    seed: int = 0
    token_budget: int = 4096
    progress: Progress = no_progress
    _train: np.ndarray | None = field(default=None, init=False, repr=False)

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query; the corpus' features are computed once and kept."""
        queries = list(queries)
        projector = Projector(self.model, self.rank, None, self.seed, self.token_budget)
        if self._train is None:
            with self.progress("trak", len(self.dataset), "samples") as bar:
                features = projector.of_dataset(self.dataset, bar.advance)
            self._train = joined(features, list(features))
        asked = projector.of_queries(queries)
        scores = kernel_scores(joined(asked, list(asked)), self._train, self.damping)
        for query, values in zip(queries, scores, strict=True):
            yield AttributionResult(query.id, "trak", self.dataset, values, unit="TRAK")


def kernel_scores(queries: np.ndarray, samples: np.ndarray, damping: float) -> np.ndarray:
    """`[Q, N]` values of `phi_x^T (Phi^T Phi + lam I)^{-1} phi_i`.

    Solved on the smaller side: with K = Phi Phi^T it equals `(Phi phi_x)^T (K + lam I)^{-1}`.
    """
    known = np.isfinite(samples).all(axis=1)
    phi = samples[known]
    out = np.full((len(queries), len(samples)), np.nan)
    n, d = phi.shape
    lam = damping * float((phi**2).sum()) / max(min(n, d), 1)
    if d <= n:
        middle = phi.T @ phi + lam * np.eye(d)
        out[:, known] = np.linalg.solve(middle, queries.T).T @ phi.T
    else:
        middle = phi @ phi.T + lam * np.eye(n)
        out[:, known] = np.linalg.solve(middle, phi @ queries.T).T
    return out
