"""The training-loss pass: every sample's loss under several sets of weights.

For each batch the ids are loaded once and the weight sets follow one another, so that both
directions see the same batch (their rounding is paired). Every second batch takes the sets in
the opposite order, so that the weights change once per batch. Results go to shards on disk when
a store is given, and a killed pass goes on with the first missing shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from tenfold.capabilities import Grad, TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.batching import scored_positions
from torch import Tensor

from tenfold_dabgo.batches import length_buckets, pad_id, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.shards import ShardStore
from tenfold_dabgo.team import ALONE, Team
from tenfold_dabgo.weights import Weights, load

TOKEN_BUDGET = 8192
SHARD_SAMPLES = 4096
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass
class LossTable:
    """Losses by weight set.

    Attributes:
        n_scored: `[N]` scored tokens per sample.
        means: weight set → `[N]` float64 mean token loss in nats; NaN where not evaluated or
            without a scored token.
        tokens: weight set → sample index → `[T]` float32 token losses, the first one NaN;
            empty unless asked for.
        n_tokens: real tokens processed (per weight set), `seconds`: time taken.
    """

    n_scored: np.ndarray
    means: dict[str, np.ndarray]
    tokens: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    n_tokens: int = 0
    seconds: float = 0.0

    def add(self, other: LossTable) -> None:
        """Takes over what another pass over the same corpus evaluated."""
        for name, values in other.means.items():
            known = np.isfinite(values)
            self.means[name][known] = values[known]
        for name, rows in other.tokens.items():
            self.tokens[name] |= rows
        self.n_tokens += other.n_tokens
        self.seconds += other.seconds


@dataclass(frozen=True)
class LossPass:
    """What is evaluated, and how: the corpus under named weight sets.

    Attributes:
        model: offers `token_loss`.
        params: the parameters that the weight sets fill (from `weights.borrowed`, which also
            restores them afterwards).
        dataset: the corpus.
        variants: name → weights; evaluated in this order on every batch.
        token_budget: tokens per batch, padding included.
        precision: `float32` (whatever the weights are), or autocast to `bfloat16`/`float16`.
        team: the processes that share the pass; all of them call `run` with equal arguments.

    Raises:
        ConfigError: unknown precision, or a budget below 1.
    """

    model: Grad
    params: Mapping[str, Tensor]
    dataset: TokenDataset
    variants: Mapping[str, Weights]
    token_budget: int = TOKEN_BUDGET
    precision: str = "float32"
    team: Team = ALONE

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ConfigError(f"precision is {self.precision!r}; known: {known}")
        if self.token_budget < 1:
            raise ConfigError(f"token_budget is {self.token_budget}; it must be at least 1")

    def run(
        self,
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        per_token: bool = False,
        store: ShardStore | None = None,
        shard_samples: int = SHARD_SAMPLES,
        advance: Callable[[int], None] | None = None,
    ) -> LossTable:
        """Mean (and per-token) losses of the samples under each weight set.

        Args:
            indices: samples to evaluate (default: all).
            per_token: keep token losses too.
            store: shards on disk for resuming.
            shard_samples: samples per shard.
            advance: called with the number of samples done.
        """
        n = len(self.dataset)
        chosen = np.arange(n) if indices is None else np.unique(np.asarray(indices))
        table = LossTable(
            n_scored=self.dataset.n_scored,
            means={name: np.full(n, np.nan) for name in self.variants},
            tokens={name: {} for name in self.variants} if per_token else {},
        )
        started = time.perf_counter()
        for number, start in enumerate(range(0, len(chosen), shard_samples)):
            part = chosen[start : start + shard_samples]
            rows = self._stored(store, number)
            if rows is None:
                mine = _collect(self._batches(part), self.variants, per_token, advance)
                rows = self.team.join_rows(mine)
                self._keep(store, number, rows)
                if advance is not None and not self.team.alone:
                    advance(len(rows["index"]) - len(mine["index"]))
            elif advance is not None:
                advance(len(part))
            _fill(table, rows, self.variants, per_token)
        table.n_tokens = int(self.dataset.lengths[chosen].sum())
        table.seconds = time.perf_counter() - started
        return table

    def _stored(self, store: ShardStore | None, number: int) -> dict[str, np.ndarray] | None:
        return None if store is None else self.team.first(lambda: store.read(number))

    def _keep(self, store: ShardStore | None, number: int, rows: Mapping[str, np.ndarray]) -> None:
        if store is not None:
            self.team.first(lambda: store.write(number, rows))

    def _batches(self, part: np.ndarray) -> Iterator[Batch]:
        device = next(iter(self.params.values())).device
        names, loaded = list(self.variants), ""
        buckets = length_buckets(self.dataset, part, self.token_budget, device)
        for bucket in self.team.mine(buckets):
            batch = token_batch(self.dataset, bucket, pad_id(self.model), device)
            losses = {}
            for name in names:
                if name != loaded:
                    load(self.params, self.variants[name])
                    loaded = name
                losses[name] = token_losses(self.model, batch, self.precision).cpu().numpy()
            names.reverse()
            yield bucket, losses, scored_positions(batch).cpu().numpy()


Batch = tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]
"""Sample indices `[B]`, token losses `[B, T]` by weight set, scored mask `[B, T]`."""


def token_losses(model: Grad, batch: TokenBatch, precision: str = "float32") -> Tensor:
    """`[B, T]` token losses without a graph, float64 for float64 models, else float32."""
    with torch.inference_mode(), _autocast(batch.input_ids.device.type, precision):
        values = model.token_loss(batch)
        return values if values.dtype == torch.float64 else values.float()


def _autocast(device: str, precision: str) -> AbstractContextManager[object]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=getattr(torch, precision))


def _collect(
    batches: Iterator[Batch],
    variants: Mapping[str, Weights],
    per_token: bool,
    advance: Callable[[int], None] | None,
) -> dict[str, np.ndarray]:
    """A shard as named arrays: `index`, `mean.<set>`, and flat `token.<set>` with `length`."""
    index: list[np.ndarray] = []
    means: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    flat: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    lengths: list[np.ndarray] = []
    for bucket, losses, mask in batches:
        index.append(bucket)
        counts = np.maximum(mask.sum(axis=1), 1)
        length = mask.sum(axis=1) + 1  # right-padded rows: the first token has no loss
        lengths.append(length)
        for name, values in losses.items():
            means[name].append((values.astype(np.float64) * mask).sum(axis=1) / counts)
            if per_token:
                flat[name] += [
                    np.concatenate([[np.nan], row[1:n]]).astype(np.float32)
                    for row, n in zip(values, length, strict=True)
                ]
        if advance is not None:
            advance(len(bucket))
    empty = np.zeros(0)
    rows = {"index": np.concatenate(index) if index else np.zeros(0, dtype=np.int64)}
    rows["length"] = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    for name in variants:
        rows[f"mean.{name}"] = np.concatenate(means[name]) if index else empty
        if per_token:
            rows[f"token.{name}"] = np.concatenate(flat[name]) if flat[name] else empty
    return rows


def _fill(
    table: LossTable, rows: Mapping[str, np.ndarray], variants: Mapping[str, Weights], tokens: bool
) -> None:
    for name in variants:
        table.means[name][rows["index"]] = rows[f"mean.{name}"]
        if tokens:
            pieces = np.split(rows[f"token.{name}"], np.cumsum(rows["length"])[:-1])
            table.tokens[name].update(zip(map(int, rows["index"]), pieces, strict=False))
