"""The attributor that a method's name stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold_dabgo.attributor import Attributor, BidirectionalAttributor, Progress, no_progress
from tenfold_dabgo.baselines.bergson import BergsonAttributor
from tenfold_dabgo.baselines.bm25 import Bm25Attributor
from tenfold_dabgo.baselines.datainf import DataInfAttributor
from tenfold_dabgo.baselines.embeddings import EmbeddingAttributor
from tenfold_dabgo.baselines.gradient import GradientAttributor
from tenfold_dabgo.baselines.kronfluence import KronfluenceAttributor
from tenfold_dabgo.baselines.trackstar import TrackStarAttributor
from tenfold_dabgo.baselines.trak import TrakAttributor
from tenfold_dabgo.baselines.trivial import PerplexityAttributor, RandomAttributor
from tenfold_dabgo.baselines.untrac import UnTracInvAttributor
from tenfold_dabgo.cache import obtain_fisher
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.team import ALONE, Team

GRADIENT_METHODS = ("trackstar", "trak", "datainf")
"""Methods over per-sample gradients that are not DABGO's own."""


def make_attributor(
    name: str,
    model: Any,
    dataset: TokenDataset,
    settings: AttributionSettings,
    *,
    cache: Path,
    work: Path | None = None,
    model_hash: str = "",
    progress: Progress = no_progress,
    team: Team = ALONE,
) -> Attributor:
    """Builds a method over a model and corpus.

    Args:
        name: one of `settings.METHODS`.
        model: offers `grad` and `tokenize`.
        dataset: the corpus.
        settings: the evaluator's settings.
        cache: folder of the Fisher cache.
        work: folder for what an interrupted pass leaves.
        model_hash: the model's fingerprint, when it is known already.
        progress: progress bars.
        team: the processes that share the corpus.
    """
    if name == "bm25":
        return Bm25Attributor(model, dataset)
    if name in ("gradient-dot", "gradient-cosine"):
        return GradientAttributor(
            model,
            dataset,
            cosine=name.endswith("cosine"),
            params=settings.params,
            token_budget=max(settings.token_budget // 2, 1),
            progress=progress,
        )
    if name in GRADIENT_METHODS:
        return _gradient_method(name, model, dataset, settings, cache, model_hash, progress, team)
    if name == "untrac-inv":
        return UnTracInvAttributor(
            model,
            dataset,
            steps=settings.steps,
            change=settings.change,
            params=settings.params,
            token_budget=settings.token_budget,
            progress=progress,
        )
    if name == "embeddings":
        return EmbeddingAttributor(model, dataset, token_budget=settings.token_budget)
    if name in ("bergson", "kronfluence"):
        peer = BergsonAttributor if name == "bergson" else KronfluenceAttributor
        return peer(model, dataset, token_budget=settings.token_budget, progress=progress)
    if name == "random":
        return RandomAttributor(dataset, settings.seed)
    if name == "perplexity":
        return PerplexityAttributor(model, dataset, settings.token_budget)
    fisher = obtain_fisher(model, dataset, settings, cache, model_hash, progress, team)
    return BidirectionalAttributor(
        model,
        dataset,
        fisher,
        settings.perturbation(),
        base_losses=settings.needs_base_losses,
        prefilter=settings.prefilter,
        token_top=settings.top_k,
        token_budget=settings.token_budget,
        precision=settings.precision,
        seed=settings.seed,
        work_dir=work,
        model_hash=model_hash,
        progress=progress,
        team=team,
        shard_samples=settings.shard_samples,
        force=settings.force,
        early_stop=settings.early_stop,
        early_stop_by=settings.early_stop_by,
    )


def _gradient_method(
    name: str,
    model: Any,
    dataset: TokenDataset,
    settings: AttributionSettings,
    cache: Path,
    model_hash: str,
    progress: Progress,
    team: Team,
) -> Attributor:
    """TrackStar, TRAK or DataInf; the first and last take their second moments from the
    `sample_mean` Fisher, which is cached like DABGO's own."""
    budget = max(settings.token_budget // 2, 1)
    if name == "trak":
        return TrakAttributor(
            model, dataset, seed=settings.seed, token_budget=budget, progress=progress
        )
    # Everything moves, whatever DABGO's own selection is: these methods have no such choice.
    moments = replace(settings, fisher="sample_mean", fisher_path=None, params="all")
    fisher = obtain_fisher(model, dataset, moments, cache, model_hash, progress, team)
    if name == "datainf":
        return DataInfAttributor(model, dataset, fisher, token_budget=budget, progress=progress)
    return TrackStarAttributor(
        model, dataset, fisher, seed=settings.seed, token_budget=budget, progress=progress
    )
