"""Capabilities made from others: `score` from `loss`, `generate` from `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tenfold.capabilities import Delegate
from tenfold.errors import ConfigError
from tenfold.lm.batching import pad_batch
from tenfold.lm.generation import GenerateMixin
from tenfold.lm.sampling import GeneratedRow, GenerationRow
from tenfold.lm.scoring import ScoreMixin
from tenfold.records import GenerationConfig

BATCH_TOKENS = 8192


class _OnDevice(Delegate):
    """Knows where the base computes and how large its batches may be."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.device = _device_of(base)
        self.batch_tokens = int(getattr(base, "batch_tokens", BATCH_TOKENS))


class ScoreFromLoss(ScoreMixin, _OnDevice):
    """Adds `score` to a model with `loss` and `tokenize`."""


class GenerateFromStep(GenerateMixin, _OnDevice):
    """Adds `generate` to a model with `step` and `tokenize`; it cannot be constrained."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self._eos_ids = frozenset(() if base.eos_id is None else (base.eos_id,))

    def _grammar(self, config: GenerationConfig) -> str | None:
        if config.constraint is not None:
            raise ConfigError("a model that generates through `step` cannot follow a constraint")
        return None

    def _closer(self, config: GenerationConfig) -> None:
        return None

    @torch.no_grad()
    def _generate_batch(
        self, rows: Sequence[GenerationRow], config: GenerationConfig
    ) -> list[GeneratedRow]:
        """Token by token: the arg-max of processed logits, until every row has ended."""
        batch = pad_batch([r.ids for r in rows], self.pad_id, side="left", device=self.device)
        controls = self.controls(rows, config, batch.input_ids.shape[1])
        session, output = self.base.start(batch.input_ids, batch.attention_mask)
        choose: Any = controls.processors
        sequences = batch.input_ids
        while True:
            logits = output.logits[:, -1].float()
            chosen = choose(sequences, logits).argmax(-1, keepdim=True)
            sequences = torch.cat([sequences, chosen], dim=1)
            if bool(controls.stopping(sequences, None).all()):
                return controls.collect(sequences)
            output = session.extend(chosen)


def _device_of(base: Any) -> torch.device:
    """Where the base's weights are, as far as it tells; else the CPU."""
    if hasattr(base, "device"):
        return torch.device(base.device)
    parameter = next(base.module().parameters(), None) if hasattr(base, "module") else None
    return torch.device("cpu") if parameter is None else parameter.device
