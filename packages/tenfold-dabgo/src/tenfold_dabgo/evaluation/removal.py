"""What is removed from a training set: samples, samples with what overlaps them, or groups.

Overlapping windows share tokens, so removing a window alone leaves most of its text in its
neighbours; `neighbours` takes those too. `document` and metadata columns remove whole groups,
ranked by the sum of their samples' scores, the prediction of an additive world.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tenfold.errors import ConfigError
from tenfold.seeds import derive

from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.evaluation.bench import top_indices

SAMPLE, NEIGHBOURS = "sample", "neighbours"


def units_of(dataset: TokenDataset, unit: str) -> list[np.ndarray]:
    """Members of each unit that can be removed, in corpus order; only scorable samples.

    Args:
        dataset: the corpus.
        unit: `sample`, `neighbours`, `document` or a metadata column.

    Raises:
        ConfigError: no such column.
    """
    usable = np.flatnonzero(dataset.scorable)
    if unit in (SAMPLE, NEIGHBOURS):
        return [np.asarray([i]) for i in usable]
    labels = [str(label) for label in dataset.column(unit)]
    groups: dict[str, list[int]] = {}
    for i in usable:
        groups.setdefault(labels[int(i)], []).append(int(i))
    return [np.asarray(members) for members in groups.values()]


def top_units(units: Sequence[np.ndarray], scores: np.ndarray, k: int) -> np.ndarray:
    """Samples of the k units with the largest sums of scores `[N]`, sorted; ties to the first.

    Samples without a score count as 0; units without any scored sample come last.
    """
    sums = np.asarray([_sum(scores[members]) for members in units])
    return _joined([units[int(u)] for u in top_indices(sums, k)])


def random_units(units: Sequence[np.ndarray], k: int, seed: int, *labels: object) -> np.ndarray:
    """Samples of k random units, sorted: the control."""
    generator = np.random.default_rng(derive(seed, "random-removal", k, *labels))
    picks = generator.choice(len(units), size=min(k, len(units)), replace=False)
    return _joined([units[int(u)] for u in picks])


def with_overlapping(dataset: TokenDataset, chosen: np.ndarray) -> np.ndarray:
    """The samples and all others that share a token of a document with one of them, sorted."""
    taken = set(map(int, chosen))
    for i in chosen:
        low, high = dataset.spans[i]
        near = (dataset.spans[:, 0] < high) & (dataset.spans[:, 1] > low)
        same = dataset.document_of == dataset.document_of[i]
        taken.update(np.flatnonzero(near & same).tolist())
    return np.asarray(sorted(taken), dtype=np.int64)


def remaining(dataset: TokenDataset, unit: str, removed: np.ndarray) -> np.ndarray:
    """Samples left after a removal; with `neighbours` what overlaps goes, too.

    Raises:
        ConfigError: nothing that can be trained on is left.
    """
    gone = with_overlapping(dataset, removed) if unit == NEIGHBOURS else removed
    kept = np.setdiff1d(np.arange(len(dataset)), gone)
    if not dataset.scorable[kept].any():
        raise ConfigError(
            f"removing {len(gone)} of {len(dataset)} samples leaves nothing to train on",
            hint="use a smaller k, or a smaller unit",
        )
    return kept


def _sum(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.sum()) if known.size else float("nan")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    if not parts:
        return np.zeros(0, dtype=np.int64)
    return np.sort(np.concatenate(parts)).astype(np.int64)
