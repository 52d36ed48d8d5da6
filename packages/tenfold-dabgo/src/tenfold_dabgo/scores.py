"""Scores of one query over the corpus, and the ways to look at them.

    s_i = L(z_i; theta_ascent) - L(z_i; theta_descent)          nats per token

s_i > 0: learning the query lowers z_i's loss, so z_i is a *proponent* of the query; s_i < 0: an
*opponent*. Views are computed from the stored losses:

    signed   s_i                          (default)
    abs      |s_i|                        the published ranking; mixes both kinds
    ascent   L_ascent - L_base            one-sided; needs base losses
    descent  L_base - L_descent
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.errors import ConfigError

from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.views import VIEWS

DIRECTIONS = ("proponents", "opponents")
UNIT = "nats/token"


def sign_convention(method: str, view: str = "signed") -> str:
    """What a large score means, in one sentence for files and reports."""
    if method != "dabgo":
        return "larger scores are more influential"
    if view == "abs":
        return "size of the effect; whether it supports or opposes is in the signed score"
    return (
        "positive: learning the query lowers this text's loss (proponent); "
        "negative: it raises it (opponent)"
    )


@dataclass(frozen=True, slots=True)
class Ranked:
    """One sample of a ranking; `rank` starts at 1."""

    rank: int
    index: int
    sample_id: str
    score: float


@dataclass
class AttributionResult:
    """What one method says about one query.

    Attributes:
        query_id: the query.
        method: `dabgo`, `bm25`, ...
        dataset: the scored corpus.
        values: `[N]` signed scores; NaN where a sample has no score.
        losses: `ascent`, `descent` and possibly `base`: `[N]` mean token losses (methods
            that perturb the model only).
        exact: `[N]` bool: scored by the exact pass (False: by the linear prefilter).
        tokens: sample index → `[T]` token scores, for samples that have them.
        unit: of `values`; `nats/token` for DABGO.
        details: trace, settings, noise floor, timings; JSON-able.
    """

    query_id: str
    method: str
    dataset: TokenDataset
    values: np.ndarray
    losses: dict[str, np.ndarray] = field(default_factory=dict)
    exact: np.ndarray | None = None
    tokens: dict[int, np.ndarray] = field(default_factory=dict)
    unit: str = UNIT
    details: dict[str, Any] = field(default_factory=dict)

    def scores(self, view: str = "signed") -> np.ndarray:
        """`[N]` scores of a view; larger means more influential.

        Raises:
            ConfigError: unknown view, or a one-sided view without base losses.
        """
        if view not in VIEWS:
            raise ConfigError(f"view is {view!r}; known: {', '.join(VIEWS)}")
        if view == "signed":
            return self.values
        if view == "abs":
            return np.abs(self.values)
        missing = [name for name in ("base", view) if name not in self.losses]
        if missing:
            raise ConfigError(
                f"view {view!r} needs the {' and '.join(missing)} losses, which were not computed",
                hint="set base_losses = true (or choose view = signed)",
            )
        sign = 1.0 if view == "ascent" else -1.0
        return sign * (self.losses[view] - self.losses["base"])

    @property
    def scored(self) -> np.ndarray:
        """`[N]` bool: samples that have a score."""
        return np.isfinite(self.values)

    @property
    def _scored_exactly(self) -> np.ndarray:
        return self.scored if self.exact is None else self.exact

    def topk(self, k: int, direction: str = "proponents", view: str = "signed") -> list[Ranked]:
        """The k most influential samples, or with `opponents` the k lowest scores.

        Ties go to the smaller index. Samples without a score never appear, so fewer than `k`
        come back when the corpus is smaller. When a prefilter was used, only
        exactly scored samples count: a first-order score never outranks an exact one.

        Raises:
            ConfigError: k < 1, unknown direction or view.
        """
        if k < 1:
            raise ConfigError(f"k is {k}; it must be at least 1")
        if direction not in DIRECTIONS:
            raise ConfigError(f"direction is {direction!r}; known: {', '.join(DIRECTIONS)}")
        scores = self.scores(view)
        usable = np.isfinite(scores)
        if self.exact is not None:
            usable &= self.exact
        candidates = np.flatnonzero(usable)
        sign = -1.0 if direction == "proponents" else 1.0
        order = candidates[np.argsort(sign * scores[candidates], kind="stable")][:k]
        return [
            Ranked(rank, int(i), self.dataset.sample_ids[i], float(scores[i]))
            for rank, i in enumerate(order, start=1)
        ]

    def compare(self, other: AttributionResult, k: int = 10) -> dict[str, float]:
        """Agreement with another result over the same corpus: Spearman correlation over the
        samples both score, and the overlap of the top k.

        Raises:
            ConfigError: the corpora differ.
        """
        if self.dataset.sample_ids != other.dataset.sample_ids:
            raise ConfigError("the two results score different corpora and cannot be compared")
        both = self.scored & other.scored
        mine = {r.index for r in self.topk(k)}
        theirs = {r.index for r in other.topk(k)}
        overlap = len(mine & theirs) / max(min(k, int(both.sum())), 1)
        return {
            "spearman": spearman(self.values[both], other.values[both]),
            f"overlap@{k}": overlap,
        }

    def z_scores(self, null: np.ndarray) -> np.ndarray:
        """`[N]` scores as standard deviations from a null: `null [M, N]` are the scores of M
        unrelated queries for the same samples; NaN where fewer than two of them have one."""
        out = np.full(len(self.values), np.nan)
        usable = np.isfinite(null).sum(axis=0) > 1
        known = null[:, usable]
        center, spread = np.nanmean(known, axis=0), np.nanstd(known, axis=0, ddof=1)
        out[usable] = (self.values[usable] - center) / np.where(spread > 0, spread, np.nan)
        return out

    def merge(self, other: AttributionResult) -> AttributionResult:
        """One result of two parts: other samples of the same corpus, or another corpus.

        Over the same samples, each fills in what the other lacks, and exact scores replace those
        of a prefilter. Otherwise the corpora are
        joined, this one first.

        Raises:
            ConfigError: the scores are not comparable (another query, method, unit or step), a
                sample has two different scores, or two corpora share an id.
        """
        self._check_mergeable(other)
        if self.dataset.sample_ids == other.dataset.sample_ids:
            return self._filled(other)
        dataset = self.dataset.joined(other.dataset)
        first = len(self.dataset)
        exact = None
        if self.exact is not None or other.exact is not None:
            exact = np.concatenate([self._scored_exactly, other._scored_exactly])
        return AttributionResult(
            self.query_id,
            self.method,
            dataset,
            np.concatenate([self.values, other.values]),
            {
                name: np.concatenate([losses, other.losses[name]])
                for name, losses in self.losses.items()
                if name in other.losses
            },
            exact,
            self.tokens | {first + i: values for i, values in other.tokens.items()},
            self.unit,
            dict(self.details),
        )

    def _check_mergeable(self, other: AttributionResult) -> None:
        facts = {
            "query": (self.query_id, other.query_id),
            "method": (self.method, other.method),
            "unit": (self.unit, other.unit),
            **{
                name: (self.details.get(name), other.details.get(name))
                for name in ("step_size", "damping")
            },
        }
        different = [f"{name} {a} and {b}" for name, (a, b) in facts.items() if a != b]
        if different:
            raise ConfigError(f"the two results cannot be merged: {'; '.join(different)}")

    def _filled(self, other: AttributionResult) -> AttributionResult:
        """Both results over one list of samples; an exact score replaces a first-order one."""
        sure = self._scored_exactly & other._scored_exactly
        clash = np.flatnonzero(sure & (self.values != other.values))
        if clash.size:
            name = self.dataset.sample_ids[clash[0]]
            raise ConfigError(
                f"the two results cannot be merged: sample {name!r} scores "
                f"{self.values[clash[0]]:.6g} in one and {other.values[clash[0]]:.6g} in the other"
            )

        better = ~self._scored_exactly & other._scored_exactly

        def either(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return np.where(~np.isfinite(mine) | (better & np.isfinite(theirs)), theirs, mine)

        exact = None
        if self.exact is not None or other.exact is not None:
            exact = self._scored_exactly | other._scored_exactly
        shared = [name for name in self.losses if name in other.losses]
        return AttributionResult(
            self.query_id,
            self.method,
            self.dataset,
            either(self.values, other.values),
            {name: either(self.losses[name], other.losses[name]) for name in shared},
            exact,
            other.tokens | self.tokens,
            self.unit,
            dict(self.details),
        )

    def to_jsonl(self, path: str | Path, **options: Any) -> Path:
        """Writes the ranking as JSON Lines, see `exports.export`."""
        return self._export("jsonl", path, options)

    def to_csv(self, path: str | Path, **options: Any) -> Path:
        """Writes the ranking as CSV, see `exports.export`."""
        return self._export("csv", path, options)

    def to_parquet(self, path: str | Path, **options: Any) -> Path:
        """Writes the ranking as Parquet, see `exports.export`."""
        return self._export("parquet", path, options)

    def to_markdown(self, path: str | Path, **options: Any) -> Path:
        """Writes the two ends of the ranking as Markdown, see `exports.export`."""
        return self._export("markdown", path, options)

    def _export(self, form: str, path: str | Path, options: Mapping[str, Any]) -> Path:
        from tenfold_dabgo.exports import export

        return export(self, form, Path(path), **options)

    def to_latex(self, path: str | Path, sample: int | str | None = None, **options: Any) -> Path:
        """Writes one training text's token highlights as LaTeX, see `latex.write_latex`.

        `sample` is an id or index; None takes the best text that has token scores.
        """
        from tenfold_dabgo.latex import write_latex

        return write_latex(self, Path(path), sample, **options)

    def arrays(self) -> Mapping[str, np.ndarray]:
        """All arrays for a file, with lengths and the corpus order of sample ids."""
        out = {"score": self.values, "n_scored": self.dataset.n_scored}
        out |= {f"loss_{name}": values for name, values in self.losses.items()}
        out |= packed_ids(self.dataset.sample_ids)
        if self.exact is not None:
            out["exact"] = self.exact
        return out


def packed_ids(ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Ids as UTF-8 bytes, one after the other, and where each ends: an array of strings would
    be as wide as the longest everywhere."""
    coded = [name.encode("utf-8", "surrogatepass") for name in ids]
    return {
        "sample_id_bytes": np.frombuffer(b"".join(coded), dtype=np.uint8),
        "sample_id_ends": np.cumsum([len(name) for name in coded], dtype=np.int64),
    }


def unpacked_ids(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The ids of `packed_ids`.

    Raises:
        KeyError: there are none.
    """
    data, ends = arrays["sample_id_bytes"].tobytes(), arrays["sample_id_ends"].tolist()
    starts = [0, *ends][:-1]
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties get their mean rank, `[n]`."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; NaN for fewer than two values or constant ones."""
    if len(x) < 2:
        return float("nan")
    a, b = ranks(np.asarray(x)), ranks(np.asarray(y))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale > 0 else float("nan")
