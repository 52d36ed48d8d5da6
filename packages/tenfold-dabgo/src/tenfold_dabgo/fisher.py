"""The diagonal Fisher information as an object: values, provenance, file, checks.

`F_j = (1/N) sum_i (d L(z_i) / d theta_j)^2`, squared per sample before averaging. How it is
estimated is in `fisher_estimate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tenfold.errors import ConfigError
from tenfold.files import replacing
from torch import Tensor

from tenfold_dabgo.amounts import number_or_prefixed
from tenfold_dabgo.weights import Weights

SCHEMA = "dabgo-fisher/1"


@dataclass(frozen=True, slots=True)
class FisherFacts:
    """Where a Fisher comes from: kind, sample and token counts, and the hashes of the model
    and corpus it was estimated on."""

    kind: str
    n_samples: int
    n_tokens: int
    model_hash: str = ""
    data_hash: str = ""
    corpus_size: int = 0


@dataclass(frozen=True)
class FisherDiagonal:
    """Diagonal Fisher by parameter name, with its facts."""

    values: Weights
    facts: FisherFacts
    warnings: list[str] = field(default_factory=list)

    def mean(self, names: Mapping[str, Any] | None = None) -> float:
        """Mean over all weights, or over those named.

        Summed exactly, so that a Fisher read from a file, whose tensors come in another order,
        has the same mean to the last bit.
        """
        chosen = [v for n, v in self.values.items() if names is None or n in names]
        count = sum(v.numel() for v in chosen)
        return math.fsum(float(v.double().sum()) for v in chosen) / max(count, 1)

    def quantiles(self, points: tuple[float, ...] = (0.1, 0.5, 0.9)) -> dict[float, float]:
        """Quantiles over all weights (of at most 2^20 evenly spaced ones)."""
        flat = torch.cat([v.reshape(-1).float().cpu() for v in self.values.values()])
        flat = flat[:: max(1, flat.numel() // 2**20)].sort().values
        return {q: float(flat[round(q * (flat.numel() - 1))]) for q in points}

    def aligned(self, params: Mapping[str, Tensor]) -> Weights:
        """Values for exactly these parameters, on their devices.

        Raises:
            ConfigError: parameters missing or of another shape; lists the first few.
        """
        return {n: v.to(params[n].device) for n, v in self.aligned_to(params).items()}

    def aligned_to(self, params: Mapping[str, Tensor]) -> Weights:
        """Values for exactly these parameters, where they are.

        Raises:
            ConfigError: parameters missing or of another shape; lists the first few.
        """
        missing = [n for n in params if n not in self.values]
        wrong = [
            f"{n}: {tuple(self.values[n].shape)} for {tuple(p.shape)}"
            for n, p in params.items()
            if n in self.values and self.values[n].shape != p.shape
        ]
        if missing or wrong:
            raise ConfigError(
                "the Fisher does not fit the model's weights: "
                f"{len(missing)} missing ({', '.join(missing[:3])}), "
                f"{len(wrong)} of another shape ({'; '.join(wrong[:3])})",
                hint="it was estimated on another model; estimate it again",
            )
        return {n: self.values[n] for n in params}

    def precondition(
        self, params: Mapping[str, Tensor], damping: float | str
    ) -> tuple[Weights, float]:
        """`Pi = 1 / (F + epsilon)` for these parameters, and epsilon.

        Raises:
            ConfigError: the Fisher does not fit, or zeros meet epsilon = 0.
        """
        relative, number = number_or_prefixed("damping", damping, "relative", zero_allowed=True)
        values = self.aligned(params)
        epsilon = number * self.mean(params) if relative else number
        if epsilon == 0 and any(bool((v == 0).any()) for v in values.values()):
            zeros = sum(int((v == 0).sum()) for v in values.values())
            raise ConfigError(
                f"{zeros} Fisher entries are zero and the damping is 0: 1 / F is infinite",
                hint="use damping > 0, for instance relative:1.5",
            )
        return {n: 1.0 / (v + epsilon) for n, v in values.items()}, epsilon

    def check(
        self,
        model_hash: str,
        data_hash: str,
        corpus_size: int,
        *,
        names: Collection[str] | None = None,
        force: bool,
    ) -> None:
        """Compares the provenance with the model and corpus at hand.

        `names` are the model's weights: a Fisher of others was estimated on something else.

        Raises:
            ConfigError: something differs and `force` is not set; with `force` the difference
                becomes a warning.
        """
        facts = self.facts
        problems = []
        if facts.model_hash and facts.model_hash != model_hash:
            problems.append(f"model {facts.model_hash}, now {model_hash}")
        if facts.data_hash and facts.data_hash != data_hash:
            problems.append(f"corpus {facts.data_hash}, now {data_hash}")
        if facts.corpus_size and facts.corpus_size != corpus_size:
            problems.append(f"corpus of {facts.corpus_size} samples, now {corpus_size}")
        extra = [] if names is None else [n for n in self.values if n not in names]
        if extra:
            problems.append(f"{len(extra)} weights that the model lacks, such as {extra[0]}")
        if not problems:
            return
        message = "the Fisher was estimated on something else: " + "; ".join(problems)
        if not force:
            raise ConfigError(message, hint="estimate it again, or set fisher_force = true")
        self.warnings.append(message)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, atomically, with the facts as metadata."""
        metadata = {"schema": SCHEMA, "facts": json.dumps(asdict(self.facts))}
        with replacing(path) as temporary:
            save_file(
                {n: v.cpu().contiguous() for n, v in self.values.items()}, temporary, metadata
            )

    @classmethod
    def load(cls, path: Path) -> FisherDiagonal:
        """Reads a file written by `save` (or any safetensors file of parameter-named values).

        Raises:
            ConfigError: missing, not safetensors, or negative or non-finite values.
        """
        if not path.is_file():
            raise ConfigError(f"no Fisher file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}") from error
        for name, value in values.items():
            if not torch.isfinite(value).all() or (value < 0).any():
                raise ConfigError(f"{path}: {name} has negative or non-finite Fisher values")
        raw = json.loads(metadata.get("facts", "{}"))
        facts: dict[str, Any] = {"kind": "file", "n_samples": 0, "n_tokens": 0, **raw}
        return cls(values, FisherFacts(**facts))


def identity_fisher(params: Mapping[str, Tensor]) -> FisherDiagonal:
    """F = 1 everywhere: natural gradient becomes plain gradient (use epsilon = 0)."""
    values = {n: torch.ones_like(p.detach()) for n, p in params.items()}
    return FisherDiagonal(values, FisherFacts("identity", 0, 0))
