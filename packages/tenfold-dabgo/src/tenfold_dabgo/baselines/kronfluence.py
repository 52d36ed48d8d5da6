"""Kronfluence's influence functions beside ours (extra `kronfluence`): EK-FAC, K-FAC, diagonal.

    score_i = g_x^T H^{-1} g_i

over the model's linear layers except the output head, with H fitted on the corpus (empirical
Fisher, since the samples' own losses are what the model offers). Works on a copy of the model:
Kronfluence replaces its layers.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.batching import pad_batch
from torch import nn

from tenfold_dabgo.attributor import Progress, no_progress
from tenfold_dabgo.batches import CPU_TOKENS, pad_id, sample_means
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.linear import QUERY_BLOCK
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult

EXTRA = "pip install 'tenfold-dabgo[kronfluence]'"
STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")


@dataclass
class KronfluenceAttributor:
    """Kronfluence over all corpus samples.

    Attributes:
        model: offers `grad`, with `nn.Linear` layers.
        dataset: the corpus.
        strategy: how H is approximated.
        damping: added to H's eigenvalues; None for a tenth of their mean.
        token_budget: tokens per batch, padding included.
        folder: where factors and scores are kept; a temporary folder when left out.
        progress: progress bars.

    Raises:
        ConfigError: Kronfluence is not installed, an unknown strategy, or no linear layer.
    """

    model: Any
    dataset: TokenDataset
    strategy: str = "ekfac"
    damping: float | None = None
    token_budget: int = CPU_TOKENS
    folder: Path | None = None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if importlib.util.find_spec("kronfluence") is None:
            raise ConfigError("method kronfluence: Kronfluence is not installed", hint=EXTRA)
        if self.strategy not in STRATEGIES:
            raise ConfigError(
                f"Kronfluence strategy is {self.strategy!r}; known: {', '.join(STRATEGIES)}"
            )
        if not self.layers():
            raise ConfigError(
                "method kronfluence knows linear layers only, and the model has none "
                f"({type(self.model.module()).__name__}; GPT-2's Conv1D is not one)",
                hint="use a Llama-type model, or another method",
            )

    def layers(self) -> list[str]:
        """Names of the linear layers that count, without the head and tied weights."""
        module = self.model.module()
        head = getattr(module, "get_output_embeddings", lambda: None)()
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        return [
            name
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear) and part is not head and id(part.weight) not in tables
        ]

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query, all from one fit and one pass."""
        queries = list(queries)
        if not queries:
            return
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="dabgo-kronfluence-") as name:
                scores, details = self._run(queries, Path(name))
        else:
            scores, details = self._run(queries, self.folder)
        for query, values in zip(queries, scores, strict=True):
            yield AttributionResult(
                query.id, "kronfluence", self.dataset, values, unit="influence",
                details=dict(details),
            )  # fmt: skip

    def _run(
        self, queries: Sequence[Query], folder: Path
    ) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
        """`[Q, N]` scores, and what they took."""
        from kronfluence.analyzer import Analyzer, prepare_model  # ty: ignore[import-not-found]
        from kronfluence.arguments import FactorArguments, ScoreArguments  # ty: ignore[import-not-found]
        from kronfluence.utils.dataset import DataLoaderKwargs  # ty: ignore[import-not-found]

        model = copy.deepcopy(self.model)
        with torch.no_grad():  # what models find out at their first call, before layers change
            model.token_loss(queries[0].batch(next(model.module().parameters()).device))
        task = _task(model, self.layers())
        # Similar lengths side by side, so that it pads as little as the others.
        usable = np.flatnonzero(self.dataset.scorable)
        usable = usable[np.argsort(-self.dataset.lengths[usable], kind="stable")]
        samples = _Rows([self.dataset.ids(int(i)).tolist() for i in usable])
        asked = _Rows([list(q.ids) for q in queries], [q.scored for q in queries])
        device = next(model.module().parameters()).device.type
        budget = min(self.token_budget, CPU_TOKENS) if device == "cpu" else self.token_budget
        rows = max(1, budget // int(self.dataset.lengths.max()))
        analyzer = Analyzer(
            "dabgo",
            prepare_model(model.module(), task),
            task,
            cpu=device == "cpu",
            log_level=40,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        filler = pad_id(model)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda x: _collate(x, filler)))
        started = time.perf_counter()
        with self.progress("kronfluence", 2, "steps") as bar:
            analyzer.fit_all_factors(
                factors_name="factors",
                dataset=samples,
                per_device_batch_size=rows,
                factor_args=FactorArguments(self.strategy, use_empirical_fisher=True),
                overwrite_output_dir=True,
            )
            fitted = time.perf_counter()
            bar.advance(1)
            analyzer.compute_pairwise_scores(
                scores_name="scores",
                factors_name="factors",
                query_dataset=asked,
                train_dataset=samples,
                per_device_query_batch_size=min(len(queries), QUERY_BLOCK),
                per_device_train_batch_size=rows,
                score_args=ScoreArguments(damping_factor=self.damping),
                overwrite_output_dir=True,
            )
            bar.advance(1)
        done = time.perf_counter()
        found = analyzer.load_pairwise_scores("scores")["all_modules"].double().numpy()
        out = np.full((len(queries), len(self.dataset)), np.nan)
        out[:, usable] = found
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        seconds = {"factors": fitted - started, "scores": done - fitted}
        return out, {"seconds": seconds, "disk": {"bytes": float(size)}}


class _Rows(torch.utils.data.Dataset):
    """Token ids with the half-open range of scored positions."""

    def __init__(
        self, rows: Sequence[list[int]], spans: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self.rows = rows
        self.spans = spans or [(1, len(row)) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], tuple[int, int]]:
        return self.rows[index], self.spans[index]


def _collate(items: Sequence[tuple[list[int], tuple[int, int]]], filler: int) -> dict[str, Any]:
    batch = pad_batch([ids for ids, _ in items], filler)
    mask = torch.zeros_like(batch.input_ids)
    for row, (_, (low, high)) in enumerate(items):
        mask[row, low:high] = 1
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "loss_mask": mask,
    }


def _task(owner: Any, layers: list[str]) -> Any:
    """Kronfluence's view of the model: the sum over a batch of mean token losses."""
    from kronfluence.task import Task  # ty: ignore[import-not-found]

    class MeanTokenLoss(Task):
        def compute_train_loss(
            self, batch: Any, model: nn.Module, sample: bool = False
        ) -> torch.Tensor:
            tokens = TokenBatch(batch["input_ids"], batch["attention_mask"], batch["loss_mask"])
            return sample_means(owner.token_loss(tokens), tokens).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch["attention_mask"]

    return MeanTokenLoss()
