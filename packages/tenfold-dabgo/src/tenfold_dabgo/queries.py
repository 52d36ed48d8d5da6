"""Queries: a generated text, as prompt ids and completion ids (spec: the query x = (p, c)).

Only completion tokens are scored. Ids are kept apart and never re-encoded from joined text,
because joining can move token boundaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tenfold.capabilities import TokenBatch, Tokenizes
from tenfold.errors import ConfigError
from tenfold.records import PromptRecord, Record, SampleRecord, TextRecord

from tenfold_dabgo.corpus import INPUT_IDS


@dataclass(frozen=True, slots=True)
class Query:
    """One text whose origin is asked for.

    Attributes:
        id: stable id.
        prompt_ids: the m tokens that were given; never scored.
        completion_ids: the tokens that were written; scored, the first one too (it is
            predicted from the prompt's last token).
        span: half-open range of completion tokens to score, None for all of them.
        metadata: columns of the record (e.g. the module a prompt was taken from).
        stats: what the generation reported (e.g. `exit_histogram`).
        notes: what was done to fit the query into the model, for the report.
    """

    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    span: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion, `[m + n]`."""
        return self.prompt_ids + self.completion_ids

    @property
    def scored(self) -> tuple[int, int]:
        """Half-open range of scored positions in `ids`; position 0 has no loss."""
        m = len(self.prompt_ids)
        low, high = self.span if self.span is not None else (0, len(self.completion_ids))
        return max(m + low, 1), m + high

    def batch(self, device: torch.device | str = "cpu") -> TokenBatch:
        """A batch of one row `[1, m + n]` whose loss mask covers the scored positions."""
        ids = torch.tensor([self.ids], dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        low, high = self.scored
        mask[0, low:high] = 1
        return TokenBatch(ids, torch.ones_like(ids), mask)

    def check(self, vocabulary_size: int, context_length: int) -> Query:
        """The query itself, when a model of this size can score it.

        Raises:
            ConfigError: nothing to score, too long, a foreign token id, or a bad span.
        """
        n = len(self.completion_ids)
        if n == 0:
            raise ConfigError(
                f"query {self.id!r} has an empty completion: there is nothing to attribute",
                hint="generate a continuation first (dataset core:generated)",
            )
        if self.span is not None and not 0 <= self.span[0] < self.span[1] <= n:
            raise ConfigError(
                f"query {self.id!r}: span {list(self.span)} is not a range within its "
                f"{n} completion tokens"
            )
        low, high = self.scored
        if high <= low:
            raise ConfigError(
                f"query {self.id!r} has one token and no prompt: its first token has no loss"
            )
        bad = [i for i in self.ids if not 0 <= i < vocabulary_size]
        if bad:
            raise ConfigError(
                f"query {self.id!r} has token id {bad[0]}, but the model's vocabulary has "
                f"{vocabulary_size} entries",
                hint="the ids come from another tokenizer; leave them out to re-encode the text",
            )
        if len(self.ids) > context_length:
            raise ConfigError(
                f"query {self.id!r} has {len(self.ids)} tokens (prompt {len(self.prompt_ids)}, "
                f"completion {n}), but the model reads at most {context_length}",
                hint="set truncate = true to cut the prompt's beginning",
            )
        return self

    def truncated(self, context_length: int) -> Query:
        """Cut to the context: first the prompt's beginning, then the completion's end.

        At least one prompt token stays when there was one. `notes` says what was cut.
        """
        excess = len(self.ids) - context_length
        if excess <= 0:
            return self
        cut = min(excess, max(len(self.prompt_ids) - 1, 0))
        rest = excess - cut
        completion = self.completion_ids[: len(self.completion_ids) - rest]
        note = f"cut to the model's context of {context_length}: {cut} prompt tokens"
        note += f" and the last {rest} completion tokens" if rest else ""
        span = self.span and (self.span[0], min(self.span[1], len(completion)))
        return replace(
            self,
            prompt_ids=self.prompt_ids[cut:],
            completion_ids=completion,
            span=span,
            notes=(*self.notes, note),
        )


def query_from_record(
    record: Record,
    model: Tokenizes,
    *,
    truncate: bool = False,
    span: tuple[int, int] | None = None,
) -> Query:
    """The query of a record.

    A `SampleRecord` gives its ids, or encodes prompt and completion separately; a
    `TextRecord` is all completion; a `PromptRecord` needs a `reference`, which is the
    completion.

    Raises:
        ConfigError: the record has no completion, or `Query.check` fails.
    """
    query = _raw_query(record, model)
    if span is not None:
        query = replace(query, span=span)
    if truncate:
        query = query.truncated(model.context_length)
    return query.check(model.vocabulary_size, model.context_length)


def _raw_query(record: Record, model: Tokenizes) -> Query:
    if isinstance(record, SampleRecord):
        prompt, completion = record.prompt_ids, record.completion_ids
        return Query(
            record.id,
            tuple(_prompt_ids(record.prompt, model) if prompt is None else prompt),
            tuple(model.encode(record.completion) if completion is None else completion),
            metadata=record.metadata,
            stats=record.stats,
        )
    if isinstance(record, TextRecord):
        given = record.metadata.get(INPUT_IDS)
        ids = given if isinstance(given, list | tuple) else model.encode(record.text)
        columns = {k: v for k, v in record.metadata.items() if k != INPUT_IDS}
        return Query(record.id, (), tuple(ids), metadata=columns)
    if isinstance(record, PromptRecord):
        if record.reference is None:
            raise ConfigError(
                f"query {record.id!r} is a prompt without a reference: no text to attribute",
                hint="wrap the prompts in core:generated, or give each a reference",
            )
        ids = tuple(_prompt_ids(record.prompt, model))
        return Query(
            record.id, ids, tuple(model.encode(record.reference)), metadata=record.metadata
        )
    raise ConfigError(
        f"query {record.id!r} is a {record.kind or type(record).__name__} record; "
        "queries are sample, text or prompt records"
    )


def _prompt_ids(prompt: str | Sequence[Mapping[str, str]], model: Tokenizes) -> list[int]:
    return model.encode(prompt if isinstance(prompt, str) else model.render_chat(prompt))
