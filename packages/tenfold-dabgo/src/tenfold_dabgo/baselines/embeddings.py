"""Embeddings: cosine of mean-pooled hidden states, or of vectors from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.capabilities import supports
from tenfold.errors import CapabilityError, ConfigError
from tenfold.lm.batching import pad_batch

from tenfold_dabgo.baselines.trackstar import cosine
from tenfold_dabgo.batches import pad_id
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult


@dataclass
class EmbeddingAttributor:
    """Cosine similarity of the query's completion and each sample.

    Attributes:
        model: offers `hidden`; ids are those of its own tokenizer.
        dataset: the corpus.
        layer: which hidden state is pooled (negative numbers count from the end).
        vectors: `.npz` file with `ids` and `vectors` for samples and queries, instead of the
            model's own states.
        token_budget: tokens per batch.

    Raises:
        CapabilityError: neither `hidden` nor a file of vectors.
    """

    model: Any
    dataset: TokenDataset
    layer: int = -1
    vectors: Path | None = None
    token_budget: int = 8192
    _samples: np.ndarray | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.vectors is None and not supports(self.model, "hidden"):
            raise CapabilityError(
                "method embeddings pools hidden states, and the model offers no `hidden`",
                hint="use a model with `hidden`, or another method",
            )

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query; the corpus is embedded once."""
        queries = list(queries)
        if self.vectors is not None:
            known = _read_vectors(self.vectors)
            asked = _look_up(known, [q.id for q in queries], self.vectors)
            self._samples = _look_up(known, self.dataset.sample_ids, self.vectors)
        else:
            if self._samples is None:
                rows = [self.dataset.ids(i).tolist() for i in range(len(self.dataset))]
                self._samples = self._embed(rows)
            asked = self._embed([list(q.completion_ids) for q in queries])
        for query, values in zip(queries, cosine(asked, self._samples), strict=True):
            yield AttributionResult(query.id, "embeddings", self.dataset, values, unit="cosine")

    @torch.no_grad()
    def _embed(self, rows: list[list[int]]) -> np.ndarray:
        """`[n, H]` means over tokens; NaN for empty texts."""
        out: list[np.ndarray | None] = [None] * len(rows)
        order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(rows[i]))
        start = 0
        while start < len(order):
            stop = start + 1
            while (
                stop < len(order)
                and (stop + 1 - start) * len(rows[order[stop]]) <= self.token_budget
            ):
                stop += 1
            part = order[start:stop]
            batch = pad_batch([rows[i] for i in part], pad_id(self.model))
            states = self.model.hidden_states(batch, [self.layer]).states[0].double().cpu()
            mask = batch.attention_mask.double().unsqueeze(-1)
            means = ((states * mask).sum(1) / mask.sum(1)).numpy()
            for i, row in zip(part, means, strict=True):
                out[i] = row
            start = stop
        width = next((len(row) for row in out if row is not None), 1)
        return np.stack([np.full(width, np.nan) if row is None else row for row in out])


def _read_vectors(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(file["ids"].tolist(), file["vectors"], strict=True))
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a file of vectors: {error}",
            hint="write it with numpy.savez(path, ids=..., vectors=...)",
        ) from error


def _look_up(known: dict[str, np.ndarray], ids: list[str], path: Path) -> np.ndarray:
    missing = [name for name in ids if name not in known]
    if missing:
        raise ConfigError(f"{path} has no vector for {missing[0]!r} ({len(missing)} missing)")
    return np.stack([known[name] for name in ids]).astype(np.float64)
