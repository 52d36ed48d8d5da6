"""Randomly projected per-sample gradients, the features of TrackStar and TRAK.

Each weight matrix's gradient G [O, I] becomes `P_L G P_R^T` [r, r], with fixed Rademacher
matrices scaled by 1/sqrt(r), so inner products are kept in expectation. Embeddings and vectors
(biases, norms) are left out, as in the published baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tenfold.capabilities import Grad, TokenBatch
from tenfold.errors import ConfigError
from tenfold.seeds import derive
from torch import Tensor, nn

from tenfold_dabgo.batches import length_buckets, pad_id, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.persample import PerSampleGradients
from tenfold_dabgo.queries import Query
from tenfold_dabgo.weights import Weights, borrowed, device_of


@dataclass
class Projector:
    """Projects the gradients of a model's weight matrices.

    Attributes:
        model: offers `grad`.
        rank: r; None keeps G as it is (for tests, and for small models).
        scale: factor per weight entry applied before projecting (TrackStar: 1 / sqrt(V)).
        seed: of the projections.
        token_budget: tokens per batch.
    """

    model: Grad
    rank: int | None = 16
    scale: Weights | None = None
    seed: int = 0
    token_budget: int = 4096
    _sides: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def matrices(self) -> list[str]:
        """Names of the projected weights, in the module's order.

        Raises:
            ConfigError: the model has no weight matrix beside its embeddings.
        """
        module = self.model.module()
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        names = [
            n
            for n, p in module.named_parameters()
            if p.dim() == 2 and p.is_floating_point() and id(p) not in tables
        ]
        if not names:
            raise ConfigError("the model has no weight matrix beside its embeddings to project")
        return names

    def of_dataset(
        self, dataset: TokenDataset, advance: Callable[[int], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Weight name → `[N, d]` float32 features; NaN for samples without a score."""
        out: dict[str, np.ndarray] = {}
        with borrowed(self.model) as params:
            gradients = self._gradients(params)
            everything, device = np.arange(len(dataset)), device_of(self.model)
            for bucket in length_buckets(dataset, everything, self.token_budget, device):
                batch = token_batch(dataset, bucket, pad_id(self.model), device)
                for name, block in self._features(gradients, batch).items():
                    rows = out.setdefault(
                        name, np.full((len(dataset), block.shape[1]), np.nan, dtype=np.float32)
                    )
                    rows[bucket] = block
                if advance is not None:
                    advance(len(bucket))
        return out

    def of_queries(self, queries: Sequence[Query]) -> dict[str, np.ndarray]:
        """Weight name → `[Q, d]` features of the queries' losses (prompt masked)."""
        rows: dict[str, list[np.ndarray]] = {}
        with borrowed(self.model) as params:
            gradients = self._gradients(params)
            for query in queries:
                batch = query.batch(device_of(self.model))
                for name, block in self._features(gradients, batch).items():
                    rows.setdefault(name, []).append(block)
        return {name: np.concatenate(blocks) for name, blocks in rows.items()}

    def _gradients(self, params: Mapping[str, nn.Parameter]) -> PerSampleGradients:
        return PerSampleGradients(self.model, {n: params[n] for n in self.matrices()})

    def _features(self, gradients: PerSampleGradients, batch: TokenBatch) -> dict[str, np.ndarray]:
        parts: dict[str, list[Tensor]] = {}

        def consume(name: str, first: int, block: Tensor) -> None:
            parts.setdefault(name, []).append(self.project(name, block))

        gradients.run(batch, consume)
        return {name: torch.cat(blocks).cpu().numpy() for name, blocks in parts.items()}

    def project(self, name: str, block: Tensor) -> Tensor:
        """`[b, O, I]` gradients as `[b, d]` features."""
        if self.scale is not None:
            block = block * self.scale[name].to(block)
        if self.rank is None:
            return block.reshape(len(block), -1)
        left, right = self._projections(name, block)
        return torch.einsum("ro,boi,si->brs", left, block, right).reshape(len(block), -1)

    def _projections(self, name: str, block: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._sides:
            sides: list[Any] = []
            for side, size in enumerate(block.shape[1:]):
                rank = min(self.rank or size, size)
                generator = torch.Generator().manual_seed(derive(self.seed, name, side) % 2**31)
                signs = torch.randint(0, 2, (rank, size), generator=generator) * 2 - 1
                sides.append((signs / rank**0.5).to(block))
            self._sides[name] = (sides[0], sides[1])
        return self._sides[name]


def joined(features: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Features of several weights side by side, `[n, sum d]` float64."""
    return np.concatenate([features[name] for name in names], axis=1).astype(np.float64)
