"""The Fisher cache: one estimate per model, corpus and setting, shared by all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tenfold.capabilities import Grad
from tenfold.errors import ConfigError
from tenfold.seeds import content_hash

from tenfold_dabgo.attributor import Progress, no_progress
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal
from tenfold_dabgo.fisher_estimate import estimate_fisher, fisher_subset
from tenfold_dabgo.settings import AttributionSettings
from tenfold_dabgo.team import ALONE, Team
from tenfold_dabgo.weights import fingerprint
from tenfold_dabgo.zero3 import SpreadFisher, SpreadModel, spread_fisher

BEHAVIOUR = 1
"""Raised when an estimate with equal settings would give other values."""


def obtain_fisher(
    model: Grad,
    dataset: TokenDataset,
    settings: AttributionSettings,
    folder: Path,
    model_hash: str = "",
    progress: Progress = no_progress,
    team: Team = ALONE,
) -> FisherDiagonal:
    """The Fisher that the settings ask for: from a file, from the cache, or estimated now.

    Args:
        model: the model at theta_0.
        dataset: the corpus.
        settings: kind, selection, sample limit, file.
        folder: the cache; entries are named by content, so deleting them is safe.
        model_hash: the model's fingerprint, when it is known already.
        progress: progress bars.
        team: the processes that share the estimate; all call with equal arguments.

    Raises:
        ConfigError: the given file does not fit the model or corpus.
    """
    model_hash = model_hash or fingerprint(model)
    if settings.fisher == "file":
        fisher = FisherDiagonal.load(Path(str(settings.fisher_path)))
        fisher.check(
            model_hash,
            dataset.content_hash(),
            len(dataset),
            names={name for name, _ in model.module().named_parameters()},
            force=settings.fisher_force,
        )
        if isinstance(model, SpreadModel):
            return spread_fisher(model, dataset, "file", settings.params, np.zeros(0), fisher)
        return fisher
    if isinstance(model, SpreadModel):
        return _spread(model, dataset, settings, folder, model_hash, progress)
    path = folder / f"fisher-{_key(dataset, settings, model_hash)}.safetensors"
    if settings.fisher != "identity" and team.first(lambda: _is_sound(path)):
        return FisherDiagonal.load(path)
    with progress("Fisher", _samples(dataset, settings), "samples") as bar:
        fisher = estimate_fisher(
            model,
            dataset,
            settings.fisher,
            params=settings.params,
            max_samples=settings.fisher_max_samples,
            seed=settings.seed,
            token_budget=max(settings.token_budget // 2, 1),
            advance=bar.advance,
            resume=path.with_suffix(".partial"),
            team=team,
        )
    if settings.fisher != "identity":
        team.first(lambda: fisher.save(path))
    return fisher


def _spread(
    model: SpreadModel,
    dataset: TokenDataset,
    settings: AttributionSettings,
    folder: Path,
    model_hash: str,
    progress: Progress,
) -> SpreadFisher:
    """The Fisher of weights that are spread over processes; each keeps its shards."""
    team = model.team
    name = f"fisher-{_key(dataset, settings, model_hash)}-{team.rank}-of-{team.size}"
    path = folder / f"{name}.safetensors"
    if settings.fisher != "identity" and all(team.gather(_is_sound(path))):
        found = FisherDiagonal.load(path)
        return SpreadFisher(found.values, found.facts, found.warnings, team)
    chosen = fisher_subset(dataset, settings.fisher_max_samples, settings.seed)
    with progress("Fisher", len(chosen), "samples") as bar:
        fisher = spread_fisher(
            model, dataset, settings.fisher, settings.params, chosen, advance=bar.advance
        )
    if settings.fisher != "identity":
        fisher.save(path)
    return fisher


def _is_sound(path: Path) -> bool:
    """Whether a cache entry can be read; a damaged one is removed, to be estimated again."""
    if not path.is_file():
        return False
    try:
        FisherDiagonal.load(path)
    except ConfigError:
        path.unlink()
        return False
    return True


def _key(dataset: TokenDataset, settings: AttributionSettings, model_hash: str) -> str:
    facts: list[Any] = [BEHAVIOUR, model_hash, dataset.content_hash(), settings.fisher]
    facts += [settings.params, settings.fisher_max_samples, settings.seed]
    return content_hash(facts)


def _samples(dataset: TokenDataset, settings: AttributionSettings) -> int:
    usable = int(dataset.scorable.sum())
    return min(usable, settings.fisher_max_samples or usable)
