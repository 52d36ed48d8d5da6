"""The `score` capability over `token_loss` and a tokenizer: log p(y | x) = -sum of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tenfold.capabilities import Prompt
from tenfold.errors import ConfigError
from tenfold.lm.batching import length_buckets, pad_batch
from tenfold.lm.prompts import continuation_ids, prompt_ids
from tenfold.records import TokenScores


class ScoreMixin:
    """`score` for classes with `token_loss`, the `tokenize` capability, `device` and
    `batch_tokens`."""

    batch_tokens: int
    device: torch.device

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> list[TokenScores]:
        """For each (context, continuation) the continuation's token log-probabilities.

        Equals minus `token_loss` of the joined tokens. Context and continuation are encoded
        separately; pass ids where token boundaries matter.

        Raises:
            ConfigError: context and continuation do not fit the model's context.
        """
        model: Any = self
        contexts = [prompt_ids(model, context) for context, _ in pairs]
        targets = [continuation_ids(model, continuation) for _, continuation in pairs]
        rows = [c + t for c, t in zip(contexts, targets, strict=True)]
        check_length(max(map(len, rows), default=0), model.context_length)
        results: dict[int, TokenScores] = {}
        for bucket in length_buckets([len(row) for row in rows], self.batch_tokens):
            batch = pad_batch(
                [rows[i] for i in bucket],
                model.pad_id,
                loss_from=[len(contexts[i]) for i in bucket],
                device=self.device,
            )
            losses = model.token_loss(batch).cpu()
            for line, i in zip(losses, bucket, strict=True):
                values = (-line[len(contexts[i]) : len(rows[i])]).tolist()
                results[i] = TokenScores(targets[i], values)
        return [results[i] for i in range(len(rows))]


def check_length(longest: int, limit: int) -> None:
    """Raises ConfigError for a sequence that the model's context cannot hold."""
    if longest > limit:
        raise ConfigError(
            f"a sequence of {longest} tokens does not fit the model's context of {limit} tokens",
            hint="shorten the texts or use a model with a longer context",
        )
