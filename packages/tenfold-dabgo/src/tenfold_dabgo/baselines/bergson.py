"""Bergson's TrackStar beside ours, over the same corpus and queries (extra `bergson`).

The model, the tokenized corpus and the queries (prompt masked) are written to a folder, Bergson
runs there as a program of its own, and its score store is read back. Nothing of it is imported,
so its version and its processes stay its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.errors import ConfigError, RunFailed
from tenfold.files import write_text

from tenfold_dabgo.attributor import Progress, no_progress
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.queries import Query
from tenfold_dabgo.scores import AttributionResult

EXTRA = "pip install 'tenfold-dabgo[bergson]'"
IGNORED = -100


@dataclass
class BergsonAttributor:
    """Bergson over all corpus samples; scores are cosines.

    Attributes:
        model: a transformers model with its tokenizer (`core:hf`, `core:tiny-lm`).
        dataset: the corpus.
        projection: size of the two-sided random projection per weight matrix; 0 for none.
        whiten: correct by the autocorrelation of the corpus' gradients (`bergson trackstar`);
            without it the plain gradient cosine (`bergson build`, then `score`).
        token_budget: tokens per batch; Bergson takes at most the model's context.
        folder: where it works; a temporary folder when left out.
        progress: progress bars.

    Raises:
        ConfigError: Bergson is not installed, or it cannot load such a model.
    """

    model: Any
    dataset: TokenDataset
    projection: int = 16
    whiten: bool = True
    token_budget: int = 2048
    folder: Path | None = None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if any(importlib.util.find_spec(name) is None for name in ("bergson", "datasets", "yaml")):
            raise ConfigError("method bergson: Bergson is not installed", hint=EXTRA)
        module = self.model.module()
        if not type(module).__module__.startswith("transformers."):
            raise ConfigError(
                f"method bergson loads models through transformers, which does not know "
                f"{type(module).__name__}",
                hint="use core:hf or core:tiny-lm, or another method",
            )
        if not hasattr(self.model, "tokenizer"):
            raise ConfigError("method bergson needs the model's tokenizer, and it has none")

    def attribute(self, queries: Iterable[Query]) -> Iterator[AttributionResult]:
        """One result per query, all from one run of Bergson."""
        queries = list(queries)
        if not queries:
            return
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="dabgo-bergson-") as name:
                scores, details = self._run(queries, Path(name))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            scores, details = self._run(queries, self.folder)
        for query, values in zip(queries, scores, strict=True):
            yield AttributionResult(
                query.id, "bergson", self.dataset, values, unit="cosine", details=dict(details)
            )

    def _run(
        self, queries: Sequence[Query], folder: Path
    ) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
        """`[Q, N]` scores, and what they took: seconds by step, bytes written."""
        started = time.perf_counter()
        usable = np.flatnonzero(self.dataset.scorable)
        self.model.module().save_pretrained(folder / "model")
        self.model.tokenizer.save_pretrained(folder / "model")
        rows = [self.dataset.ids(int(i)).tolist() for i in usable]
        _save_rows(folder / "corpus", rows, rows)
        _save_rows(folder / "queries", [list(q.ids) for q in queries], _labels(queries))
        written = time.perf_counter()
        with self.progress("bergson", None, "") as bar:
            for number, step in enumerate(self._steps(folder)):
                _bergson(step, folder / f"step-{number}.yaml")
                bar.advance(1)
        done = time.perf_counter()
        found = _read_scores(folder / "run" / "scores", len(usable), len(queries))
        out = np.full((len(queries), len(self.dataset)), np.nan)
        out[:, usable] = found.T
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        seconds = {"write": written - started, "bergson": done - written}
        return out, {"seconds": seconds, "disk": {"bytes": float(size)}}

    def _steps(self, folder: Path) -> list[dict[str, Any]]:
        """Bergson's own configuration, one table per call."""
        context = getattr(self.model, "context_length", self.token_budget)

        def index(run: str, data: str) -> dict[str, Any]:
            return {
                "run_path": str(folder / run),
                "overwrite": True,
                "model": str(folder / "model"),
                "data": {"dataset": str(folder / data)},
                "projection_dim": self.projection,
                "token_batch_size": min(self.token_budget, context),
                "loss_reduction": "mean",
                "precision": "fp32",
            }

        unit = {"unit_normalize": True}
        if self.whiten:
            # Few queries say nothing about the autocorrelation: it is the corpus' alone.
            options = {
                "query": {"dataset": str(folder / "queries")},
                "mix_hessians": False,
                "preprocess_cfg": unit,
            }
            step = {"index_cfg": index("run", "corpus"), "trackstar_cfg": options}
            return [{"trackstar": step}]
        build = {"index_cfg": index("run/query", "queries"), "preprocess_cfg": unit}
        score = {
            "index_cfg": index("run/scores", "corpus"),
            "score_cfg": {"query_path": str(folder / "run" / "query")},
            "preprocess_cfg": unit,
        }
        return [{"build": build}, {"score": score}]


def _labels(queries: Sequence[Query]) -> list[list[int]]:
    """Ids where a query is scored, the mark of ignored positions elsewhere."""
    out = []
    for query in queries:
        low, high = query.scored
        out.append([x if low <= t < high else IGNORED for t, x in enumerate(query.ids)])
    return out


def _save_rows(folder: Path, rows: Sequence[list[int]], labels: Sequence[list[int]]) -> None:
    from datasets import Dataset, disable_progress_bars, enable_progress_bars

    table = {"input_ids": rows, "labels": labels, "length": [len(row) for row in rows]}
    disable_progress_bars()
    try:
        Dataset.from_dict(table).save_to_disk(str(folder))
    finally:
        enable_progress_bars()


def _bergson(step: dict[str, Any], path: Path) -> None:
    """One call of the program.

    Raises:
        RunFailed: it failed; with the end of its own message.
    """
    write_text(path, json.dumps({"steps": [step]}))  # JSON is YAML
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "bergson", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RunFailed(
            f"bergson stopped with exit code {done.returncode}: {lines[-1] if lines else ''}",
            hint=f"run it again by hand: {' '.join(command)}",
        )


def _read_scores(folder: Path, samples: int, queries: int) -> np.ndarray:
    """`[N, Q]` float64 from a score store: one structured row per sample.

    Raises:
        RunFailed: the store is missing, incomplete or of another size.
    """
    try:
        facts = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        kind = np.dtype(facts["dtype"])
        stored = np.memmap(folder / "scores.bin", dtype=kind, mode="r", shape=(samples,))
        rows: Any = stored  # a structured array: columns by name
        columns = [rows[f"score_{q}"] for q in range(queries)]
        written = all(bool(rows[f"written_{q}"].all()) for q in range(queries))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise RunFailed(f"{folder} is not a score store of bergson: {error}") from error
    if not written:
        raise RunFailed(f"{folder}: bergson left samples without a score")
    return np.stack(columns, axis=1).astype(np.float64)
