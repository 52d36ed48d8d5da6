"""DABGO as one object: perturb both ways, evaluate the corpus, subtract.

    theta_ascent, theta_descent = K steps on the query's loss, from theta_0
    s_i = L(z_i; theta_ascent) - L(z_i; theta_descent)

With a prefilter, first-order scores of all queries come from one shared pass, and only the
candidates go through the exact one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tenfold.capabilities import Grad
from tenfold.seeds import content_hash
from torch import Tensor, nn

from tenfold_dabgo import prefilter as pre
from tenfold_dabgo.batches import length_buckets, sample_means
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.divergence import kl_to_now
from tenfold_dabgo.early_stop import TopGroups
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.granularity import token_scores
from tenfold_dabgo.linear import QUERY_BLOCK, linear_scores
from tenfold_dabgo.losses import SHARD_SAMPLES, LossPass, LossTable
from tenfold_dabgo.perturb import Perturbation, Perturbed, gradient, perturb_both
from tenfold_dabgo.precision import half_weights_warning, low_precision_agrees, noise_floor
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import DIRECTIONS, AttributionResult
from tenfold_dabgo.shards import ShardStore
from tenfold_dabgo.team import ALONE, Team
from tenfold_dabgo.weights import Weights, borrowed, copy_of, device_of, fingerprint

T = TypeVar("T")


class Attributor(Protocol):
    """One attribution method: scores of every training sample for each query."""

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query, in order."""
        ...


Progress = Callable[[str, int | None, str], AbstractContextManager[Any]]
"""Like `Context.progress`: (label, total, unit) → a bar with `advance(n)`."""


class _Silent:
    def advance(self, n: int = 1, **fields: object) -> None:
        """Nothing to show."""


def no_progress(label: str, total: int | None = None, unit: str = "") -> AbstractContextManager:
    """A progress bar that shows nothing."""
    return nullcontext(_Silent())


