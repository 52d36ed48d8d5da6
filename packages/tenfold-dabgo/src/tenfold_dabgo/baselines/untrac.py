"""UnTrac-Inv: unlearn the query with plain optimizer steps, read the training losses.

One direction (ascent), no Fisher: `score_i = L(z_i; theta_ascent) - L(z_i; theta_0)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tenfold.capabilities import Grad

from tenfold_dabgo.attributor import Progress, no_progress, query_loss
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.losses import LossPass
from tenfold_dabgo.perturb import Perturbation, perturb_both
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult
from tenfold_dabgo.weights import borrowed, copy_of


@dataclass
class UnTracInvAttributor:
    """UnTrac-Inv over all corpus samples.

    Attributes:
        model: offers `grad`.
        dataset: the corpus.
        steps: ascent steps.
        change: step size as the first-order change of the query's loss, nats per token.
        method: `sgd` or `sign_sgd`.
        params: which weights move.
        token_budget: tokens per batch.
        progress: progress bars.
    """

    model: Grad
    dataset: TokenDataset
    steps: int = 10
    change: float = 1.0
    method: str = "sgd"
    params: str = "all"
    token_budget: int = 8192
    progress: Progress = no_progress
    _base: np.ndarray | None = field(default=None, init=False, repr=False)

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query: one pass each, and one for the base losses."""
        settings = Perturbation(
            method=self.method, steps=self.steps, lr=f"auto:{self.change}", params=self.params
        )
        for query in queries:
            with borrowed(self.model, self.params) as params:
                n = len(self.dataset)
                moved = perturb_both(params, query_loss(self.model, query), settings, None, n)
                variants = {"ascent": moved.ascent}
                if self._base is None:
                    variants["base"] = copy_of(params)
                passes = LossPass(self.model, params, self.dataset, variants, self.token_budget)
                with self.progress(f"losses for {query.id}", n, "samples") as bar:
                    means = passes.run(advance=bar.advance).means
            self._base = means.get("base", self._base)
            assert self._base is not None
            losses = {"ascent": means["ascent"], "base": self._base}
            scores = means["ascent"] - self._base
            yield AttributionResult(query.id, "untrac-inv", self.dataset, scores, losses)
