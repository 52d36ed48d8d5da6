"""TrackStar: cosine of projected gradients, corrected by second moments.

    score(x, z) = cos(R^{-1/2} phi_x, R^{-1/2} phi_z),   phi = P (g / sqrt(V))

V is the elementwise second moment of the gradient (here the `sample_mean` Fisher, since no
optimizer state exists), R the autocorrelation of the features, block by block: the attention
and the MLP weights of each group of layers. `R = lam R_queries + (1 - lam) R_train`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tenfold.capabilities import Grad

from tenfold_dabgo.attributor import Progress, no_progress
from tenfold_dabgo.baselines.projection import Projector, joined
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.weights import Weights

_LAYER = re.compile(r"\.(\d+)\.")
_ATTENTION = re.compile(r"(?i)(attn|attention)\.")
EIGENVALUE_FLOOR = 1e-6
"""Smallest eigenvalue of R that counts, relative to the largest of its block."""
MIN_QUERIES_FOR_R = 100
"""With fewer queries their autocorrelation says nothing, and only R_train is used."""


@dataclass
class TrackStarAttributor:
    """TrackStar over all corpus samples.

    Attributes:
        model: offers `grad`.
        dataset: the corpus.
        second_moment: V by parameter; None stands for 1.
        rank: r of the two-sided projection; None for no projection.
        whiten: apply R^{-1/2}; without it, V and the projection: the plain gradient cosine.
        group: layers per block.
        query_weight: lam.
        seed: of the projections.
        token_budget: tokens per batch.
        progress: progress bars.
    """

    model: Grad
    dataset: TokenDataset
    second_moment: FisherDiagonal | None
    rank: int | None = 16
    whiten: bool = True
    group: int = 2
    query_weight: float = 0.5
    seed: int = 0
    token_budget: int = 4096
    progress: Progress = no_progress
    _train: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query; the corpus' features are computed once and kept."""
        queries = list(queries)
        projector = Projector(self.model, self.rank, self._scale(), self.seed, self.token_budget)
        if not self._train:
            with self.progress("trackstar", len(self.dataset), "samples") as bar:
                self._train = projector.of_dataset(self.dataset, bar.advance)
        asked = projector.of_queries(queries)
        train_parts, query_parts = [], []
        for names in blocks_of_layers(list(self._train), self.group).values():
            phi, psi = joined(self._train, names), joined(asked, names)
            if self.whiten:
                root = self._whitening(phi, psi)
                phi, psi = phi @ root, psi @ root
            train_parts.append(phi)
            query_parts.append(psi)
        scores = cosine(np.concatenate(query_parts, axis=1), np.concatenate(train_parts, axis=1))
        for query, values in zip(queries, scores, strict=True):
            yield AttributionResult(query.id, "trackstar", self.dataset, values, unit="cosine")

    def _scale(self) -> Weights | None:
        """1 / sqrt(V), with a floor of 1e-8 of V's mean so that unused weights stay finite."""
        if self.second_moment is None:
            return None
        floor = 1e-8 * self.second_moment.mean()
        return {n: (v + floor).rsqrt() for n, v in self.second_moment.values.items()}

    def _whitening(self, phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
        """R^{-1/2} of one block, `[d, d]`."""
        known = phi[np.isfinite(phi).all(axis=1)]
        r = known.T @ known / max(len(known), 1)
        if len(psi) >= MIN_QUERIES_FOR_R:
            r = self.query_weight * (psi.T @ psi / len(psi)) + (1 - self.query_weight) * r
        values, vectors = np.linalg.eigh(r)
        values = np.maximum(values, EIGENVALUE_FLOOR * max(float(values[-1]), 1e-300))
        return (vectors / np.sqrt(values)) @ vectors.T


def blocks_of_layers(names: list[str], group: int) -> dict[tuple[int, str], list[str]]:
    """Weights by (group of layers, `attention` or `mlp`); weights outside layers form one."""
    out: dict[tuple[int, str], list[str]] = {}
    for name in names:
        found = _LAYER.search(name)
        number = int(found.group(1)) // group if found else -1
        part = "other" if not found else "attention" if _ATTENTION.search(name) else "mlp"
        out.setdefault((number, part), []).append(name)
    return out


def cosine(queries: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """`[Q, N]` cosines of the rows; NaN where a sample has no features."""
    a = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-300)
    b = samples / np.maximum(np.linalg.norm(samples, axis=1, keepdims=True), 1e-300)
    return a @ b.T
