"""Controls: random scores, and the samples that the model predicts best anyway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tenfold.capabilities import Grad
from tenfold.seeds import derive

from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.losses import LossPass
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.weights import borrowed, copy_of


@dataclass
class RandomAttributor:
    """Uniform scores, fixed by the seed and the query's id."""

    dataset: TokenDataset
    seed: int = 0

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query."""
        for query in queries:
            generator = np.random.default_rng(derive(self.seed, "random-scores", query.id))
            scores = generator.uniform(-1, 1, len(self.dataset))
            scores[~self.dataset.scorable] = np.nan
            yield AttributionResult(query.id, "random", self.dataset, scores, unit="")


@dataclass
class PerplexityAttributor:
    """Minus the base loss: the same ranking for every query."""

    model: Grad
    dataset: TokenDataset
    token_budget: int = 8192
    _losses: np.ndarray | None = field(default=None, init=False, repr=False)

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query."""
        if self._losses is None:
            with borrowed(self.model, grad=False) as params:
                base = {"base": copy_of(params)}
                passes = LossPass(self.model, params, self.dataset, base, self.token_budget)
                table = passes.run()
            self._losses = table.means["base"]
        for query in queries:
            yield AttributionResult(query.id, "perplexity", self.dataset, -self._losses)
