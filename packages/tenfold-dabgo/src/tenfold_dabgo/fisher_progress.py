"""Partial Fisher sums on disk, so that an interrupted estimate goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tenfold.files import replacing

from tenfold_dabgo.weights import Weights


@dataclass
class PartialFisher:
    """Running sums (`totals`, shared with the caller) and how far they reach."""

    path: Path | None
    key: str
    totals: Weights
    batches_done: int = 0
    n_samples: int = 0
    n_tokens: int = 0

    @classmethod
    def open(cls, path: Path | None, totals: Weights, key: str) -> PartialFisher:
        """Continues a file with the same key, else starts from zero."""
        partial = cls(path, key, totals)
        if path is None or not path.is_file():
            return partial
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                if facts.get("key") != key:
                    return partial
                for name, total in totals.items():
                    total.copy_(file.get_tensor(name))
        except SafetensorError:
            return partial
        partial.batches_done = int(facts["batches"])
        partial.n_samples = int(facts["samples"])
        partial.n_tokens = int(facts["tokens"])
        return partial

    def save(self) -> None:
        """Writes the sums, atomically."""
        if self.path is None:
            return
        facts = {
            "key": self.key,
            "batches": str(self.batches_done),
            "samples": str(self.n_samples),
            "tokens": str(self.n_tokens),
        }
        with replacing(self.path) as temporary:
            save_file({n: v.cpu().contiguous() for n, v in self.totals.items()}, temporary, facts)

    def remove(self) -> None:
        """Deletes the file of a finished estimate."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