@dataclass
class BidirectionalAttributor:
    """The method, see the module's text.

    Attributes:
        model: offers `grad` (and `step` for the KL trace).
        dataset: the corpus.
        fisher: diagonal Fisher at the model's weights; None stands for F = 1.
        perturbation: settings of the steps.
        base_losses: also evaluate theta_0 (once), for the one-sided views.
        prefilter: share of the corpus that goes through the exact pass; None for all of it.
        token_top: keep token scores of this many proponents and opponents.
        all_tokens: keep token scores of every sample.
        token_budget, precision: of the loss pass.
        seed: of the prefilter's random check.
        work_dir: folder for shards of unfinished passes, of `shard_samples` samples each.
        model_hash: the model's fingerprint, when it is known already.
        progress: progress bars.
        team: the processes that share the corpus; all of them score the same queries.
        force: discard shards of another model, corpus or setting instead of refusing them.
        early_stop: accepted probability of a wrong set of top groups; None scores everything.
        early_stop_by: column of those groups, `token_top` of which are wanted.
    """

    model: Grad
    dataset: TokenDataset
    fisher: FisherDiagonal | None
    perturbation: Perturbation = field(default_factory=Perturbation)
    base_losses: bool = False
    prefilter: float | None = None
    token_top: int = 0
    all_tokens: bool = False
    token_budget: int = 8192
    precision: str = "float32"
    seed: int = 0
    work_dir: Path | None = None
    shard_samples: int = SHARD_SAMPLES
    progress: Progress = no_progress
    model_hash: str = ""
    team: Team = ALONE
    force: bool = False
    early_stop: float | None = None
    early_stop_by: str = "document"
    _base: np.ndarray | None = field(default=None, init=False, repr=False)

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query, in order; the weights are untouched between results."""
        if self.prefilter is None:
            for query in queries:
                yield self.score(query)
            return
        for block in blocks(queries, QUERY_BLOCK):
            linear = self.first_order(block)
            for query, scores in zip(block, linear, strict=True):
                yield self.score(query, scores)

    def first_order(self, queries: Sequence[Query]) -> np.ndarray:
        """`[Q, N]` inner products `<g_i, Pi g_x>`, all queries in one pass."""
        with borrowed(self.model, self.perturbation.params) as params:
            directions = self.directions(params, queries)
            budget = max(self.token_budget // 2, 1)
            with self.progress("first-order scores", len(self.dataset), "samples") as bar:
                scores = linear_scores(
                    self.model,
                    params,
                    self.dataset,
                    directions,
                    indices=self._share(budget),
                    token_budget=budget,
                    advance=bar.advance,
                )
        if not self.team.alone:
            parts = np.stack(self.team.gather(scores))
            known = np.isfinite(parts)
            scores = np.where(known.any(axis=0), np.where(known, parts, 0.0).sum(axis=0), np.nan)
        return scores

    def _share(self, budget: int) -> np.ndarray | None:
        """The samples whose first-order scores this process computes; None for all."""
        if self.team.alone:
            return None
        everything = np.arange(len(self.dataset))
        mine = self.team.mine(length_buckets(self.dataset, everything, budget))
        return np.concatenate([np.zeros(0, dtype=np.int64), *mine])

    def directions(
        self, params: Mapping[str, nn.Parameter], queries: Iterable[Query]
    ) -> Iterator[Weights]:
        """v = Pi g_x of each query, one at a time."""
        scale: Weights | None = None
        if self.fisher is not None and self.perturbation.method == "natural_gradient":
            scale, _ = self.fisher.precondition(params, self.perturbation.damping)
        for query in queries:
            v = gradient(params, query_loss(self.model, query)())
            if scale is not None:
                v = {name: value * scale[name].to(value.dtype) for name, value in v.items()}
            yield v

    def perturb(self, query: Query) -> Perturbed:
        """Both directions for one query (inspection; the model stays as it is)."""
        with borrowed(self.model, self.perturbation.params) as params:
            return self._perturb(params, query)

    def _perturb(self, params: Mapping[str, nn.Parameter], query: Query) -> Perturbed:
        self.model.module().train(self.perturbation.dropout)
        result = perturb_both(
            params,
            query_loss(self.model, query),
            self.perturbation,
            self.fisher,
            len(self.dataset),
            kl_to_now(self.model, query),
            getattr(self.model, "calculus", None),
        )
        self.model.module().eval()
        return result

    def score(self, query: Query, linear: np.ndarray | None = None) -> AttributionResult:
        """The result of one query; `linear` are its `[N]` first-order scores for a prefilter."""
        started = time.perf_counter()
        with borrowed(self.model, self.perturbation.params) as params:
            base = copy_of(params)
            moved = self._perturb(params, query)
            seconds = {"perturb": time.perf_counter() - started}
            warnings = list(moved.warnings)
            passes = self._passes(params, moved, warnings)
            picked = None
            if linear is not None and self.prefilter is not None:
                picked = pre.candidates(linear, self.prefilter, self.seed, max(self.token_top, 1))
            stopped: TopGroups | None = None
            if self.early_stop is None:
                table = self._corpus_pass(passes, query, picked)
            else:
                table, stopped = self._stopped_pass(passes, query, self.early_stop)
            values = table.means["ascent"] - table.means["descent"]
            noise = noise_floor(passes, base, values, table.means)
            warnings += [noise.warning()] if noise.warning() else []
            result = AttributionResult(query.id, "dabgo", self.dataset, values, dict(table.means))
            if picked is not None and linear is not None:
                predicted = 2 * moved.step_size * self.perturbation.steps * linear
                self._fill_in(result, picked, linear, predicted)
            if self.base_losses:
                result.losses["base"] = self._base_losses(params, base)
            result.tokens = self._token_scores(result, table, passes)
        seconds |= {"pass": table.seconds, "total": time.perf_counter() - started}
        if stopped is not None:
            result.details["early_stop"] = stopped.report(self.early_stop_by).to_json()
        result.details |= {
            "trace": {
                "ascent": [asdict(step) for step in moved.ascent_trace],
                "descent": [asdict(step) for step in moved.descent_trace],
            },
            "lr": moved.lr,
            "step_size": moved.step_size,
            "damping": moved.damping,
            "backtracks": moved.backtracks,
            "noise": noise.to_json(),
            "precision": passes.precision,
            "warnings": [*warnings, *(self.fisher.warnings if self.fisher else [])],
            "seconds": seconds,
            "tokens_per_second": 2 * table.n_tokens / max(table.seconds, 1e-9),
        }
        return result

    def _passes(
        self, params: Mapping[str, Tensor], moved: Perturbed, warnings: list[str]
    ) -> LossPass:
        """The pass over both directions; in a lower precision only if a probe ranks the same."""
        variants = {"ascent": moved.ascent, "descent": moved.descent}
        passes = LossPass(
            self.model, params, self.dataset, variants, self.token_budget, self.precision, self.team
        )
        warnings += half_weights_warning(params)
        if self.precision == "float32":
            return passes
        agrees, agreement = low_precision_agrees(passes, self.precision)
        if agrees:
            return passes
        warnings.append(
            f"{self.precision} ranks a probe differently (Spearman {agreement:.2f}): "
            "the pass ran in float32"
        )
        return replace(passes, precision="float32")

    def _corpus_pass(
        self, passes: LossPass, query: Query, picked: pre.Candidates | None
    ) -> LossTable:
        """The exact pass over the corpus or the candidates."""
        chosen = picked.chosen if picked is not None else np.arange(len(self.dataset))
        store = self._store(query, chosen, passes.precision)
        with self.progress(f"losses for {query.id}", len(chosen), "samples") as bar:
            table = passes.run(
                chosen,
                per_token=self.all_tokens,
                store=store,
                shard_samples=self.shard_samples,
                advance=bar.advance,
            )
        if store is not None:
            self.team.first(store.remove)
        return table

    def _stopped_pass(
        self, passes: LossPass, query: Query, delta: float
    ) -> tuple[LossTable, TopGroups]:
        """The exact pass over as many samples as the top groups need, round by round."""
        labels = [str(value) for value in self.dataset.column(self.early_stop_by)]
        scorable = self.dataset.scorable
        groups = TopGroups(labels, scorable, max(self.token_top, 1), delta, self.seed)
        table = LossTable(
            self.dataset.n_scored,
            {name: np.full(len(self.dataset), np.nan) for name in passes.variants},
            {name: {} for name in passes.variants} if self.all_tokens else {},
        )
        stores = []
        with self.progress(f"losses for {query.id}", int(scorable.sum()), "samples") as bar:
            while len(chosen := groups.next()):
                store = self._store(query, chosen, passes.precision, f"-round-{groups.round}")
                stores += [] if store is None else [store]
                table.add(
                    passes.run(
                        chosen,
                        per_token=self.all_tokens,
                        store=store,
                        shard_samples=self.shard_samples,
                        advance=bar.advance,
                    )
                )
                groups.judge(table.means["ascent"] - table.means["descent"])
        for store in stores:  # an interruption in a late round keeps the early ones
            self.team.first(store.remove)
        return table, groups

    def _fill_in(
        self,
        result: AttributionResult,
        picked: pre.Candidates,
        linear: np.ndarray,
        predicted: np.ndarray,
    ) -> None:
        """Gives samples outside the candidates their first-order score."""
        exact = result.values
        report = pre.report(linear, exact, picked, max(self.token_top, 10))
        result.details["prefilter"] = report.to_json()
        result.exact = np.isfinite(exact)
        result.values = np.where(result.exact, exact, predicted)

    def _store(
        self, query: Query, chosen: np.ndarray, precision: str, part: str = ""
    ) -> ShardStore | None:
        if self.work_dir is None:
            return None
        self.model_hash = self.model_hash or fingerprint(self.model)
        facts = asdict(self.fisher.facts) if self.fisher is not None else None
        key = content_hash(
            {
                "model": self.model_hash,
                "corpus": self.dataset.content_hash(),
                "query": [query.prompt_ids, query.completion_ids, query.span],
                "perturbation": self.perturbation.to_json(),
                "fisher": facts,
                "samples": content_hash(chosen.tolist()),
                "pass": [precision, self.token_budget, self.all_tokens],
            }
        )
        store = ShardStore(self.work_dir / "losses" / f"{content_hash(query.id)}{part}", key)
        self.team.first(lambda: store.prepare(force=self.force))
        return store

    def _base_losses(self, params: Mapping[str, Tensor], base: Weights) -> np.ndarray:
        """`[N]` losses at theta_0, computed once."""
        if self._base is None:
            passes = LossPass(
                self.model, params, self.dataset, {"base": base}, self.token_budget, team=self.team
            )
            self._base = passes.run().means["base"]
        return self._base

    def _token_scores(
        self, result: AttributionResult, table: LossTable, passes: LossPass
    ) -> dict[int, np.ndarray]:
        """Token scores of all samples, or of the two ends of the ranking."""
        tokens = table.tokens
        if not self.all_tokens:
            if self.token_top < 1:
                return {}
            ends = {
                row.index
                for direction in DIRECTIONS
                for row in result.topk(self.token_top, direction)
            }
            tokens = passes.run(sorted(ends), per_token=True).tokens
        return token_scores(tokens["ascent"], tokens["descent"])


def query_loss(model: Grad, query: Query) -> Callable[[], Tensor]:
    """L_x at the model's current weights: mean loss of the scored completion tokens, a scalar."""
    batch = query.batch(device_of(model))
    return lambda: sample_means(model.token_loss(batch), batch)[0]


def blocks(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive things in lists of at most `size`."""
    block: list[T] = []
    for thing in things:
        block.append(thing)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
