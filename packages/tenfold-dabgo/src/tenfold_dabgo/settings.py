"""Settings of `dabgo:attribution`, with the two presets.

`recommended` (default): automatic step of 1 nat/token, damping 1.5 times the mean Fisher, signed
scores. `paper`: the published constants and the published ranking by |s|. Anything set
explicitly wins over the preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import ConfigError, nearest

from tenfold_dabgo.fisher_estimate import KINDS
from tenfold_dabgo.perturb import Perturbation
from tenfold_dabgo.rollup import reduction
from tenfold_dabgo.views import ONE_SIDED, VIEWS, check_view

PRESETS = ("recommended", "paper")
METHODS = (
    "dabgo",
    "bm25",
    "gradient-dot",
    "gradient-cosine",
    "trackstar",
    "trak",
    "datainf",
    "untrac-inv",
    "embeddings",
    "perplexity",
    "random",
    "bergson",
    "kronfluence",
)

EXPORTS = ("jsonl", "csv", "parquet", "markdown", "latex")
TABLES = EXPORTS[:3]
"""Formats that hold every sample, and can have a column z."""


@dataclass(frozen=True)
class AttributionSettings:
    """Parameters of the evaluator; their meaning is in `plugin.ATTRIBUTION`.

    Raises:
        ConfigError: a value that makes no sense, or two that contradict each other.
    """

    method: str = "dabgo"
    preset: str = "recommended"
    view: str | None = None
    top_k: int = 10
    columns: Sequence[str] = ("module", "package", "author")
    how: str = "mean"
    min_group: int = 1
    compare: Sequence[str] = ()
    export: Sequence[str] = ()
    null_queries: int = 0
    rule: str = "natural_gradient"
    steps: int = 10
    lr: float | None = None
    change: float = 1.0
    damping: float | None = None
    relative_damping: float = 1.5
    dataset_size: int | None = None
    params: str = "all"
    ewc_weight: float = 50.0
    weight_decay: float = 0.0
    grad_clip: float | None = None
    dropout: bool = False
    fisher: str = "sample_mean"
    fisher_path: str | Path | None = None
    fisher_max_samples: int | None = None
    fisher_force: bool = False
    prefilter: float | None = None
    early_stop: float | None = None
    early_stop_by: str = "document"
    window: int | None = None
    stride: int | None = None
    min_tokens: int = 2
    dedupe: bool = False
    truncate: bool = False
    base_losses: bool = False
    precision: str = "float32"
    token_budget: int = 8192
    shard_samples: int = 4096
    force: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of range, before anything is loaded."""
        _known("method", self.method, METHODS)
        _known("preset", self.preset, PRESETS)
        _known("fisher", self.fisher, KINDS)
        for name in self.compare:
            _known("compare", name, METHODS)
        for name in self.export:
            _known("export", name, EXPORTS)
        if self.view is not None:
            _known("view", self.view, VIEWS)
        check_view(self.method, self.view)
        self._check_null_queries()
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.min_group < 1:
            raise ConfigError(f"min_group is {self.min_group}; it must be at least 1")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1")
        if (self.fisher == "file") != (self.fisher_path is not None):
            raise ConfigError(
                f"fisher is {self.fisher!r} and fisher_path is {self.fisher_path!r}: "
                'a path goes with fisher = "file" and only with it'
            )
        reduction(self.how)
        self._check_early_stop()
        self.perturbation()

    def _check_null_queries(self) -> None:
        if self.null_queries == 0:
            return
        if self.null_queries < 2:
            raise ConfigError(
                f"null_queries is {self.null_queries}; a spread needs 2 or more (0: no column z)"
            )
        if not set(self.export) & set(TABLES):
            raise ConfigError(
                f"null_queries is {self.null_queries}, but no table is exported that could hold "
                "the column z",
                hint=f"set export to one of {', '.join(TABLES)}",
            )

    def _check_early_stop(self) -> None:
        if self.early_stop is None:
            return
        if not 0 < self.early_stop < 1:
            raise ConfigError(
                f"early_stop is {self.early_stop}; it must be a probability between 0 and 1"
            )
        overlap = self.stride is not None and self.window is not None and self.stride < self.window
        conflicts = {
            f"method = {self.method!r}": self.method != "dabgo",
            "prefilter": self.prefilter is not None,
            f"view = {self.resolved_view!r}": self.resolved_view != "signed",
            f"how = {self.how!r}": self.how != "mean",
            f"stride = {self.stride} below the window": overlap,
        }
        if found := [name for name, there in conflicts.items() if there]:
            raise ConfigError(
                f"early_stop does not go with {found[0]}: it finds the groups with the largest "
                "mean of signed scores of method dabgo over samples that do not overlap"
            )

    @property
    def resolved_view(self) -> str:
        """The view asked for, or the preset's."""
        return self.view or ("abs" if self.preset == "paper" else "signed")

    @property
    def needs_base_losses(self) -> bool:
        """One-sided views are differences from the base losses."""
        return self.base_losses or self.resolved_view in ONE_SIDED

    def perturbation(self) -> Perturbation:
        """The perturbation of preset and explicit values.

        Raises:
            ConfigError: as in `Perturbation`.
        """
        paper = self.preset == "paper"
        lr: float | str | None = self.lr
        damping: float | str | None = self.damping
        if lr is None:
            lr = 1e-4 if paper else f"auto:{self.change}"
        if damping is None:
            damping = 1e-6 if paper else f"relative:{self.relative_damping}"
        if self.fisher == "identity" and self.damping is None:
            damping = 0.0
        return Perturbation(
            method=self.rule,
            steps=self.steps,
            lr=lr,
            damping=damping,
            dataset_size=self.dataset_size,
            params=self.params,
            ewc_weight=self.ewc_weight,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
            dropout=self.dropout,
            seed=self.seed,
        )


def _known(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        hint = nearest(str(value), known)
        raise ConfigError(f"{name} is {value!r}{hint}; known: {', '.join(known)}")
